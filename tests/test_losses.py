"""gcl_loss, GCLLoss and ClipLoss against the reference, open_clip and themselves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import reference
from gcl_kernels import ClipLoss, GCLLoss, gcl_loss, pairwise_logsumexp, testing
from gcl_kernels.backends import torch_chunked
from gcl_kernels.training.openclip import import_open_clip
from tests.test_lse import DENSE_FORMS, LargestTensor, Products, accuracy_floor, as_given

open_clip = import_open_clip()

weights_like = st.sampled_from(("none", "uniform", "zeros", "huge", "one"))


def draw_weights(kind, shape, problem):
    if kind == "none":
        return None
    w = torch.rand(shape, generator=problem.generator(), dtype=torch.float64)
    return {"uniform": w, "zeros": torch.zeros_like(w), "huge": 1e6 * w, "one": torch.ones_like(w)}[kind]


def keep_tiles(patch, count):
    """Let the loss keep the exponentials of ``count`` tiles between its passes; None: make its gradients in the backward."""
    patch.setenv("GCL_KERNELS_WORKSPACE_MIB", "0" if count is None else "256")
    patch.setattr(torch_chunked.Problem, "tiles_to_keep", lambda *_: count)


@given(
    problem=testing.problems(),
    options=testing.loss_options(),
    kind=weights_like,
    tile=st.sampled_from((16, 64, 1024)),
    tiles_kept=st.sampled_from((None, 1, 1000)),
)
def test_float64_loss_and_gradients_equal_the_reference(problem, options, kind, tile, tiles_kept):
    batch = problem.build(torch.float64)
    shape = batch.options["labels"].shape if "labels" in batch.options else (problem.n,)
    options = {**options, **batch.options, "weights": draw_weights(kind, shape, problem)}
    with pytest.MonkeyPatch.context() as patch:
        keep_tiles(patch, tiles_kept)
        patch.setattr(torch_chunked, "default_tile", lambda *_: (tile, tile))
        patch.setattr(torch_chunked, "lines_at_once", lambda *_: tile)
        patch.setenv("GCL_KERNELS_DEBUG", "1")  # checks what one direction promises
        actual, oracle = (
            testing.value_and_gradients(lambda f=f: f(*batch.differentiable, **options), batch.differentiable)
            for f in (gcl_loss, reference.gcl_loss)
        )
    for a, o in zip(actual, oracle, strict=True):
        torch.testing.assert_close(a, o, rtol=1e-10, atol=1e-10 * (1e6 if kind == "huge" else 1))


@given(
    problem=testing.problems(sizes=(15, 17, 64, 65, 129), dims=(8, 16, 33, 100), scales=(1.0, 14.3, 100.0)),
    options=testing.loss_options(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
def test_loss_is_as_accurate_as_dense_pytorch(problem, options, dtype):
    batch = problem.build(dtype)
    options = {**options, **batch.options}
    exact = [x.detach().double().requires_grad_() for x in batch.differentiable]
    oracle = testing.value_and_gradients(lambda: reference.gcl_loss(*exact, **options), exact)
    inputs = batch.differentiable

    dense = [
        testing.value_and_gradients(lambda f=f: reference.gcl_loss(*f(*inputs), **options), inputs) for f in DENSE_FORMS
    ]
    actual = testing.value_and_gradients(lambda: gcl_loss(*inputs, **options), inputs)
    assert actual[0].dtype == torch.float32
    testing.assert_as_accurate(
        actual, dense, oracle, ("loss", "dlhs", "drhs", "dscale"), floor=accuracy_floor(problem, batch, oracle[-1])
    )


def test_a_well_trained_row_keeps_its_loss():
    """At logit_scale 100 a float32 logsumexp is known to 4e-6; the loss of a good row is far below that."""
    x = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    y = F.normalize(x + 1.3 * torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) / 32**0.5)
    oracle = reference.gcl_loss(x.double(), y.double(), 100.0, reduction="none")
    actual = gcl_loss(x, y, 100.0, reduction="none")
    s = 100.0 * x @ y.T
    target = torch.arange(64)
    dense = (F.cross_entropy(s, target, reduction="none") + F.cross_entropy(s.T, target, reduction="none")) / 2
    assert 1e-12 < float(oracle.median()) < 1e-5
    testing.assert_as_accurate([actual], [[dense]], [oracle])


@pytest.mark.parametrize("tiles_kept", [None, 5, 1000])
def test_a_saturated_batch_has_no_noise_of_rounding(tiles_kept, monkeypatch):
    """Losses of 1e-9, far below float32's resolution of a logsumexp or of p, and their gradients, to three digits."""
    keep_tiles(monkeypatch, tiles_kept)
    monkeypatch.setattr(torch_chunked, "default_tile", lambda *_: (16, 16))
    x = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    exact = [x.double().clone().requires_grad_() for _ in range(2)]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    actual = testing.value_and_gradients(lambda: 1e9 * gcl_loss(*inputs, 50.0, reduction="sum"), inputs)
    oracle = testing.value_and_gradients(lambda: 1e9 * reference.gcl_loss(*exact, 50.0, reduction="sum"), exact)
    assert 0 < float(oracle[0]) < 64e3
    for a, o in zip(actual, oracle, strict=True):
        assert testing.relative_error(a, o) < 1e-3


@given(problem=testing.problems(labels=False, ids=False), kind=weights_like)
def test_losses_are_not_negative(problem, kind):
    batch = problem.build(torch.float32)
    w = draw_weights(kind, (problem.n,), problem)
    loss = gcl_loss(*batch.differentiable, weights=w, reduction="none")
    largest_weight = 1.0 if w is None else float(w.max())
    assert float(loss.detach().min()) >= -1e-6 * largest_weight


@pytest.mark.parametrize("directions", ["lhs_to_rhs", "rhs_to_lhs", "both"])
@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({}, 6),
        ({"label_smoothing": 0.1}, 6),
        ({"reduction": "weighted_mean"}, 6),
        ({"reduction": "none"}, 8),
        ({"z_loss": 1e-3}, 8),
    ],
)
def test_one_direction_pays_for_one(directions, options, units, monkeypatch):
    """6 N M D where the gradient is known beforehand, 8 otherwise; both directions cost 8 where no tile is kept."""
    n, m, d = 96, 160, 32
    keep_tiles(monkeypatch, None)
    monkeypatch.setattr(torch_chunked, "default_tile", lambda *_: (64, 64))
    monkeypatch.setattr(torch_chunked, "lines_at_once", lambda *_: 32)
    units = 8 if directions == "both" else units
    lhs, rhs = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
    total = 0

    def counted(function):
        def run(*args, **kwargs):
            nonlocal total
            with Products() as products:
                result = function(*args, **kwargs)
            total += products.flops
            return result

        return run

    for name in ("forward", "backward", "forward_with_gradient"):
        monkeypatch.setattr(torch_chunked, name, counted(getattr(torch_chunked, name)))
    gcl_loss(lhs, rhs, 1.0, directions=directions, **options).sum().backward()
    assert total == units * n * m * d


@pytest.mark.parametrize(("tiles_kept", "units"), [(1, 6 + 2 * 15 / 16), (4, 7.5), (16, 6)])
def test_a_kept_tile_is_not_made_again(tiles_kept, units, monkeypatch):
    n, d = 64, 32
    keep_tiles(monkeypatch, tiles_kept)
    monkeypatch.setattr(torch_chunked, "default_tile", lambda *_: (16, 16))
    x, labels, g = torch.randn(n, d), torch.arange(n)[:, None], torch.ones(n)
    with Products() as products:
        torch_chunked.forward_with_gradient(
            x, x.flip(0), torch.tensor(0.1), labels, None, None, g, g, -2 * labels, True, True, True
        )
    assert products.flops == units * n * n * d


def test_kept_tiles_respect_the_workspace_budget(monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", "1")
    x = torch.randn(300, 4)
    problem = torch_chunked.Problem.of(x, x, torch.tensor(1.0), None, None, None, (128, 128))
    tile = 4 * torch_chunked.tile_size(128, 128)
    assert problem.tiles_to_keep(0) == 2**20 // tile - 2  # the two in use count
    assert problem.tiles_to_keep(3 * tile) == 2**20 // tile + 1  # gradients are written where tiles were


def test_one_direction_never_holds_n_by_m(monkeypatch):
    n, m, d = 300, 400, 8
    monkeypatch.setattr(torch_chunked, "lines_at_once", lambda *_: 16)
    lhs, rhs, labels = torch.randn(n, d), torch.randn(m, d), torch.arange(n)[:, None]
    for g_row, g_col in ((torch.ones(n), None), (None, torch.ones(m))):
        with LargestTensor() as largest:
            torch_chunked.forward_with_gradient(
                lhs, rhs, torch.tensor(1.0), labels, None, None, g_row, g_col, -torch.ones(n, 1), True, True, True
            )
        shape = (16, m) if g_col is None else (n, 16)
        assert largest.numel == torch_chunked.tile_size(*shape)


@pytest.mark.parametrize("directions", ["lhs_to_rhs", "both"])
def test_a_second_backward_through_a_gradient_in_one_pass_is_refused(directions):
    lhs, rhs = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    loss = gcl_loss(lhs, rhs, 1.0, directions=directions)
    (gradient,) = torch.autograd.grad(loss, lhs, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("directions", ["lhs_to_rhs", "both"])
def test_a_retained_graph_gives_the_same_bits_again_whatever_became_of_the_first_gradient(directions):
    leaves = [
        torch.randn(5, 3, requires_grad=True),
        torch.randn(5, 3, requires_grad=True),
        torch.tensor(2.0).requires_grad_(),
    ]
    loss = gcl_loss(*leaves, directions=directions)
    first = [g.clone() for g in torch.autograd.grad(loss, leaves)]
    loss = gcl_loss(*leaves, directions=directions)
    for times in (1, 2, 4):
        (times * loss).backward(retain_graph=True)
        for x, g in zip(leaves, first, strict=True):
            assert x.grad is not None
            assert torch.equal(x.grad, times * g)
            x.grad.fill_(math.nan)
            x.grad = None


def test_several_positives_are_a_soft_target():
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    target = torch.zeros(6, 9, dtype=torch.float64)
    labels, weights = torch.tensor([[0, 3, -1]] * 6), torch.tensor([[0.25, 0.75, -1.0]] * 6, dtype=torch.float64)
    target[:, 0], target[:, 3] = 0.25, 0.75
    expected = F.cross_entropy(2.0 * x @ y.T, target)
    actual = gcl_loss(x, y, 2.0, labels=labels, weights=weights, directions="lhs_to_rhs")
    torch.testing.assert_close(actual, expected)


def test_the_positive_s_own_id_never_hides_it():
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    ids = torch.arange(6)
    torch.testing.assert_close(gcl_loss(x, y, 2.0, lhs_ids=ids, rhs_ids=ids), gcl_loss(x, y, 2.0))


@given(
    mode=st.sampled_from(("aggregate", "pairwise")),
    masked=st.booleans(),
    ids=st.booleans(),
    options=testing.loss_options(),
    seed=st.integers(0, 999),
)
def test_fields_equal_the_reference(mode, masked, ids, options, seed):
    g = torch.Generator().manual_seed(seed)
    n, m, d = 17, 20, 6
    lhs = {k: torch.randn(n, d, generator=g, dtype=torch.float64, requires_grad=True) for k in ("query", "tags")}
    rhs = {k: torch.randn(m, d, generator=g, dtype=torch.float64, requires_grad=True) for k in ("title", "image")}
    options = {**options, "field_mode": mode, "rhs_field_weights": {"title": 0.1, "image": 0.9}}
    options["weights"] = torch.rand(n, generator=g, dtype=torch.float64)
    if masked:
        options["lhs_field_mask"] = torch.rand(n, 2, generator=g) > 0.3
        options["rhs_field_mask"] = torch.rand(m, 2, generator=g) > 0.3
    if ids:
        options["lhs_ids"], options["rhs_ids"] = (torch.randint(-1, 6, (k,), generator=g) for k in (n, m))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    inputs = [*lhs.values(), *rhs.values(), scale]
    actual, oracle = (
        testing.value_and_gradients(lambda f=f: f(lhs, rhs, scale, **options), inputs)
        for f in (gcl_loss, reference.gcl_loss)
    )
    for a, o in zip(actual, oracle, strict=True):
        torch.testing.assert_close(a, o, rtol=1e-10, atol=1e-10)


def test_an_absent_field_s_numbers_are_never_read():
    lhs, image = torch.randn(4, 3), torch.randn(4, 3)
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    poisoned = image.clone()
    poisoned[1] = math.nan
    for mode in ("aggregate", "pairwise"):
        options = {"rhs_field_mask": mask, "field_mode": mode}
        clean = gcl_loss(lhs, {"title": lhs, "image": image}, 1.0, **options)
        torch.testing.assert_close(gcl_loss(lhs, {"title": lhs, "image": poisoned}, 1.0, **options), clean)


def test_gcl_loss_module_weighs_scores():
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    scores = torch.tensor([1.0, 50.0, 100.0, 2.0, 99.0])
    expected = reference.gcl_loss(x, y, 2.0, weights=reference.score_to_weight("inverse_sqrt", scores))
    torch.testing.assert_close(GCLLoss("inverse_sqrt")(x, y, scores, 2.0), expected)
    torch.testing.assert_close(GCLLoss("constant")(x, y, scores, 2.0), gcl_loss(x, y, 2.0))
    torch.testing.assert_close(GCLLoss(lambda s: s / 7)(x, y, scores, 2.0), gcl_loss(x, y, 2.0, weights=scores / 7))


def test_gcl_loss_module_does_not_look_at_scores_beside_no_label():
    x, y = torch.randn(3, 4), torch.randn(5, 4)
    labels = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    scores = torch.tensor([[3.0, 1.0], [5.0, math.nan], [-1.0, -1.0]])
    weights = torch.tensor([[3.0, 1.0], [5.0, -1.0], [-1.0, -1.0]])
    actual = GCLLoss("linear", normalize="mean")(x, y, scores, 1.0, labels=labels)
    torch.testing.assert_close(actual, gcl_loss(x, y, 1.0, weights=weights, labels=labels) / 3)


@given(
    problem=testing.problems(
        sizes=(15, 17, 64, 129), dims=(8, 33, 64), labels=False, ids=False, geometries=("random", "paired")
    )
)
def test_clip_loss_is_open_clip_s(problem):
    batch = problem.build(torch.float32)
    image, text = batch.lhs[: problem.n], batch.rhs[: problem.n]
    open_clip_loss = open_clip.ClipLoss()

    def run(module, dtype, form):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (image, text, batch.logit_scale)]
        return testing.value_and_gradients(lambda: module(*form(*inputs)), inputs)

    oracle = run(open_clip_loss, torch.float64, as_given)
    theirs = [run(open_clip_loss, torch.float32, form) for form in DENSE_FORMS]
    ours = run(ClipLoss(), torch.float32, as_given)
    testing.assert_as_accurate(
        ours, theirs, oracle, ("loss", "dimage", "dtext", "dscale"), floor=accuracy_floor(problem, batch, oracle[-1])
    )


def test_clip_loss_arguments_are_open_clip_s():
    open_clip_loss = open_clip.ClipLoss
    image, text = torch.randn(6, 4), torch.randn(6, 4)
    bias = torch.zeros(1, requires_grad=True)
    for module in (open_clip_loss(False, True, True, 0, 1), ClipLoss(False, True, True, 0, 1)):
        result = module(image, text, torch.tensor([3.0]), logit_bias=bias, output_dict=True)
        assert list(result) == ["contrastive_loss"]
        torch.testing.assert_close(result["contrastive_loss"], gcl_loss(image, text, 3.0))
    result["contrastive_loss"].backward()
    assert bias.grad is not None
    assert not bias.grad.any()


FLAGS = [(False, False), (False, True), (True, False), (True, True)]


def clip_losses_on_rank(rank):
    """For each flag combination: (loss, gradients) of open_clip's and of ours on this rank."""
    results = []
    for local_loss, gather_with_grad in FLAGS:
        for kind in (open_clip.ClipLoss, ClipLoss):
            g = torch.Generator().manual_seed(rank)
            image, text = (torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
            scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
            module = kind(local_loss, gather_with_grad, rank=rank, world_size=2)
            loss = module(image, text, scale)
            loss.backward()
            results.append([x.detach().numpy() for x in (loss, image.grad, text.grad, scale.grad)])
    return results


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clip_loss_on_two_ranks_is_open_clip_s(two_ranks):
    for results in two_ranks(clip_losses_on_rank):
        for theirs, ours in zip(results[::2], results[1::2], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b))


def test_clip_loss_inside_open_clip_s_training_step():
    """A real open_clip model, its own forward's dict spread into the loss as open_clip_train does, five steps each."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
    }
    histories = []
    for loss_module in (open_clip.ClipLoss(), ClipLoss()):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config, output_dict=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(5):
            g = torch.Generator().manual_seed(step)
            images, texts = torch.randn(12, 3, 16, 16, generator=g), torch.randint(1, 100, (12, 8), generator=g)
            output = model(images, texts)
            total = sum(loss_module(**output, output_dict=True).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.detach())
        histories.append(torch.stack(losses))
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-5, atol=1e-6)
    assert histories[0][-1] != histories[0][0]


def test_public_result_follows_the_contract():
    result = pairwise_logsumexp(torch.randn(3, 2), torch.randn(4, 2), 1.0, labels=torch.zeros(3, 2, dtype=torch.int64))
    assert result._fields == ("row", "col", "positive")
    assert [tuple(v.shape) for v in result] == [(3,), (4,), (3, 2)]


def test_rows_far_from_what_their_first_tile_shows(monkeypatch):
    """A row's first tile sets its reference. A row hidden there and 216 powers of two below it later, and one as far above it
    later, leave float32's range if that reference is used blindly, in the sums or in the gradients."""
    monkeypatch.setattr(torch_chunked, "default_tile", lambda *_: (16, 16))
    keep_tiles(monkeypatch, 1000)
    n = 40
    x, y = torch.zeros(n, 2), torch.zeros(n, 2)
    x[0, 0], y[:, 0] = -1.5, 1.0  # row 0 below
    x[1, 1], y[:16, 1], y[16:, 1] = 1.0, -1.0, 1.0  # row 1 above
    ids = torch.arange(n)
    lhs_ids, rhs_ids = torch.where(ids == 0, 7, -1), torch.where(ids < 16, 7, -1)
    inputs = [v.clone().requires_grad_() for v in (x, y)]
    exact = [v.double().requires_grad_() for v in (x, y)]
    options = {"lhs_ids": lhs_ids, "rhs_ids": rhs_ids, "reduction": "sum"}
    actual = testing.value_and_gradients(lambda: gcl_loss(*inputs, 100.0, **options), inputs)
    oracle = testing.value_and_gradients(lambda: reference.gcl_loss(*exact, 100.0, **options), exact)
    for a, o in zip(actual, oracle, strict=True):
        assert testing.relative_error(a, o) < 1e-6
    statistics = pairwise_logsumexp(
        x, y, 100.0, labels=torch.full((n,), -1), lhs_ids=lhs_ids, rhs_ids=rhs_ids, backend="torch"
    )
    expected = reference.pairwise_logsumexp(
        x.double(), y.double(), 100.0, labels=torch.full((n,), -1), lhs_ids=lhs_ids, rhs_ids=rhs_ids
    )
    torch.testing.assert_close(statistics.row.double(), expected.row, rtol=1e-6, atol=0)
