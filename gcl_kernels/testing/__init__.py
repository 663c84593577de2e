"""For people who property-test their own losses: Hypothesis strategies and the accuracy rule. Needs `hypothesis`.

Strategies draw shapes, options and a seed, never elements: a failing case shrinks to the smallest shape and prints as one
line, and torch makes the numbers. `assert_as_accurate` holds a fast implementation against the error that plain PyTorch
makes in the same dtype, instead of a hand-picked tolerance.

    from hypothesis import given
    from gcl_kernels import testing

    @given(testing.problems())
    def test_my_loss(problem):
        batch = problem.build(torch.float32)
        actual = testing.value_and_gradients(lambda: my_loss(*batch.differentiable), batch.differentiable)
        dense = testing.dense_forms(my_dense_loss, batch.differentiable)
        exact = testing.in_float64(my_dense_loss, batch.differentiable)
        testing.assert_as_accurate(actual, dense, exact, floor=testing.floor(*batch.differentiable))
"""

from .accuracy import (
    assert_as_accurate,
    dense_forms,
    floor,
    in_float64,
    relative_error,
    value_and_gradients,
)
from .conformance import Report, check_loss
from .strategies import (
    EDGE_DIMS,
    EDGE_SIZES,
    Batch,
    FieldProblem,
    PartsProblem,
    Problem,
    field_problems,
    loss_options,
    parts_problems,
    problems,
)

__all__ = [
    "EDGE_DIMS",
    "EDGE_SIZES",
    "Batch",
    "FieldProblem",
    "PartsProblem",
    "Problem",
    "Report",
    "assert_as_accurate",
    "check_loss",
    "dense_forms",
    "field_problems",
    "floor",
    "in_float64",
    "loss_options",
    "parts_problems",
    "problems",
    "relative_error",
    "value_and_gradients",
]
