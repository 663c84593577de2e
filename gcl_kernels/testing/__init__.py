"""For people who test their own losses: `check_loss`, the accuracy rule, and Hypothesis strategies.

`check_loss(my_loss)` holds a loss against a dense one, property by property, and prints a table. It needs torch alone.
`python -m gcl_kernels.testing module:function` does the same from the command line.

The strategies need `hypothesis`, and nothing else here does: `pip install "gcl_kernels[test]"`. They draw shapes, options and a
seed, never elements: a failing case shrinks to the smallest shape and prints as one line, and torch makes the numbers.
`assert_as_accurate` holds a fast implementation against the error that plain PyTorch makes in the same dtype, instead of a
hand-picked tolerance.

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

from typing import TYPE_CHECKING, Any

from .accuracy import (
    assert_as_accurate,
    dense_forms,
    floor,
    in_float64,
    relative_error,
    value_and_gradients,
)
from .conformance import check_loss
from .drawn import EDGE_DIMS, EDGE_SIZES, Batch, FieldProblem, PartsProblem, Problem
from .report import Report, Row

if TYPE_CHECKING:
    from .strategies import field_problems, loss_options, parts_problems, problems

__all__ = [
    "EDGE_DIMS",
    "EDGE_SIZES",
    "Batch",
    "FieldProblem",
    "PartsProblem",
    "Problem",
    "Report",
    "Row",
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


def __getattr__(name: str) -> Any:
    if name not in ("field_problems", "loss_options", "parts_problems", "problems"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import strategies
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ImportError(
            f'gcl_kernels.testing.{name}: expected the package hypothesis, got none: pip install "gcl_kernels[test]"'
        ) from None
    return getattr(strategies, name)
