"""gcl_loss, GCLLoss and ClipLoss against the reference, open_clip and themselves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import reference
from gcl_kernels import GCLLoss, backends, gcl_loss, nt_xent_loss, pairwise_logsumexp, sigmoid_loss, testing
from tests.oracle import DTYPES, LOSS_NAMES, assert_accurate, run

weights_like = st.sampled_from(("none", "uniform", "zeros", "huge", "one"))


def draw_weights(kind, shape, problem):
    if kind == "none":
        return None
    w = torch.rand(shape, generator=problem.generator(), dtype=torch.float64)
    return {"uniform": w, "zeros": torch.zeros_like(w), "huge": 1e6 * w, "one": torch.ones_like(w)}[kind]


# Budgets in MiB under which small problems store no tile between the passes, some of them, and all.
budgets = st.sampled_from((0, 0.02, 256))


@given(
    problem=testing.problems(),
    options=testing.loss_options(),
    kind=weights_like,
    tile=st.sampled_from((16, 64, 1024)),
    workspace_mib=budgets,
)
def test_float64_loss_and_gradients_equal_the_reference(problem, options, kind, tile, workspace_mib):
    batch = problem.build(torch.float64)
    shape = batch.options["labels"].shape if "labels" in batch.options else (problem.n,)
    options = {**options, "weights": draw_weights(kind, shape, problem)}
    with backends.settings(
        tile=(tile, tile), workspace_mib=workspace_mib, debug=True
    ):  # checks known upstream gradients
        actual = run(gcl_loss, batch, **options)
    for a, o in zip(actual, run(reference.gcl_loss, batch, **options), strict=True):
        torch.testing.assert_close(a, o, rtol=1e-10, atol=1e-10 * (1e6 if kind == "huge" else 1))


@given(
    problem=testing.problems(sizes=(15, 17, 64, 65, 129), dims=(8, 16, 33, 100), scales=(1.0, 14.3, 100.0, -10.0)),
    options=testing.loss_options(),
    dtype=st.sampled_from(DTYPES),
)
def test_loss_is_as_accurate_as_dense_pytorch(problem, options, dtype):
    batch = problem.build(dtype)
    actual = run(gcl_loss, batch, **options)
    assert actual[0].dtype == torch.float32
    assert_accurate(actual, batch, reference.gcl_loss, names=LOSS_NAMES, **options)


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


@pytest.mark.parametrize("workspace_mib", [0, 0.004, 256])
def test_a_saturated_batch_has_no_noise_of_rounding(workspace_mib):
    """Losses of 1e-9, far below float32's resolution of a logsumexp or of p, and their gradients, to three digits."""
    x = F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    exact = [x.double().clone().requires_grad_() for _ in range(2)]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with backends.settings(tile=(16, 16), workspace_mib=workspace_mib):
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


@pytest.mark.parametrize("p", [1, 2])
def test_a_row_without_a_label_adds_nothing_whatever_it_holds(p):
    x, y, labels = torch.randn(5, 3), torch.randn(7, 3), torch.arange(5)[:, None].repeat(1, p)
    labels[2] = -1
    clean = gcl_loss(x, y, 2.0, labels=labels, directions="lhs_to_rhs", reduction="none")
    x[2] = math.nan
    loss = gcl_loss(x, y, 2.0, labels=labels, directions="lhs_to_rhs", reduction="none")
    assert loss[2] == 0
    assert torch.equal(loss, clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs"])
def test_weights_of_zero_give_gradients_of_zero(dtype, directions):
    """On a device, where half precision divides G by the largest upstream gradient."""
    inputs = [torch.randn(n, 4).to(dtype).requires_grad_() for n in (5, 7)]
    batch = testing.Batch(*inputs, torch.tensor(2.0).requires_grad_(), {"weights": torch.zeros(5)})
    with backends.settings(host_reads=False):
        assert not any(v.any() for v in run(gcl_loss, batch, directions=directions))


def test_a_column_far_below_all_rows():
    """Tiles without it are stored between the passes, and are of no use: one exponential cannot serve it and them."""
    x, y = torch.randn(32, 2), torch.randn(40, 2)
    x[:, 0], y[:, 0] = 1.0, 0.0
    y[39, 0] = -110.0
    batch = testing.Batch(x.requires_grad_(), y.requires_grad_(), torch.tensor(1.0).requires_grad_(), {})
    with backends.settings(tile=(16, 16)):
        actual = run(gcl_loss, batch)
    assert_accurate(actual, batch, reference.gcl_loss, names=LOSS_NAMES)


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


def test_public_result_follows_the_contract():
    result = pairwise_logsumexp(torch.randn(3, 2), torch.randn(4, 2), 1.0, labels=torch.zeros(3, 2, dtype=torch.int64))
    assert result._fields == ("row", "col", "positive")
    assert [tuple(v.shape) for v in result] == [(3,), (4,), (3, 2)]


def test_rows_far_from_what_their_first_tile_shows():
    """A row's first tile sets its reference. A row hidden there and 216 powers of two below it later, and one as far above it
    later, leave float32's range if that reference is used blindly, in the sums or in the gradients."""
    n = 40
    x, y = torch.zeros(n, 2), torch.zeros(n, 2)
    x[0, 0], y[:, 0] = -1.5, 1.0  # row 0 below
    x[1, 1], y[:16, 1], y[16:, 1] = 1.0, -1.0, 1.0  # row 1 above
    ids = torch.arange(n)
    lhs_ids, rhs_ids = torch.where(ids == 0, 7, -1), torch.where(ids < 16, 7, -1)
    inputs = [v.clone().requires_grad_() for v in (x, y)]
    exact = [v.double().requires_grad_() for v in (x, y)]
    options = {"lhs_ids": lhs_ids, "rhs_ids": rhs_ids, "reduction": "sum"}
    with backends.settings(tile=(16, 16)):
        actual = testing.value_and_gradients(lambda: gcl_loss(*inputs, 100.0, **options), inputs)
    oracle = testing.value_and_gradients(lambda: reference.gcl_loss(*exact, 100.0, **options), exact)
    for a, o in zip(actual, oracle, strict=True):
        assert testing.relative_error(a, o) < 1e-6
    with backends.settings(tile=(16, 16)):
        statistics = pairwise_logsumexp(
            x, y, 100.0, labels=torch.full((n,), -1), lhs_ids=lhs_ids, rhs_ids=rhs_ids, backend="torch"
        )
    expected = reference.pairwise_logsumexp(
        x.double(), y.double(), 100.0, labels=torch.full((n,), -1), lhs_ids=lhs_ids, rhs_ids=rhs_ids
    )
    torch.testing.assert_close(statistics.row.double(), expected.row, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["softmax", "weighted", "views", "sigmoid"])
@pytest.mark.parametrize("n", [1, 3])
def test_gradcheck_of_losses(name, n):
    """Which also asks for the gradients of no upstream gradient."""
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(n, generator=g, dtype=torch.float64)
    loss = {
        "softmax": gcl_loss,
        "weighted": lambda *given: gcl_loss(*given, weights=weights),
        "views": nt_xent_loss,
        "sigmoid": lambda *given: sigmoid_loss(*given, given[2] - 5),
    }[name]
    sides = [F.normalize(torch.randn(n, 4, generator=g, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2)]
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    with backends.settings(tile=(2, 2)):
        assert torch.autograd.gradcheck(loss, (*sides, scale), fast_mode=True)


@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs", "rhs_to_lhs", "views"])
def test_a_positive_alone_in_its_line_has_no_gradient(directions):
    """However low its logit: -100 here, while all other pairs are hidden."""
    x, y = (torch.full((2, 1), v, requires_grad=True) for v in (1.0, -1.0))
    scale, ids = torch.tensor(100.0, requires_grad=True), torch.zeros(2, dtype=torch.int64)
    if directions == "views":
        x, y = (v.detach()[:1].requires_grad_() for v in (x, y))
        loss = nt_xent_loss(x, y, scale)
    else:
        loss = gcl_loss(x, y, scale, lhs_ids=ids, rhs_ids=ids, directions=directions)
    gradients = torch.autograd.grad(loss, (x, y, scale))
    assert loss == 0
    assert all(g.eq(0).all() for g in gradients), gradients
