"""`multi_part_loss` by the kernels: the sum of separate losses by the kernels, and as near to float64 as float32 is."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import Part, gcl_loss, multi_part_loss, sigmoid_loss, testing

from .conftest import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of logarithms of 0 that are meant


def leaves(parts, rhs):
    given = [part.lhs for part in parts.values()] + [rhs]
    return [x for side in given for x in (side.values() if isinstance(side, Mapping) else [side])]


@settings(max_examples=settings.default.max_examples // 4)
@given(
    problem=testing.parts_problems(sizes=(1, 5, 17), dims=(7, 16)),
    reduction=st.sampled_from(("mean", "weighted_mean", "sum")),
    directions=st.sampled_from(("both", "lhs_to_rhs", "rhs_to_lhs")),
    bias=st.sampled_from((None, -2.0)),
)
def test_is_the_reference_s(problem, reduction, directions, bias):
    options = {"reduction": reduction} | ({"directions": directions} if bias is None else {"logit_bias": bias})
    parts, rhs, more = problem.build(torch.float32, DEVICE)
    inputs = leaves(parts, rhs)
    actual = testing.value_and_gradients(
        lambda: multi_part_loss(parts, rhs, 7.0, **more, **options, backend="triton"), inputs
    )
    wide = {name: replace(part, lhs=double(part.lhs)) for name, part in parts.items()}
    exact = leaves(wide, double_rhs := double(rhs))
    expected = testing.value_and_gradients(
        lambda: reference.multi_part_loss(wide, double_rhs, 7.0, **more, **options), exact
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), torch.nan_to_num(e), rtol=2e-5, atol=2e-5)


def double(side):
    if isinstance(side, Mapping):
        return {name: double(x) for name, x in side.items()}
    return side.detach().double().requires_grad_()


@pytest.mark.parametrize("bias", [None, -2.0])
def test_is_the_sum_of_separate_calls(bias):
    g = torch.Generator().manual_seed(0)
    x, z, y = (torch.randn(20, 16, generator=g).to(DEVICE).requires_grad_() for _ in range(3))
    weights = torch.rand(20, generator=g).to(DEVICE)
    parts = {"x": Part(x, 0.5, weights=weights), "z": Part(z)}

    def separate():
        if bias is None:
            return 0.5 * gcl_loss(x, y, 5.0, weights=weights, backend="triton") + gcl_loss(z, y, 5.0, backend="triton")
        first = sigmoid_loss(x, y, 5.0, bias, weights=weights, backend="triton")
        return 0.5 * first + sigmoid_loss(z, y, 5.0, bias, backend="triton")

    expected = testing.value_and_gradients(separate, [x, z, y])
    actual = testing.value_and_gradients(
        lambda: multi_part_loss(parts, y, 5.0, logit_bias=bias, backend="triton"), [x, z, y]
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)
