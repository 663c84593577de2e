"""`multi_part_loss` beside the weighted sum of separate dense losses, and what its parts share, counted."""

import dataclasses
import math
from collections.abc import Mapping
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import (
    GCLLoss,
    Part,
    backends,
    gcl_loss,
    multi_part_loss,
    score_to_weight,
    sides,
    sigmoid_loss,
    testing,
)
from tests.counting import LargestTensor, counted_products


def leaves(parts, rhs):
    given = [part.lhs for part in parts.values()] + [rhs]
    return [x for side in given for x in (side.values() if isinstance(side, Mapping) else [side])]


def assert_the_reference_s(problem, dtype=torch.float64, bias=None, rtol=1e-12, **options):
    parts, rhs, more = problem.build(dtype)
    scale = torch.tensor(7.0, dtype=dtype, requires_grad=True)
    bias = None if bias is None else torch.tensor(bias, dtype=dtype, requires_grad=True)
    inputs = [*leaves(parts, rhs), scale, *([] if bias is None else [bias])]
    options = {**more, **options, "logit_bias": bias}
    actual = testing.value_and_gradients(lambda: multi_part_loss(parts, rhs, scale, **options), inputs)
    options.pop("backend", None)
    expected = testing.value_and_gradients(lambda: reference.multi_part_loss(parts, rhs, scale, **options), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, torch.nan_to_num(e), rtol=rtol, atol=rtol)


def checkable(problem):
    """Whether debug mode, which checks known gradients, takes it: it refuses rows without a field."""
    return not problem.fields and "f" not in "".join(problem.kinds)


@given(problem=testing.parts_problems(), options=testing.loss_options(), margin=st.sampled_from((None, 0.07)))
def test_is_the_sum_of_separate_losses(problem, options, margin):
    if options["reduction"] == "none":
        problem = dataclasses.replace(problem, rows=problem.rows[:1] * len(problem.rows))
    with backends.settings(tile=(7, 16), debug=checkable(problem)):
        assert_the_reference_s(problem, **options, false_negative_margin=margin)


@given(problem=testing.parts_problems(alike=True), reduction=st.sampled_from(("mean", "weighted_mean", "sum", "none")))
def test_is_the_sum_of_separate_sigmoid_losses(problem, reduction):
    with backends.settings(tile=(7, 16), debug=checkable(problem)):
        assert_the_reference_s(problem, bias=-2.0, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum", "none"])
def test_is_the_sum_of_separate_calls(reduction):
    """Of the library's own functions, weights by scores, one and both directions."""
    g = torch.Generator().manual_seed(0)
    title, colour, image = (torch.randn(9, 4, generator=g, dtype=torch.float64) for _ in range(3))
    scores = torch.randint(1, 101, (9,), generator=g)
    for directions in ("both", "lhs_to_rhs", "rhs_to_lhs"):
        options = {"directions": directions, "reduction": reduction}
        parts = {"title": Part(title, 0.7, score_to_weight("log")(scores)), "colour": Part(colour, 0.3)}
        expected = 0.7 * GCLLoss("log", **options)(title, image, scores, 5.0) + 0.3 * gcl_loss(
            colour, image, 5.0, **options
        )
        torch.testing.assert_close(multi_part_loss(parts, image, 5.0, **options), expected, rtol=1e-13, atol=0)
    expected = 0.7 * sigmoid_loss(title, image, 5.0, -3.0, weights=parts["title"].weights, reduction=reduction)
    expected = expected + 0.3 * sigmoid_loss(colour, image, 5.0, -3.0, reduction=reduction)
    actual = multi_part_loss(parts, image, 5.0, logit_bias=-3.0, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("bias", [None, -2.0])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum"])
def test_a_part_that_no_row_has_is_zero(bias, reduction):
    lhs = torch.full((4, 3), math.nan, requires_grad=True)
    rhs = torch.randn(4, 3, requires_grad=True)
    part = Part(lhs, present=torch.zeros(4, dtype=torch.bool), weights=torch.full((4,), math.nan))
    loss = multi_part_loss({"none": part}, rhs, 2.0, logit_bias=bias, reduction=reduction)
    loss.backward()
    assert loss == 0
    assert not lhs.grad.any()
    assert not rhs.grad.any()


def test_debug_mode_takes_rows_without_a_part():
    """It refuses rows whose fields have no direction, which is no fault of those that are absent."""
    x = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [0.0, 1.0]])
    present = torch.tensor([True, False, True])
    with backends.settings(debug=True):
        part = Part({"a": 3 * x, "b": x}, present=present, labels=torch.tensor([0, 0, 1]))
        actual = multi_part_loss({"part": part}, x[present].flip(0), 2.0)
    torch.testing.assert_close(actual, gcl_loss({"a": x[present]}, x[present].flip(0), 2.0))


def test_documents_are_aggregated_once():
    rhs = {"image": torch.randn(6, 4), "title": torch.randn(6, 4)}
    parts = {str(k): Part(torch.randn(6, 4)) for k in range(7)}
    with mock.patch.object(sides, "aggregate_fields", wraps=sides.aggregate_fields) as aggregate:
        multi_part_loss(parts, rhs, 2.0)
    assert aggregate.call_count == 1


@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs"])
def test_operations_are_the_sum_of_the_parts_and_memory_is_the_largest_part_s(directions):
    d, m = 8, 64
    rhs = torch.randn(m, d, requires_grad=True)
    parts = {str(n): Part(torch.randn(n, d, requires_grad=True)) for n in (64, 40, 16)}

    def cost(function):
        with counted_products() as flops, LargestTensor() as largest, backends.settings(tile=(16, 16)):
            function().backward()
        return sum(flops), largest.nbytes

    alone = [cost(lambda part=part: gcl_loss(part.lhs, rhs, 2.0, directions=directions)) for part in parts.values()]
    flops, nbytes = cost(lambda: multi_part_loss(parts, rhs, 2.0, directions=directions))
    assert flops == sum(own for own, _ in alone) > 0
    assert nbytes <= max(own for _, own in alone)


X, Y = torch.randn(4, 3), torch.randn(5, 3)
HAS = torch.ones(4, dtype=torch.bool)
WRONG = {
    "a list": ([Part(X)], {}, TypeError, "parts: expected a mapping of names to Part, got list"),
    "none": ({}, {}, ValueError, "parts: expected at least one, got none"),
    "a tensor": ({"a": X}, {}, TypeError, "parts[a]: expected a Part, got Tensor"),
    "share": ({"a": Part(X, -1.0)}, {}, ValueError, "parts[a]: share: expected a number >= 0, got -1.0"),
    "lhs": ({"a": Part([1])}, {}, TypeError, "parts[a]: lhs: expected"),
    "present": ({"b": Part(X), "a": Part(X, present=HAS[:3])}, {}, ValueError, "parts[a]: present: expected shape (4,)"),
    "present's dtype": ({"a": Part(X, present=HAS.int())}, {}, TypeError, "parts[a]: present: expected dtype"),
    "labels": ({"b": Part(X), "a": Part(X, labels=torch.arange(4) + 2)}, {}, ValueError, "parts[a]: labels: expected columns"),
    "weights": ({"a": Part(X, weights=torch.ones(3))}, {}, ValueError, "parts[a]: weights: expected shape (4,)"),
    "N > M": ({"a": Part(torch.randn(6, 3))}, {}, ValueError, "parts[a]: labels: expected labels for M < N"),
    "none of two sizes": ({"a": Part(X), "b": Part(Y)}, {"reduction": "none"}, ValueError, "reduction: expected parts"),
    "reduction": ({"a": Part(X)}, {"reduction": "max"}, ValueError, "reduction: expected one of"),
    "sigmoid": ({"a": Part(X)}, {"logit_bias": 1.0, "z_loss": 0.1}, ValueError, "logit_bias: expected None beside"),
    "bias": ({"a": Part(X)}, {"logit_bias": math.nan}, ValueError, "logit_bias: expected a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    parts, options, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        multi_part_loss(parts, Y, 2.0, **options)
    assert message in str(caught.value)


def test_compiled_as_one_graph():
    x, z, y = (torch.randn(6, 4, requires_grad=True) for _ in range(3))

    def loss(x, z, y):
        return multi_part_loss({"title": Part(x), "colour": Part(z, 0.5, present=torch.arange(6) > 1)}, y, 3.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, z, y), loss(x, z, y))


@settings(max_examples=settings.default.max_examples // 3)
@given(problem=testing.parts_problems(), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_lower_precision(problem, dtype):
    """As near to float64 as the sum of the library's separate losses is held to be."""
    parts, rhs, more = problem.build(dtype)
    loss = multi_part_loss(parts, rhs, 7.0, **more)
    wide = {name: dataclasses.replace(part, lhs=double(part.lhs)) for name, part in parts.items()}
    expected = reference.multi_part_loss(wide, double(rhs), 7.0, **more)
    assert loss.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)


def double(side):
    return {k: x.detach().double() for k, x in side.items()} if isinstance(side, Mapping) else side.detach().double()
