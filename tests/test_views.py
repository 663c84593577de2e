"""`nt_xent_loss` and `supcon_loss` beside their dense definitions and beside the libraries that people know them from."""

import importlib
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gcl_kernels import backends, nt_xent_loss, supcon_loss, testing
from gcl_kernels.types import REDUCTIONS, TRANSPORTS
from tests.counting import LargestTensor, counted_products
from tests.oracle import DTYPES

reductions = st.sampled_from(REDUCTIONS)


def dense_nt_xent(x, y, scale, reduction="mean"):
    z = torch.cat([x, y])
    logits = (scale * (z @ z.T)).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    other = (torch.arange(len(z)) + len(x)) % len(z)
    return F.cross_entropy(logits, other, reduction={"weighted_mean": "mean"}.get(reduction, reduction))


def dense_supcon(x, classes, scale, reduction="mean"):
    eye = torch.eye(len(x), dtype=torch.bool)
    logits = scale * (x @ x.T)
    row = logits.masked_fill(eye, -math.inf).logsumexp(dim=1)
    positive = (classes[:, None] == classes) & (classes >= 0) & ~eye
    count = positive.sum(dim=1)
    losses = torch.where(
        count > 0, (torch.where(count > 0, row, 0.0)[:, None] - logits).mul(positive).sum(dim=1), 0.0
    ) / count.clamp(min=1)
    totals = {"mean": len(x), "weighted_mean": max(1, int((count > 0).sum())), "sum": 1}
    return losses if reduction == "none" else losses.sum() / totals[reduction]


def rows(n, d, seed, count=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    made = [F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1) for _ in range(count)]
    return [x.to(dtype).requires_grad_() for x in made]


def scale_of(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def assert_same(function, dense, inputs):
    actual = testing.value_and_gradients(function, inputs)
    expected = testing.value_and_gradients(dense, inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


sizes, widths = st.sampled_from((1, 2, 3, 16, 17, 33)), st.sampled_from((1, 3, 8))
scales, seeds = st.sampled_from((0.0, 2.0, 100.0)), st.integers(0, 999)


@given(n=sizes, d=widths, scale=scales, seed=seeds, reduction=reductions)
def test_nt_xent_is_the_dense_loss(n, d, scale, seed, reduction):
    x, y = rows(n, d, seed, 2)
    t = scale_of(scale)
    with backends.settings(tile=(16, 16), debug=True):  # checks known upstream gradients
        assert_same(
            lambda: nt_xent_loss(x, y, t, reduction=reduction), lambda: dense_nt_xent(x, y, t, reduction), (x, y, t)
        )


@given(n=sizes, d=widths, scale=scales, seed=seeds, reduction=reductions, classes=st.integers(1, 40))
def test_supcon_is_the_dense_loss(n, d, scale, seed, reduction, classes):
    (x,), t = rows(n, d, seed), scale_of(scale)
    c = torch.randint(-1, classes, (n,), generator=torch.Generator().manual_seed(seed)) * 10**9
    with backends.settings(tile=(16, 16), debug=True):
        assert_same(lambda: supcon_loss(x, c, t, reduction=reduction), lambda: dense_supcon(x, c, t, reduction), (x, t))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_dense(dtype):
    x, y = rows(60, 16, 0, 2, dtype)
    t, c = scale_of(20.0, torch.float32), torch.arange(60) % 7
    for ours, dense, inputs in (
        (nt_xent_loss, dense_nt_xent, (x, y, t)),
        (lambda x, t: supcon_loss(x, c, t), lambda x, t: dense_supcon(x, c, t), (x, t)),
    ):
        actual = testing.value_and_gradients(lambda ours=ours, inputs=inputs: ours(*inputs), inputs)
        assert [v.dtype for v in actual] == [torch.float32, *(v.dtype for v in inputs)]
        names = ("loss", *("dx", "dy")[: len(inputs) - 1], "dscale")
        floor = testing.floor(x, y, t)
        testing.assert_as_accurate(
            actual, testing.dense_forms(dense, inputs), testing.in_float64(dense, inputs), names, floor
        )


def test_two_views_are_classes_of_two():
    x, y = rows(20, 6, 1, 2)
    classes = torch.arange(20).repeat(2)
    torch.testing.assert_close(supcon_loss(torch.cat([x, y]), classes, 9.0), nt_xent_loss(x, y, 9.0))


def peer(module, name):
    """A class of another library, where it can be imported."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if importlib.util.find_spec("open_clip"):
        from gcl_kernels.training.openclip import import_open_clip

        import_open_clip()  # a CPU-only torch beside PyPI's torchvision cannot import it otherwise
    return getattr(importlib.import_module(module), name)


def test_nt_xent_is_lightly_s():
    theirs = peer("lightly.loss.ntx_ent_loss", "NTXentLoss")(temperature=0.2)
    x, y = rows(24, 8, 2, 2)
    assert_same(lambda: nt_xent_loss(F.normalize(x), F.normalize(y), 5.0), lambda: theirs(x, y), (x, y))


def test_losses_are_pytorch_metric_learning_s():
    x, y = rows(24, 8, 3, 2)
    ids = torch.arange(24).repeat(2)
    theirs = peer("pytorch_metric_learning.losses", "NTXentLoss")(temperature=0.2)
    assert_same(
        lambda: nt_xent_loss(F.normalize(x), F.normalize(y), 5.0), lambda: theirs(torch.cat([x, y]), ids), (x, y)
    )
    theirs = peer("pytorch_metric_learning.losses", "SupConLoss")(temperature=0.2)
    classes = torch.arange(24) % 5
    classes[0] = 9  # alone: theirs leaves it out of the mean
    assert_same(
        lambda: supcon_loss(F.normalize(x), classes, 5.0, reduction="weighted_mean"), lambda: theirs(x, classes), (x,)
    )


@pytest.mark.parametrize("loss", ["nt_xent", "supcon"])
def test_six_operations_a_pair_and_no_matrix_of_all_pairs(loss):
    n, d = 300, 8
    x, y = rows(n, d, 0, 2, torch.float32)
    with LargestTensor() as largest, counted_products() as flops, backends.settings(tile=(32, 48)):
        if loss == "nt_xent":
            nt_xent_loss(x, y, 5.0).backward()
        else:
            supcon_loss(torch.cat([x, y]), torch.arange(2 * n) % 9, 5.0).backward()
    assert sum(flops) == 6 * (2 * n) ** 2 * d
    assert largest.numel < (2 * n) ** 2 / 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nt_xent_loss(x, x[:3], 1.0), r"y: expected \(4, 3\), the shape of x, got \(3, 3\)"),
        (lambda x: nt_xent_loss(x, x.double(), 1.0), "y: expected the dtype of x, torch.float32, got torch.float64"),
        (lambda x: nt_xent_loss(x, 1, 1.0), "y: expected a torch.Tensor, got int"),
        (lambda x: nt_xent_loss(x[:0], x[:0], 1.0), "x: expected at least one row"),
        (lambda x: nt_xent_loss(x, x, 1.0, reduction="max"), "reduction: expected one of 'mean'"),
        (lambda x: nt_xent_loss(x, x, math.nan), "logit_scale: expected a finite number"),
        (lambda x: supcon_loss(x[0], torch.zeros(4, dtype=torch.int64), 1.0), "features: expected a 2-d tensor"),
        (lambda x: supcon_loss(x, torch.zeros(3, dtype=torch.int64), 1.0), r"classes: expected \(4,\), .*, got \(3,\)"),
        (lambda x: supcon_loss(x, torch.zeros(4), 1.0), "classes: expected dtype int64, .*, got float32"),
        (lambda x: supcon_loss(x, torch.zeros(4, dtype=torch.int64), 1.0, transport="tcp"), "transport: expected one of"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.eye(4, 3))


def test_one_compiled_graph():
    x, y = rows(20, 6, 1, 2, torch.float32)
    classes = torch.arange(20) % 3
    compiled = torch.compile(
        lambda x, y: nt_xent_loss(x, y, 5.0) + supcon_loss(x, classes, 5.0), fullgraph=True, backend="aot_eager"
    )
    plain = nt_xent_loss(x, y, 5.0) + supcon_loss(x, classes, 5.0)
    torch.testing.assert_close(compiled(x, y), plain)
    torch.compiler.reset()


CUT = (5, 1, 8, 3)


def on_rank(group, transport, reduction):
    """(NT-Xent, SupCon) and their gradients of a rank's own rows and of the scale."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = slice(sum(CUT[:rank]), sum(CUT[: rank + 1]))
    x, y = (v.detach()[: sum(CUT[:world])][mine].requires_grad_() for v in rows(sum(CUT), 4, 5, 2))
    t, classes = scale_of(6.0), (torch.arange(sum(CUT)) % 6 - 1)[mine]
    options = {"reduction": reduction, "process_group": group, "transport": transport}
    losses = nt_xent_loss(x, y, t, **options), supcon_loss(x, classes, t, **options)
    return [
        [v.detach() for v in (loss, *torch.autograd.grad(loss.sum(), inputs))]
        for loss, inputs in zip(losses, ((x, y, t), (x, t)), strict=True)
    ]


@settings(max_examples=8)
@given(world=st.sampled_from((1, 2, 4)), transport=st.sampled_from(TRANSPORTS), reduction=reductions)
def test_what_ddp_averages_is_the_gradient_of_the_joined_batch(pool, world, transport, reduction):
    parts = pool.run(world, on_rank, transport, reduction)
    n = sum(CUT[:world])
    x, y = (v.detach()[:n].requires_grad_() for v in rows(sum(CUT), 4, 5, 2))
    t, classes = scale_of(6.0), (torch.arange(sum(CUT)) % 6 - 1)[:n]
    share = 1.0 if reduction == "none" else 1 / world
    for k, (loss, inputs) in enumerate(
        ((dense_nt_xent(x, y, t, reduction), (x, y, t)), (dense_supcon(x, classes, t, reduction), (x, t)))
    ):
        actual, *gradients, scales = zip(*(part[k] for part in parts), strict=True)
        if reduction != "none":
            torch.testing.assert_close(torch.stack(actual).mean(), loss.detach())
        elif k:  # NT-Xent's own rows come as x, then y, of each rank
            torch.testing.assert_close(torch.cat(actual), loss.detach())
        expected = torch.autograd.grad(loss.sum(), inputs)
        for g, e in zip(gradients, expected, strict=False):
            torch.testing.assert_close(share * torch.cat(g), e)
        torch.testing.assert_close(share * torch.stack(scales).sum(), expected[-1])


def refused_on_rank(group):
    """A rank whose arguments are wrong, and one whose are not."""
    x = torch.eye(4, 3)
    try:
        nt_xent_loss(x, x if dist.get_rank(group) else x[:2], 1.0, process_group=group)
    except ValueError as error:
        return str(error)


def test_a_rank_s_error_is_an_error_on_every_rank(pool):
    messages = pool.run(2, refused_on_rank)
    assert all("y: expected (4, 3), the shape of x, got (2, 3)" in message for message in messages)
