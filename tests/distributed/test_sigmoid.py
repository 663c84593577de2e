"""The sigmoid loss over gloo groups of 1 to 4 unequal ranks: against the reference on the joined batch, and open_clip's."""

import importlib

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import SigLipLoss, backends, pairwise_softplus, sigmoid_loss, testing
from gcl_kernels.training.openclip import import_open_clip
from gcl_kernels.types import TRANSPORTS
from tests.counting import LargestTensor, Products
from tests.distributed import cases
from tests.distributed.pool import WORLDS, error_of
from tests.distributed.test_results import cuts, transports
from tests.oracle import DTYPES
from tests.sigmoid_oracle import assert_accurate, biases, with_bias

import_open_clip()
open_clip_loss = importlib.import_module("open_clip.loss")


def upstream(cut):
    """Gradients of row and positive of the joined problem: those of `testing.value_and_gradients`."""
    g = torch.Generator().manual_seed(0)
    n = sum(cut.rows)
    shape = (n, cut.problem.positives) if cut.problem.positives else (n,)
    return [torch.rand(size, generator=g, dtype=torch.float64) for size in ((n,), shape)]


def primitive_on_rank(group, cut, dtype, transport, bias):
    """Two runs of (row, positive, dlhs, drhs, dscale, dbias)."""
    rank, runs = dist.get_rank(group), []
    rows, _ = cut.of(rank)
    for _ in range(2):
        batch = cut.part(dtype, rank)
        inputs = with_bias(batch, bias)
        outputs = pairwise_softplus(*inputs, **batch.options, process_group=group, transport=transport)
        sum((v * g[rows]).sum() for v, g in zip(outputs, upstream(cut), strict=True)).backward()
        runs.append([*(v.detach() for v in outputs), *(x.grad for x in inputs)])
    return runs


@given(cut=cuts(terms=True), transport=transports, dtype=st.sampled_from((torch.float64, *DTYPES)), bias=biases())
@settings(max_examples=settings.default.max_examples // 2)
def test_the_primitive_is_as_accurate_as_dense_pytorch(pool, cut, transport, dtype, bias):
    runs = pool.run(len(cut.rows), primitive_on_rank, cut, dtype, transport, bias)
    for first, second in runs:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    *lines, scales, dbias = zip(*(first for first, _ in runs), strict=True)
    actual = [*(torch.cat(line) for line in lines), *(torch.stack(v).double().sum() for v in (scales, dbias))]
    batch = cut.joined(dtype)
    assert_accurate(actual, with_bias(batch, bias), **batch.options)


def loss_on_rank(group, cut, transport, weights, options, factors):
    """(loss, gradients, FLOPs of products in both passes); the rank's loss is multiplied by its factor."""
    rank = dist.get_rank(group)
    batch = cut.part(torch.float64, rank)
    inputs = with_bias(batch, -3.0)
    weights = None if weights is None else weights[cut.of(rank)[0]]
    with Products() as products:
        loss = sigmoid_loss(
            *inputs, weights=weights, **batch.options, **options, process_group=group, transport=transport
        )
        (factors[rank] * loss.sum()).backward()
    return [loss.detach(), *(x.grad for x in inputs)], products.flops


@given(
    cut=cuts(terms=True),
    transport=transports,
    weighted=st.booleans(),
    reduction=st.sampled_from(("mean", "weighted_mean", "sum", "none")),
)
@settings(max_examples=settings.default.max_examples // 2)
def test_what_ddp_averages_is_the_gradient_of_the_joined_batch(pool, cut, transport, weighted, reduction):
    batch, world = cut.joined(torch.float64), len(cut.rows)
    shape = (sum(cut.rows), cut.problem.positives) if cut.problem.positives else (sum(cut.rows),)
    weights = torch.rand(shape, generator=cut.problem.generator(), dtype=torch.float64) if weighted else None
    answers = pool.run(world, loss_on_rank, cut, transport, weights, {"reduction": reduction}, [2.0] * world)
    losses, lhs, rhs, scales, bias = zip(*(answer for answer, _ in answers), strict=True)
    inputs = with_bias(batch, -3.0)
    expected = reference.sigmoid_loss(*inputs, weights=weights, reduction=reduction, **batch.options)
    oracle = torch.autograd.grad(2 * expected.sum(), inputs)
    share = 1.0 if reduction == "none" else 1 / world
    actual = torch.cat(losses) if reduction == "none" else torch.stack(losses).mean()
    gradients = [share * torch.cat(v) for v in (lhs, rhs)] + [share * torch.stack(v).sum() for v in (scales, bias)]
    for a, o in zip((actual, *gradients), (expected.detach(), *oracle), strict=True):
        torch.testing.assert_close(a, o, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("reduction", "units"), [("mean", 6), ("weighted_mean", 6), ("none", 8)])
def test_both_passes_take_six_units_over_all_ranks(pool, transport, reduction, units):
    cut = cases.Cut(testing.Problem(28, 31, 8, None, 1, 5, 2.0, "random", False, 0), (7, 16, 5), (7, 19, 5))
    answers = pool.run(3, loss_on_rank, cut, transport, None, {"reduction": reduction}, [2.0] * 3)
    assert sum(flops for _, flops in answers) == units * 28 * 31 * 8


@given(cut=cuts(), transport=transports)
@settings(max_examples=8)
def test_ranks_may_weigh_their_losses_differently(pool, cut, transport):
    """Gradients formed beforehand are for one factor alike on all ranks; others are made again."""
    world = len(cut.rows)
    factors = [0.0, 1.0, -2.0, 3.0][-world:]
    answers = pool.run(world, loss_on_rank, cut, transport, None, {"reduction": "sum"}, factors)
    batch = cut.joined(torch.float64)
    inputs = with_bias(batch, -3.0)
    rows = reference.sigmoid_loss(*inputs, reduction="none", **batch.options)
    factor = torch.cat(
        [torch.full((n,), world * f, dtype=torch.float64) for n, f in zip(cut.rows, factors, strict=True)]
    )
    oracle = torch.autograd.grad((factor * rows).sum(), inputs[:2])
    actual = [torch.cat(v) for v in list(zip(*(answer for answer, _ in answers), strict=True))[1:3]]
    for a, o in zip(actual, oracle, strict=True):
        torch.testing.assert_close(a, o, rtol=1e-10, atol=1e-10)


IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather")


def siglip_on_rank(group):
    """For each implementation (loss, gradients) of open_clip's and of ours on this rank."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    results = []
    for dist_impl in IMPLEMENTATIONS:
        for kind in (open_clip_loss.SigLipLoss, SigLipLoss):
            g = torch.Generator().manual_seed(rank)
            image, text = (torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
            scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -3.0))
            loss = kind(rank=rank, world_size=world, dist_impl=dist_impl)(image, text, scale, bias)
            loss.backward()
            results.append([x.detach() for x in (loss, image.grad, text.grad, scale.grad, bias.grad)])
    return results


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_siglip_loss_on_all_ranks_is_open_clip_s(pool):
    """open_clip's loss knows the default group only, which all ranks of the pool are in."""
    for results in pool.run(WORLDS[-1], siglip_on_rank):
        for theirs, ours in zip(results[::2], results[1::2], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


def faults_on_rank(group):
    """The error of each call, in which rank 1 differs from the others."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    odd = rank == 1
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    bias = torch.tensor(-3.0, requires_grad=odd)
    calls = {
        "bias": lambda: sigmoid_loss(x, y, 2.0, "0" if odd else -3.0, process_group=group),
        "gradient": lambda: pairwise_softplus(x, y, 2.0, bias, process_group=group),
        "reduction": lambda: sigmoid_loss(x, y, 2.0, -3.0, reduction="sum" if odd else "mean", process_group=group),
        "rank": lambda: SigLipLoss(rank=0 if odd else rank, world_size=world)(x, y, 2.0, -3.0),
    }
    return {name: str(error_of(call)) for name, call in calls.items()}


def test_a_rank_that_differs_is_an_error_on_every_rank(pool):
    expected = {
        "bias": "logit_bias: expected a float or a tensor of one element, got str",
        "gradient": "requires_grad of logit_bias: expected the same on every rank",
        "reduction": "reduction: expected the same on every rank",
        "rank": "rank: expected 1, as in the default process group, got 0",
    }
    for errors in pool.run(WORLDS[-1], faults_on_rank):
        for name, message in expected.items():
            assert message in errors[name]


def largest_tensor_on_rank(group):
    sizes = []
    with backends.settings(tile=(16, 8)):
        for dist_impl in IMPLEMENTATIONS:
            image, text = torch.randn(2, 60, 3, requires_grad=True).unbind()
            loss = SigLipLoss(rank=dist.get_rank(group), world_size=dist.get_world_size(group), dist_impl=dist_impl)
            with LargestTensor() as largest:
                loss(image, text, 2.0, -3.0).backward()
            sizes.append(largest.numel)
    return sizes


def test_no_rank_holds_its_rows_by_all_columns(pool):
    for sizes in pool.run(WORLDS[-1], largest_tensor_on_rank):
        assert max(sizes) < 60 * 240 / 2
