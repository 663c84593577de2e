"""The sigmoid loss by the kernels against the float64 reference, held to plain PyTorch's error in the same dtype."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import backends, pairwise_softplus, pointwise_ops, sigmoid_loss, testing
from gcl_kernels.backends.pointwise import PointwiseNeed, PointwiseUpstream
from gcl_kernels.backends.triton.config import Config, TileShape
from gcl_kernels.pairs import Pairs
from tests.oracle import DTYPES
from tests.sigmoid_oracle import LOSS_NAMES, SCALES, assert_accurate, biases, run, with_bias

from .common import build, cases, configs, using
from .conftest import DEVICE

# numpy says so when the interpreter meets the infinities that mark what is hidden
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

half_of_the_examples = settings(max_examples=max(1, settings.default.max_examples // 2))
dtypes, budgets = st.sampled_from(DTYPES), st.sampled_from((None, 2**9, 2**14))


@given(case=cases(terms=True, scales=SCALES), dtype=dtypes, bias=biases(), budget=budgets)
@half_of_the_examples
def test_the_primitive_is_as_accurate_as_dense_pytorch(case, dtype, bias, budget):
    config, problem = case
    batch = build(problem, dtype)
    inputs = with_bias(batch, bias)
    with using(config, budget):
        actual = run(pairwise_softplus, inputs, backend="triton", **batch.options)
    assert_accurate(actual, inputs, **batch.options)


@given(
    case=cases(terms=True, scales=SCALES),
    dtype=dtypes,
    bias=biases(),
    budget=budgets,
    reduction=st.sampled_from(("mean", "weighted_mean", "sum", "none")),
)
@half_of_the_examples
def test_the_loss_is_as_accurate_as_dense_pytorch(case, dtype, bias, budget, reduction):
    config, problem = case
    batch = build(problem, dtype)
    inputs = with_bias(batch, bias)
    labels = batch.options.get("labels", torch.empty(problem.n))
    g = torch.Generator().manual_seed(problem.seed)
    weights = 3 * torch.rand(labels.shape, generator=g).to(DEVICE)
    options = {**batch.options, "weights": weights, "reduction": reduction}
    with using(config, budget):
        actual = run(sigmoid_loss, inputs, backend="triton", **options)
    assert_accurate(actual, inputs, reference.sigmoid_loss, LOSS_NAMES, **options)


SQUARE = TileShape(32, 32, 16, 4, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", [None, 2])
def test_chunks_on_every_side(dtype, positives):
    """A workspace of one tile, several of which have a positive and are small or not."""
    problem = testing.Problem(97, 97, 16, positives, 2, 20, 5.0, "clustered", False, 0, True, True)
    batch = build(problem, dtype)
    inputs = with_bias(batch, -3.0)
    with using(Config(SQUARE, SQUARE, SQUARE, SQUARE), 2**9):
        actual = run(pairwise_softplus, inputs, backend="triton", **batch.options)
    assert_accurate(actual, inputs, **batch.options)


@pytest.mark.parametrize("bias", [-30.0, -2.78, -2.76, 0.0, 30.0])
def test_both_forms_are_exact(bias):
    """Small tiles and others, on both sides of where they part, without a product's rounding."""
    n = 64
    x, y = torch.zeros(n, 16, device=DEVICE, requires_grad=True), torch.zeros(n, 16, device=DEVICE)
    b = torch.tensor(bias, device=DEVICE, requires_grad=True)
    with using(Config(SQUARE, SQUARE, SQUARE, SQUARE)):
        row = pairwise_softplus(x, y, 1.0, b, backend="triton").row
        (dbias,) = torch.autograd.grad(row.sum(), b)
    z = torch.tensor(bias, dtype=torch.float64)
    expected = torch.nn.functional.softplus(z, threshold=50)
    torch.testing.assert_close(row.cpu(), ((n - 1) * expected).expand(n), rtol=1.5e-6, atol=0)
    torch.testing.assert_close(dbias.cpu().double(), n * (n - 1) * torch.sigmoid(z), rtol=1.5e-6, atol=0)


@given(
    problem=testing.problems(sizes=(3, 17, 65), scales=(1.0, 14.3), geometries=("random", "paired")),
    config=configs,
    need=st.sampled_from([PointwiseNeed(*(bool(k & bit) for bit in (1, 2, 4, 8))) for k in range(16)]),
)
@settings(max_examples=10)
def test_what_is_not_needed_is_not_there(problem, config, need):
    batch = build(problem, torch.float32)
    pairs = Pairs.of(*(x.detach() for x in batch.differentiable), **batch.options)
    bias = torch.tensor(-3.0, device=DEVICE)
    upstream = PointwiseUpstream(
        torch.rand(pairs.n, device=DEVICE), torch.rand(pairs.n, pairs.positives, device=DEVICE)
    )
    *_, expected = backends.load("torch").softplus(pairs, bias, upstream, need)
    with using(config):
        row, _, gradients = backends.load("triton").softplus(pairs, bias, upstream, need)
        assert torch.equal(row, backends.load("triton").softplus(pairs, bias, None, need)[0]) or max(need[:3])
    for value, whole, needed in zip(gradients, expected, need, strict=True):
        assert (value is not None) == (whole is not None) == needed
        if needed:
            torch.testing.assert_close(value, whole, rtol=2e-4, atol=2e-4 * float(whole.abs().max()) + 1e-5)


def test_same_inputs_same_bits():
    problem = testing.Problem(65, 70, 16, 3, 1, 20, 5.0, "random", False, 0)
    batch = build(problem, torch.bfloat16)
    first, second = (run(sigmoid_loss, with_bias(batch, -5.0), backend="triton", **batch.options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("known", [True, False])
def test_the_operator_passes_opcheck(known):
    lhs, rhs = (torch.randn(n, 16, device=DEVICE, requires_grad=True) for n in (5, 7))
    pairs = Pairs.of(lhs, rhs, torch.tensor(2.0, device=DEVICE))
    bias = torch.tensor(-3.0, device=DEVICE, requires_grad=True)
    ones = torch.ones(5, 1, dtype=torch.float64, device=DEVICE)
    g = (ones[:, 0], ones) if known else (None, None)
    call = pointwise_ops.Call(PointwiseNeed(True, True, False, True), True, "triton")
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        *["test_aot_dispatch_dynamic"] * (not known),
    )
    torch.library.opcheck(pointwise_ops._softplus, pointwise_ops.arguments(pairs, bias, *g, call), test_utils=tests)


def test_wide_tiles_are_stored_in_parts():
    tile = dataclasses.replace(SQUARE, cols=256)
    problem = testing.Problem(40, 300, 16, None, 0, 1, 5.0, "random", False, 0)
    for descriptors, parts in itertools.product((True, False), repeat=2):
        batch = build(problem, torch.float32)
        inputs = with_bias(batch, -6.0)
        with using(Config(tile, tile, tile, tile, descriptors, parts=parts)):
            actual = run(sigmoid_loss, inputs, backend="triton")
        assert_accurate(actual, inputs, reference.sigmoid_loss, LOSS_NAMES)
