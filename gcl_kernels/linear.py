"""The loss of lines in two launches, forward and backward, where Triton makes the statistics.

    sum_i w_i ((row_i + col_{t_i}) / 2 - positive_i), or its mean over rows, for at most one label a row; or of one direction

Everything else takes `row_losses`, whose plain PyTorch issues some 25 small operators a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .backends import Lines, Need, Want
from .derivatives import eager, refuse_double_backward
from .lse import statistics
from .ops import statistics_gradient
from .pairs import Pairs

# A direction takes 6 N M D where its gradient is formed with its statistics, 8 here. From this many logits on, as many as G's
# usual chunk, the 2 N M D take longer than the launches saved here: 0.7 ms at D = 768 and 600 TFLOP/s, for some 100 launches.
LARGEST_DIRECTION = 2**27


def takes(pairs: Pairs, weights: Tensor | None, directions: str, reduction: str, backend: str | None) -> bool:
    """Whether `loss` may be called for them, beside no smoothing, z-loss, ranks and absent fields."""
    return (
        pairs.positives == 1
        and reduction in ("mean", "sum")
        and (weights is None or not weights.requires_grad)
        and (directions == "both" or pairs.n * pairs.m <= LARGEST_DIRECTION)
        and _on_triton(backend, pairs.lhs.device, pairs.lhs.dtype)
    )


def _on_triton(backend: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    return backends.choose(backend, device, dtype) == "triton"


# As `choose_for_fields`: torch.compile cannot trace the import of Triton.
_on_triton._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def loss(pairs: Pairs, weights: Tensor | None, directions: str, reduction: str, backend: str | None) -> Tensor:
    """0-d float32."""
    want, mean = Want(directions != "rhs_to_lhs", directions != "lhs_to_rhs"), reduction == "mean"
    if weights is not None:
        weights = weights.detach().reshape(-1).contiguous()
    if eager(*pairs.differentiable):
        return _Whole.apply(pairs, weights, want, mean, *pairs.differentiable)
    row, col, positive = statistics(pairs, want, backend)
    return _loss_of_lines(row, col, positive, weights, pairs.labels, pairs.m, directions, mean)


class _Whole(torch.autograd.Function):
    """The operators without their dispatch, in one node."""

    @staticmethod
    def forward(ctx, pairs, weights, want, mean, *differentiable):
        loss, lines, plan = backends.load("triton").loss_of_pairs(pairs, weights, want, mean)
        ctx.save_for_backward(*lines, weights, *pairs.fields())
        ctx.options = want, mean, plan
        return loss

    @staticmethod
    def backward(ctx, g):
        row, col, positive, weights, *given = ctx.saved_tensors
        pairs, (want, mean, plan) = Pairs(*given), ctx.options
        lines, need = Lines(row, col, positive), Need(*ctx.needs_input_grad[4:])
        if torch.is_grad_enabled():  # the operators refuse a second derivative
            directions = "both" if want.both else "lhs_to_rhs" if want.row else "rhs_to_lhs"
            upstream = _spread(g, weights, pairs.labels, pairs.n, pairs.m, directions, mean)
            gradients = statistics_gradient(pairs, lines, Lines(*upstream), want, need, "triton")
        else:
            backward = backends.load("triton").loss_of_pairs_backward
            gradients = backward(g, pairs, weights, lines, need, mean, plan)
        return None, None, None, None, *gradients


def _run(
    row: Tensor,
    col: Tensor,
    positive: Tensor,
    weights: Tensor | None,
    labels: Tensor | None,
    m: int,
    directions: str,
    mean: bool,
) -> Tensor:
    lines = Lines(None if directions == "rhs_to_lhs" else row, None if directions == "lhs_to_rhs" else col, positive)
    return backends.load("triton").sum_losses(lines, weights, mean, torch.float32, labels)


_loss_of_lines = torch.library.custom_op("gcl_kernels::loss_of_lines", _run, mutates_args=())


@_loss_of_lines.register_fake
def _(row, col, positive, weights, labels, m, directions, mean):
    return positive.new_empty((), dtype=torch.float32)


def _run_spread(
    g: Tensor, weights: Tensor | None, labels: Tensor | None, n: int, m: int, directions: str, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    want = Want(directions != "rhs_to_lhs", directions != "lhs_to_rhs")
    lines = backends.load("triton").spread_gradient(g, weights, n, m, mean, want, labels)
    row, col, positive = (g.new_empty(0, dtype=torch.float64) if v is None else v for v in lines)
    return row, col, positive


_spread = torch.library.custom_op("gcl_kernels::loss_of_lines_backward", _run_spread, mutates_args=())


@_spread.register_fake
def _(g, weights, labels, n, m, directions, mean):
    shapes = (0 if directions == "rhs_to_lhs" else n,), (0 if directions == "lhs_to_rhs" else m,), (n, 1)
    return tuple(g.new_empty(shape, dtype=torch.float64) for shape in shapes)


def _setup_context(ctx, inputs, output):
    _, _, positive, weights, labels, m, directions, mean = inputs
    ctx.save_for_backward(weights, labels)
    ctx.options = positive.shape[0], m, directions, mean


def _differentiate(ctx, g):
    weights, labels = ctx.saved_tensors
    return *_spread(g, weights, labels, *ctx.options), *[None] * 5


_refuse_double_backward = refuse_double_backward(
    "gcl_loss", "(gcl_kernels.reference.gcl_loss can be differentiated any number of times)"
)
_loss_of_lines.register_autograd(_differentiate, setup_context=_setup_context)
_spread.register_autograd(_refuse_double_backward, setup_context=lambda ctx, inputs, output: None)
