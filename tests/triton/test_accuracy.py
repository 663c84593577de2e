"""pairwise_logsumexp by the kernels against the float64 reference, held to plain PyTorch's error in the same dtype."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import PairwiseLSE, backends, gcl_loss, pairwise_logsumexp, testing
from gcl_kernels.backends import Lines, Need, Want
from gcl_kernels.backends.triton.config import Config, TileShape
from gcl_kernels.pairs import Pairs
from tests.oracle import DTYPES, LOSS_NAMES, NAMES, assert_accurate, bias_of_logits, run
from tests.test_cost import assert_rounded_last

from .common import build, cases, configs, configurations, triton, using
from .conftest import DEVICE

# numpy says so when the interpreter meets the infinities and NaN that some of these tests feed it
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@given(
    case=cases(terms=True),
    dtype=st.sampled_from(DTYPES),
    budget=st.sampled_from((None, 2**9, 2**14)),
    positives=st.sampled_from(("joined", "apart")),
)
@settings(max_examples=max(1, settings.default.max_examples // 2))
def test_as_accurate_as_dense_pytorch(case, dtype, budget, positives):
    config, problem = case
    batch = build(problem, dtype)
    with using(config, budget):
        actual = run(triton, batch, positives=positives)
    assert [v.dtype for v in actual] == [torch.float64] * 3 + [dtype] * 2 + [torch.float32]
    assert_accurate(actual, batch, positives=positives)


def test_the_scale_is_not_rounded():
    assert abs(bias_of_logits(triton, DEVICE)) < 4e-8


@given(case=cases(scales=(1.0, 14.3)), dtype=st.sampled_from(DTYPES))
@settings(max_examples=8)
def test_follows_the_torch_backend(case, dtype):
    """Both backends make the same statistics from the same numbers: float32 products in another order, nothing more."""
    config, problem = case
    batch = build(problem, dtype)
    with using(config):
        actual = triton(*batch.differentiable, **batch.options)
    expected = pairwise_logsumexp(*batch.differentiable, backend="torch", **batch.options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-5)


@given(problem=testing.problems(sizes=(16, 17, 65), scales=(14.3, 100.0), ids=False), config=configs)
@settings(max_examples=6)
def test_a_positive_is_at_most_its_logsumexp(problem, config):
    """The positive comes from the same arithmetic: the loss of a row is not negative, up to one rounding."""
    batch = build(problem, torch.bfloat16)
    with using(config):
        row, _, positive = triton(*batch.differentiable, **batch.options)
    labels = batch.options.get("labels", torch.arange(problem.n, device=DEVICE))
    gap = (row.reshape(-1, 1) - positive.reshape(problem.n, -1))[labels.reshape(problem.n, -1) >= 0]
    assert not (gap < -2 * torch.finfo(torch.float32).eps * row.abs().max()).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["lhs", "rhs"])
@given(config=configs, line=st.sampled_from((0, 16, 39)))
@settings(max_examples=2)
def test_what_is_not_finite_never_passes_as_finite(bad, side, config, line):
    g = torch.Generator().manual_seed(0)
    lhs, rhs = (torch.randn(40, 8, generator=g) for _ in range(2))
    (lhs if side == "lhs" else rhs)[line, 3] = bad
    lhs, rhs = (x.to(DEVICE).requires_grad_() for x in (lhs, rhs))
    with using(config):
        out = triton(lhs, rhs, 1.0)
    expected = pairwise_logsumexp(lhs, rhs, 1.0, backend="torch")
    for a, b in zip(out, expected, strict=True):
        assert not (a.isfinite() & ~b.isfinite()).any()
    # what no infinity reached keeps its value
    own = out.row if side == "lhs" else out.col
    others = torch.arange(40, device=DEVICE) != line
    if math.isnan(bad):
        assert own[others].isfinite().all()
        assert own[line].isnan()
        with using(config):
            (gradient,) = torch.autograd.grad(triton(lhs, rhs, 1.0).row.sum(), [lhs if side == "rhs" else rhs])
        assert gradient.isnan().any()


def pairs_of(batch: testing.Batch) -> Pairs:
    return Pairs.of(*(x.detach() for x in batch.differentiable), **batch.options)


def visible(v, wanted=True):
    """An upstream gradient for a statistic, none for a line with nothing visible."""
    return torch.rand_like(v).masked_fill_(v.isinf(), 0) if wanted else None


@given(
    problem=testing.problems(sizes=(3, 17, 65), scales=(0.0, 1.0, 14.3), geometries=("random", "paired", "clustered")),
    config=configs,
    want=st.sampled_from((Want(True, True), Want(True, False), Want(False, True))),
    need=st.sampled_from((Need(True, False, False), Need(False, True, False), Need(False, False, True), Need(1, 1, 1))),
    with_positive=st.booleans(),
)
@settings(max_examples=15)
def test_what_is_not_wanted_is_not_there(problem, config, want, need, with_positive):
    """One direction, frozen sides, absent gradients: what is asked for is unchanged, what is not is None."""
    pairs = pairs_of(build(problem, torch.float32))
    both = backends.load("torch").forward(pairs, Want(True, True))
    upstream = Lines(*(visible(v, w) for v, w in zip(both, (want.row, want.col, with_positive), strict=True)))
    with using(config):
        ours = backends.load("triton").forward(pairs, want)
    for value, whole, wanted in zip(ours, both, (want.row, want.col, True), strict=True):
        assert (value is not None) == wanted
        if wanted:
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, whole, rtol=1e-6, atol=1e-5)
    if not any(v is not None for v in upstream):
        return
    expected = backends.load("torch").backward(pairs, both, upstream, need)
    with using(config):
        gradients = backends.load("triton").backward(pairs, both, upstream, need)
    for value, whole, needed in zip(gradients, expected, need, strict=True):
        assert (value is not None) == (whole is not None) == bool(needed)
        if needed:
            torch.testing.assert_close(value, whole, rtol=2e-4, atol=2e-4 * float(whole.abs().max()) + 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [16, 33])  # as it is, and padded
def test_gradients_in_float32_of_half_precision(dtype, d):
    lhs, rhs = (torch.randn(n, d, device=DEVICE).to(dtype) for n in (17, 65))
    assert_rounded_last(backends.load("triton"), lhs, rhs)


def in_one_pass(batch, by_row):
    """[row or col, positive, gradients] by the backend itself, for the upstream gradients of `testing.value_and_gradients`."""
    pairs = pairs_of(batch)
    g = torch.Generator().manual_seed(0)
    g_line = torch.rand(pairs.n if by_row else pairs.m, generator=g, dtype=torch.float64).to(DEVICE)
    g_positive = torch.rand((pairs.n, pairs.positives), generator=g, dtype=torch.float64).to(DEVICE)
    row, col, _ = backends.load("torch").forward(pairs, Want(True, True))
    g_line = g_line.masked_fill((row if by_row else col).isinf(), 0)
    upstream = Lines(g_line if by_row else None, None if by_row else g_line, g_positive)
    lines, gradients = backends.load("triton").forward_with_gradient(pairs, upstream, Need(True, True, True))
    line, other = (lines.row, lines.col) if by_row else (lines.col, lines.row)
    assert other is None
    labels = batch.options.get("labels")
    positive = lines.positive.reshape((pairs.n,) if labels is None else labels.shape)
    return [line.float(), positive.float(), *gradients]


@given(
    problem=testing.problems(sizes=(1, 2, 16, 17, 65), terms=True, scales=(1.0, 14.3, 100.0, -10.0)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    config=configs,
    by_row=st.booleans(),
    budget=st.sampled_from((None, 2**14)),
)
@settings(max_examples=max(1, settings.default.max_examples // 2))
def test_one_direction_in_one_pass_is_as_accurate(problem, dtype, config, by_row, budget):
    batch = build(problem, dtype)
    with using(config, budget):
        actual = in_one_pass(batch, by_row)
    assert_line_accurate(actual, batch, by_row)


def assert_line_accurate(actual, batch, by_row):
    line = "row" if by_row else "col"
    outputs = {"outputs": lambda out: (getattr(out, line), out.positive)}
    assert_accurate(actual, batch, names=(line, "positive", *NAMES[3:]), **outputs)


@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs", "rhs_to_lhs"])
@pytest.mark.parametrize("hidden", [[3, 30], range(50)], ids=["two", "all"])
def test_a_bias_of_minus_infinity_hides_a_column(directions, hidden):
    """Also where gradients are formed in one pass, whose references are bounds of the logits."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 16, generator=g).to(DEVICE).requires_grad_() for n in (40, 50))
    bias = torch.zeros(50, device=DEVICE)
    bias[list(hidden)] = -math.inf
    labels = torch.full((40,), -1, device=DEVICE) if len(hidden) == 50 else torch.arange(40, device=DEVICE).clamp(4, 29)
    options = {"labels": labels, "rhs_bias": bias, "directions": directions}
    results = [
        torch.autograd.grad(gcl_loss(x, y, 3.0, backend=backend, **options), (x, y)) for backend in ("triton", "torch")
    ]
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("want", [Want(True, True), Want(True, False), Want(False, True)])
def test_a_pair_hidden_in_the_forward_alone_is_worth_at_most_a_softmax_of_two(want):
    """What a rounding may do at a limit: statistics that do not know a pair 90 nats above all others of its lines."""
    n = 24
    x = torch.eye(n, device=DEVICE)
    labels = torch.arange(n, device=DEVICE).roll(1)
    hiding, showing = (
        Pairs.of(x, x, 90.0, labels=labels, lhs_limit=torch.full((n,), v, device=DEVICE)) for v in (0.5, 2.0)
    )
    statistics = backends.load("triton").forward(hiding, want)
    g = torch.ones(n, dtype=torch.float64, device=DEVICE)
    upstream = Lines(g if want.row else None, g if want.col else None, torch.zeros_like(g)[:, None])
    dlhs, drhs, _ = backends.load("triton").backward(showing, statistics, upstream, Need(True, True, True))
    assert 90 <= dlhs.abs().max() <= 90 * 4.01
    assert 90 <= drhs.abs().max() <= 90 * 4.01


@pytest.mark.parametrize("directions", ["lhs_to_rhs", "rhs_to_lhs"])
def test_positives_apart_in_one_pass(directions):
    """A loss that is linear in the statistics of negatives alone, whose gradients are formed beside them."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 16, generator=g).to(DEVICE).requires_grad_() for n in (40, 50))
    w = torch.rand(40, generator=g).to(DEVICE)
    by_row = directions == "lhs_to_rhs"
    line = w if by_row else torch.rand(50, generator=g).to(DEVICE)
    known = PairwiseLSE(line if by_row else None, None if by_row else line, -w)
    gradients = []
    for given_known in (known, None):
        out = triton(x, y, 3.0, directions=directions, positives="apart", known_upstream=given_known)
        loss = (line * (out.row if by_row else out.col)).sum() - (w * out.positive).sum()
        gradients.append(torch.autograd.grad(loss, (x, y)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


SMALL = [c for c in configurations() if max(c.forward.sides) < 128 and not c.forward.one_exponential]


@pytest.mark.parametrize("positives", [None, 2])
@pytest.mark.parametrize("config", SMALL[:: len(SMALL) - 1], ids=["descriptors", "pointers"])
def test_chunks_on_every_side(config, positives):
    """A workspace of one tile: several chunks of rows and of columns, each with its part of labels, ids and lines."""
    batch = build(testing.Problem(97, 97, 16, positives, 2, 20, 5.0, "random", False, 0), torch.float32)
    with using(config, 2**9):
        actual = run(triton, batch)
        in_lines = {by_row: in_one_pass(batch, by_row) for by_row in (True, False)}
    assert_accurate(actual, batch)
    for by_row, got in in_lines.items():
        assert_line_accurate(got, batch, by_row)


@pytest.mark.parametrize("by_row", [True, False])
def test_more_tiles_in_a_line_than_one_step_of_the_merge_takes(by_row):
    """Every real batch has them. Logits rise along the line, so that each step rescales what came before."""
    g = torch.Generator().manual_seed(0)
    short, long = torch.randn(3, 8, generator=g), torch.randn(2300, 8, generator=g)
    long *= torch.linspace(0.1, 4, 2300)[:, None]
    lhs, rhs = (short, long) if by_row else (long, short)
    options = {"labels": torch.full((len(lhs),), -1, device=DEVICE)}
    scale = torch.tensor(3.0, device=DEVICE)
    batch = testing.Batch(*(x.to(DEVICE).requires_grad_() for x in (lhs, rhs, scale)), options)
    tile = TileShape(32, 64, 16, 4, 2)
    with using(Config(tile, tile, tile, tile)):
        actual = run(triton, batch)
    assert_accurate(actual, batch)


@given(seed=st.integers(0, 99), directions=st.sampled_from(("lhs_to_rhs", "rhs_to_lhs")))
@settings(max_examples=2)
def test_positives_beyond_the_first_step_of_rows(seed, directions):
    """`one_pass` adds the positives of 4,096 rows at a time."""
    g = torch.Generator().manual_seed(seed)
    n, m = 4200, 40
    inputs = [torch.randn(k, 4, generator=g).to(DEVICE).requires_grad_() for k in (n, m)]
    options = {"labels": torch.randint(-1, m, (n, 2), generator=g).to(DEVICE), "directions": directions}
    batch = testing.Batch(*inputs, torch.tensor(1.5, device=DEVICE).requires_grad_(), options)
    tile = TileShape(128, 64, 16, 4, 2)
    with using(Config(tile, tile, tile, tile)):
        actual = run(gcl_loss, batch, backend="triton")
    assert_accurate(actual, batch, reference.gcl_loss, names=LOSS_NAMES)


@given(problem=testing.problems(sizes=(17, 65)), config=configs)
@settings(max_examples=2)
def test_same_inputs_same_bits(problem, config):
    with using(config, 2**14):
        first, second = (run(triton, build(problem, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [70, 90])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_plain_loss_of_default_labels(weighted, reduction, m, dtype):
    """The path of few launches: loss and its gradients by kernels over lines."""
    problem = testing.Problem(70, m, 24, None, 0, 1, 20.0, "paired", strided=False, seed=3)
    batch = build(problem, dtype)
    options = {"reduction": reduction}
    if weighted:
        options["weights"] = torch.linspace(0, 3, 70, device=DEVICE)
    actual = run(gcl_loss, batch, backend="triton", **options)
    assert_accurate(actual, batch, reference.gcl_loss, names=LOSS_NAMES, **options)


def test_the_plain_loss_compiles_to_one_graph_and_refuses_a_second_derivative():
    x, y = (torch.randn(20, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    inputs = x, y, torch.tensor(5.0, device=DEVICE, requires_grad=True)
    weights = torch.rand(20, device=DEVICE)

    def loss(*inputs):
        return gcl_loss(*inputs, weights=weights, backend="triton")

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    assert all(map(torch.equal, torch.autograd.grad(compiled(*inputs), inputs), expected))
    torch.compiler.reset()
    first = torch.autograd.grad(loss(*inputs), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        first.sum().backward()
