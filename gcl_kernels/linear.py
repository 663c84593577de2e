"""The plain two-direction loss in two launches, forward and backward, where Triton makes the statistics.

    sum_i w_i ((row_i + col_i) / 2 - positive_i), or its mean over rows, for default labels

Everything else takes `row_losses`, whose plain PyTorch issues some 25 small operators a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .backends import Lines, Want
from .derivatives import eager, refuse_double_backward
from .lse import statistics
from .pairs import Pairs


def takes(pairs: Pairs, weights: Tensor | None, reduction: str, backend: str | None) -> bool:
    """Whether `loss` may be called for them, beside both directions, without smoothing, z-loss, ranks and absent fields."""
    return (
        pairs.labels is None
        and reduction in ("mean", "sum")
        and (weights is None or not weights.requires_grad)
        and _on_triton(backend, pairs.lhs.device, pairs.lhs.dtype)
    )


def _on_triton(backend: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    return backends.choose(backend, device, dtype) == "triton"


# As `choose_for_fields`: torch.compile cannot trace the import of Triton.
_on_triton._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def loss(pairs: Pairs, weights: Tensor | None, reduction: str, backend: str | None) -> Tensor:
    """0-d float32."""
    row, col, positive = statistics(pairs, Want(True, True), backend)
    if weights is not None:
        weights = weights.detach().contiguous()
    given = (row, col, positive, weights, reduction == "mean")
    return _Eager.apply(*given) if eager(row) else _loss_of_lines(*given)


def _run(row: Tensor, col: Tensor, positive: Tensor, weights: Tensor | None, mean: bool) -> Tensor:
    return backends.load("triton").sum_losses(Lines(row, col, positive), weights, mean, torch.float32)


_loss_of_lines = torch.library.custom_op("gcl_kernels::loss_of_lines", _run, mutates_args=())


@_loss_of_lines.register_fake
def _(row, col, positive, weights, mean):
    return row.new_empty((), dtype=torch.float32)


def _run_spread(g: Tensor, weights: Tensor | None, n: int, m: int, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    row, col, positive = backends.load("triton").spread_gradient(g, weights, n, m, mean)
    return row, col, positive


_spread = torch.library.custom_op("gcl_kernels::loss_of_lines_backward", _run_spread, mutates_args=())


@_spread.register_fake
def _(g, weights, n, m, mean):
    return tuple(g.new_empty(shape, dtype=torch.float64) for shape in ((n,), (m,), (n, 1)))


def _setup_context(ctx, inputs, output):
    row, col, _, weights, mean = inputs
    ctx.save_for_backward(weights)
    ctx.sizes = len(row), len(col), mean


def _differentiate(ctx, g):
    (weights,) = ctx.saved_tensors
    spread = _run_spread if not torch.is_grad_enabled() and eager(g) else _spread
    return *spread(g, weights, *ctx.sizes), None, None


class _Eager(torch.autograd.Function):
    """The operator without its dispatch."""

    @staticmethod
    def forward(ctx, *given):
        _setup_context(ctx, given, None)
        return _run(*given)

    @staticmethod
    def backward(ctx, g):
        return _differentiate(ctx, g)


_refuse_double_backward = refuse_double_backward(
    "gcl_loss", "(gcl_kernels.reference.gcl_loss can be differentiated any number of times)"
)
_loss_of_lines.register_autograd(_differentiate, setup_context=_setup_context)
_spread.register_autograd(_refuse_double_backward, setup_context=lambda ctx, inputs, output: None)
