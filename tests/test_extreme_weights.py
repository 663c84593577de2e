"""Weights as small and as large as a float holds: the gradient is the one of weights near 1, scaled."""

import itertools

import pytest
import torch
from gcl_kernels.reference import gcl_loss as dense_loss

from gcl_kernels import backends, gcl_loss, ops, testing

N, M = 24, 27
g = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 5, generator=g, dtype=torch.float64), torch.randn(M, 5, generator=g, dtype=torch.float64)
WEIGHTS = torch.rand(N, generator=g, dtype=torch.float64) + 1
WEIGHTS[::3] = 0

TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float64, torch.float32)}
CASES = [
    *((torch.float64, torch.float64, m) for m in (TINY[torch.float64], 1e-160, 1e-154, 1e160, 1e300)),
    *((torch.float64, torch.float32, m) for m in (1e-160, TINY[torch.float32], 1e-30, 1e35)),
    *((torch.float32, torch.float32, m) for m in (TINY[torch.float32], 1e-23, 1e35)),
    *((torch.float32, torch.bfloat16, m) for m in (TINY[torch.float32], 1e35)),
]


def results(loss, dtype, weights, options):
    """(loss, gradients) of inputs in a dtype."""
    kind = torch.promote_types(dtype, torch.float32)
    inputs = [x.to(dtype).requires_grad_() for x in (X, Y)] + [torch.tensor(2.0, dtype=kind, requires_grad=True)]
    value = loss(*inputs, weights=weights, **options).sum()
    return [value.detach(), *torch.autograd.grad(value, inputs)]


@pytest.mark.parametrize(("of_weights", "dtype", "size"), CASES)
@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs", "rhs_to_lhs"])
def test_gradients_scale_with_the_weights(of_weights, dtype, size, directions):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for reduction, extra in itertools.product(
        ("mean", "sum", "weighted_mean", "none"), ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1})
    ):
        options = {"directions": directions, "reduction": reduction, **extra}
        actual = results(gcl_loss, dtype, (WEIGHTS * size).to(of_weights), options)
        expected = results(dense_loss, torch.float64, WEIGHTS, options)
        for a, e in zip(actual, expected, strict=True):
            e = e if reduction == "weighted_mean" else e * size
            largest = e.abs().max()
            if largest < torch.finfo(a.dtype).tiny:
                continue  # the dtype itself cannot hold it
            # what is below the smallest normal number has fewer digits
            allowed = tolerance + 100 * torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps / float(largest)
            assert testing.relative_error(a.double() / largest, e / largest) < allowed, options


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", ["tiny", "max"])
@pytest.mark.parametrize("factor", [0.0, 1.0, 1e-3])
def test_the_common_factor_of_known_gradients(dtype, size, factor):
    """In the statistics' dtype, which is float32 on some devices."""
    known = WEIGHTS.to(dtype) / 2 * getattr(torch.finfo(dtype), size)
    actual = known * factor
    torch.testing.assert_close(
        ops._common_factor((None, None), (actual, known)), torch.tensor(factor, dtype=dtype), rtol=1e-4, atol=0
    )


def test_the_common_factor_of_zeros_is_zero():
    zeros = torch.zeros(5, dtype=torch.float64)
    assert ops._common_factor((zeros, zeros)) == 0


@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs", "rhs_to_lhs"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "weighted_mean"])
def test_weights_that_are_all_zero_have_no_gradient(directions, reduction):
    for gradient in results(
        gcl_loss, torch.float32, torch.zeros(N), {"directions": directions, "reduction": reduction}
    ):
        assert not gradient.any()


@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs", "rhs_to_lhs"])
@pytest.mark.parametrize("scale", [2.0**12, 2.0**16, 2.0**20])
def test_a_grad_scaler_lifts_gradients_in_float16_out_of_its_subnormals(directions, scale):
    def gradient(loss, dtype, factor):
        x = X.half().to(dtype).requires_grad_()
        value = loss(x, Y.half().to(dtype), 2.0, weights=1e-5 * WEIGHTS, directions=directions)
        return torch.autograd.grad(factor * value, x)[0].double() / factor

    expected = gradient(dense_loss, torch.float64, 1.0)
    assert expected.abs().max() < torch.finfo(torch.float16).tiny
    assert testing.relative_error(gradient(gcl_loss, torch.float16, scale), expected) < 1e-3


def test_small_upstream_gradients_are_lifted_for_float32_on_the_cpu_only_where_they_are_small():
    lines = backends.Lines(torch.tensor([1e-30, 0.0], dtype=torch.float64), None, None)
    lifted, norm = backends.upstream.normalized(lines, torch.float32)
    assert norm == 1e-30
    assert lifted.row.tolist() == [1, 0]
    for size in (0.0, 1e-3):
        assert backends.upstream.normalized(backends.Lines(lines.row * 0 + size, None, None), torch.float32)[1] is None
