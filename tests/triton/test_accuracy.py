"""pairwise_logsumexp by the kernels against the float64 reference, held to plain PyTorch's error in the same dtype."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcl_kernels import backends, pairwise_logsumexp, testing
from tests.test_lse import assert_rounded_last

from .common import DTYPES, NAMES, assert_as_accurate, build, configs, run, triton, use
from .conftest import DEVICE

# numpy says so when the interpreter meets the infinities and NaN that some of these tests feed it
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@given(
    problem=testing.problems(),
    dtype=st.sampled_from(DTYPES),
    config=configs,
    budget=st.sampled_from((None, 2**14, 2**16)),
)
@settings(max_examples=max(1, settings.default.max_examples // 2))
def test_as_accurate_as_dense_pytorch(problem, dtype, config, budget):
    batch = build(problem, dtype)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, config, budget)
        actual = run(triton, batch)
    assert [v.dtype for v in actual] == [torch.float32] * 3 + [dtype] * 2 + [torch.float32]
    assert_as_accurate(actual, problem, batch)


@given(problem=testing.problems(scales=(1.0, 14.3)), dtype=st.sampled_from(DTYPES), config=configs)
@settings(max_examples=8)
def test_follows_the_torch_backend(problem, dtype, config):
    """Both backends make the same statistics from the same numbers: float32 products in another order, nothing more."""
    batch = build(problem, dtype)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, config)
        actual = triton(*batch.differentiable, **batch.options)
    expected = pairwise_logsumexp(*batch.differentiable, backend="torch", **batch.options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-5)


@given(problem=testing.problems(sizes=(16, 17, 65), scales=(14.3, 100.0), ids=False), config=configs)
@settings(max_examples=6)
def test_a_positive_is_at_most_its_logsumexp(problem, config):
    """The positive comes from the same arithmetic: the loss of a row is not negative, up to one rounding."""
    batch = build(problem, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, config)
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
    with pytest.MonkeyPatch.context() as patch:
        use(patch, config)
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
        with pytest.MonkeyPatch.context() as patch:
            use(patch, config)
            (gradient,) = torch.autograd.grad(triton(lhs, rhs, 1.0).row.sum(), [lhs if side == "rhs" else rhs])
        assert gradient.isnan().any()


@given(
    problem=testing.problems(sizes=(3, 17, 65), scales=(0.0, 1.0, 14.3), geometries=("random", "paired", "clustered")),
    config=configs,
    want=st.sampled_from(((True, True), (True, False), (False, True))),
    need=st.sampled_from(((True, False, False), (False, True, False), (False, False, True), (True, True, True))),
    with_positive=st.booleans(),
)
@settings(max_examples=15)
def test_what_is_not_wanted_is_not_there(problem, config, want, need, with_positive):
    """One direction, frozen sides, absent gradients: what is asked for is unchanged, what is not is an empty tensor."""
    batch = build(problem, torch.float32)
    lhs, rhs, scale = (x.detach() for x in batch.differentiable)
    labels, left, right = (batch.options.get(k) for k in ("labels", "lhs_ids", "rhs_ids"))
    labels = None if labels is None else labels.reshape(problem.n, -1)
    if left is not None and right is not None:
        left, right = left.reshape(problem.n, -1), right.reshape(problem.m, -1)
    both = backends.load("torch").forward(lhs, rhs, scale, labels, left, right, True, True)
    g = [
        torch.rand_like(v).masked_fill_(v.isinf(), 0) if w else None
        for v, w in zip(both, (*want, with_positive), strict=True)
    ]
    ours = backends.load("triton").forward(lhs, rhs, scale, labels, left, right, *want, config)
    for value, whole, wanted in zip(ours, both, (*want, True), strict=True):
        assert value.dtype == torch.float64
        assert value.numel() == (whole.numel() if wanted else 0)
        if wanted:
            torch.testing.assert_close(value, whole, rtol=1e-6, atol=1e-5)
    if not any(v is not None for v in g):
        return
    arguments = (lhs, rhs, scale, labels, left, right, *both, *g, *need)
    expected = backends.load("torch").backward(*arguments)
    for value, whole, needed in zip(backends.load("triton").backward(*arguments, config), expected, need, strict=True):
        assert value.shape == whole.shape
        if needed:
            torch.testing.assert_close(value, whole, rtol=2e-4, atol=2e-4 * float(whole.abs().max()) + 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [16, 33])  # as it is, and padded
def test_gradients_in_float32_of_half_precision(dtype, d):
    lhs, rhs = (torch.randn(n, d, device=DEVICE).to(dtype) for n in (17, 65))
    assert_rounded_last(backends.load("triton"), lhs, rhs)


def in_one_pass(batch, by_row, config):
    """[row or col, positive, gradients] by the backend itself, for the upstream gradients of ``testing.value_and_gradients``."""
    lhs, rhs, scale = (x.detach() for x in batch.differentiable)
    labels, left, right = (batch.options.get(k) for k in ("labels", "lhs_ids", "rhs_ids"))
    shape = (len(lhs),) if labels is None else labels.shape
    labels, left, right = (None if v is None else v.reshape(len(v), -1) for v in (labels, left, right))
    g = torch.Generator().manual_seed(0)
    g_line = torch.rand(len(lhs if by_row else rhs), generator=g, dtype=torch.float64).to(DEVICE)
    g_positive = torch.rand(shape, generator=g, dtype=torch.float64).reshape(len(lhs), -1).to(DEVICE)
    row, col, _ = backends.load("torch").forward(lhs, rhs, scale, labels, left, right, True, True)
    g_line = g_line.masked_fill((row if by_row else col).isinf(), 0)
    upstream = (g_line, None, g_positive) if by_row else (None, g_line, g_positive)
    row, col, positive, *gradients = backends.load("triton").forward_with_gradient(
        lhs, rhs, scale, labels, left, right, *upstream, True, True, True, config
    )
    assert (col if by_row else row).numel() == 0
    return [(row if by_row else col).float(), positive.reshape(shape).float(), *gradients]


@given(
    problem=testing.problems(sizes=(1, 2, 16, 17, 65)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    config=configs,
    by_row=st.booleans(),
    budget=st.sampled_from((None, 2**14)),
)
@settings(max_examples=max(1, settings.default.max_examples // 2))
def test_one_direction_in_one_pass_is_as_accurate(problem, dtype, config, by_row, budget):
    batch = build(problem, dtype)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, config, budget)
        actual = in_one_pass(batch, by_row, config)
    line = "row" if by_row else "col"
    names = (line, "positive", *NAMES[3:])
    assert_as_accurate(actual, problem, batch, lambda out: (getattr(out, line), out.positive), names)


@given(problem=testing.problems(sizes=(17, 65)), config=configs)
@settings(max_examples=2)
def test_same_inputs_same_bits(problem, config):
    with pytest.MonkeyPatch.context() as patch:
        use(patch, config, 2**14)
        first, second = (run(triton, build(problem, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
