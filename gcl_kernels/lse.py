"""``pairwise_logsumexp``: the one differentiable operation everything else is composed from.

This file validates, picks a backend and holds the one autograd rule; the arithmetic is in ``backends``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import backends, distributed
from .validation import check_ids, check_labels, check_pair, check_scale, debug

if TYPE_CHECKING:  # some builds of torch have no distributed
    from torch.distributed import ProcessGroup


class PairwiseLSE(NamedTuple):
    """Result of :func:`pairwise_logsumexp`: float32 (float64 for float64 inputs), differentiable."""

    row: Tensor  # (N,) logsumexp of row i over the columns it sees; -inf if none
    col: Tensor  # (M,) logsumexp of column j over the rows it sees; -inf if none
    positive: Tensor  # shaped as labels: s[i, t_i]; 0 for label -1


def pairwise_logsumexp(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    lhs_ids: Tensor | None = None,
    rhs_ids: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    transport: str = "all_gather",
    backend: str | None = None,
) -> PairwiseLSE:
    """Row and column logsumexp of ``s = logit_scale * lhs @ rhs.T`` and the positives' logits, without the N x M matrix.

    ``row_i = logsumexp_j s_ij``, ``col_j = logsumexp_i s_ij``, ``positive_i = s[i, t_i]``, over the pairs that are visible.

    Args:
        lhs: (N, D) embeddings, float64, float32, bfloat16 or float16; used as given (normalise them first for CLIP).
        rhs: (M, D), same dtype and device.
        logit_scale: 1 / temperature; a float, or a tensor of one element, which may need a gradient.
        labels: (N,) or (N, P) integers: column of row i's positive(s), -1 for none. Default ``t_i = i``, needing M >= N.
        lhs_ids, rhs_ids: (N,) or (N, K) and (M,) or (M, K) int64. A pair with equal ids >= 0 in any channel k is a false
            negative and leaves both logsumexps, unless it is labelled.
        process_group: a ``torch.distributed`` group over which the problem is cut: every rank passes its own rows of lhs and
            rhs, in any numbers, with their ids, and gets its own row, col and positive back, over all ranks' columns and rows.
            The default label of row i is its rank's column i; ``labels`` count the columns of all ranks' rhs in rank order
            (``gcl_kernels.distributed.first_column``). Ids are compared across ranks. Every rank must call, and run the
            backward; gradients are those of the sum of all ranks' losses. ``torch.compile`` breaks its graph at the exchanges
            (``fullgraph=True`` is refused).
        transport: of rhs, ``"all_gather"`` (whole on every rank) or ``"ring"`` (one rank's rows at a time, while they are used).
        backend: ``"torch"``, ``"triton"`` or None, which takes Triton for CUDA/HIP tensors (float64 excepted) where
            it can be imported.

    Returns:
        PairwiseLSE(row (N,), col (M,), positive shaped as labels) in natural-log units. Gradients return in the input dtypes.

    A NaN or infinity in row i makes row_i and every column that sees it non-finite, exactly as dense arithmetic would:
    no result that depends on it comes out finite. Under autocast lhs and rhs are cast as ``torch.matmul`` would cast them.
    The backward needs 6 N M D multiply-adds-times-two on top of the forward's 2 and no N x M memory; it cannot be
    differentiated again.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Values (label range, ids) are checked
            on CPU tensors, elsewhere only with ``GCL_KERNELS_DEBUG=1`` since it synchronises the device. With a process
            group, on every rank, saying which rank's arguments were refused or differ.
        RuntimeError: another rank did not answer within the group's timeout.
    """
    ranks = None
    distributed.check_group(process_group, transport)
    if process_group is not None:
        with distributed.shared_failure(process_group):
            check_inputs(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, backend, distributed=True)
        ranks = distributed.agree(process_group, transport, lhs, rhs, logit_scale, labels, lhs_ids, {})
    row, col, positive = logsumexp_statistics(
        lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, ranks=ranks, backend=backend
    )
    kind = torch.float64 if lhs.dtype == torch.float64 else torch.float32
    shape = (lhs.shape[0],) if labels is None else labels.shape
    return PairwiseLSE(row.to(kind), col.to(kind), positive.reshape(shape).to(kind))


def logsumexp_statistics(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    *,
    want_row: bool = True,
    want_col: bool = True,
    promise: tuple[Tensor | None, Tensor | None, Tensor] | None = None,
    ranks: distributed.Ranks | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, col, positive (N, P)) in the statistics' dtype (``backends``), so that row - positive keeps its digits.

    A direction that is not wanted is an empty tensor and costs nothing, here or in the backward.

    ``promise``: a caller that knows its upstream gradients up to one common factor gives them here, of row, col (None where
    not wanted) and positive (N, P). Where that saves work (``backends.gradient_in_one_pass``) the gradients are then formed
    beside the logsumexp, from the same logits, and handed on, times the factor, in place; by a factor of one they are not rounded
    again. The promise must hold: the backward reads nothing but the factor (``GCL_KERNELS_DEBUG=1`` checks it).

    ``ranks``: the problem is cut over a process group whose ranks have agreed; row, col and positive are this rank's. A
    promise saves nothing there, since col is known only once all ranks are done.
    """
    lhs, rhs, scale, name = check_inputs(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, backend, ranks is not None)
    if labels is not None:
        labels = labels.reshape(lhs.shape[0], -1).to(torch.int64)
    if lhs_ids is not None and rhs_ids is not None:
        lhs_ids, rhs_ids = lhs_ids.reshape(lhs.shape[0], -1), rhs_ids.reshape(rhs.shape[0], -1)
    if ranks is not None:
        return distributed.statistics(lhs, rhs, scale, labels, lhs_ids, rhs_ids, (want_row, want_col), name, ranks)
    need = [torch.is_grad_enabled() and x.requires_grad for x in (lhs, rhs, scale)]
    g_row = g_col = g_positive = None
    n, m = lhs.shape[0], rhs.shape[0]
    one_pass = backends.gradient_in_one_pass(name, n, m, want_row and want_col, lhs.device, lhs.dtype)
    if promise is not None and any(need) and one_pass:
        g_row, g_col, g_positive = (None if g is None else g.detach() for g in promise)
    return _forward(
        lhs, rhs, scale, labels, lhs_ids, rhs_ids, [want_row, want_col], g_row, g_col, g_positive, need, name
    )[:3]


def check_inputs(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    backend: str | None,
    distributed: bool,
) -> tuple[Tensor, Tensor, Tensor, str]:
    """(lhs, rhs, logit_scale, backend's name) as the operator takes them."""
    check_pair(lhs, rhs)
    check_labels(labels, lhs, rhs, distributed)
    check_ids(lhs_ids, rhs_ids, lhs, rhs)
    lhs, rhs = autocast_like_matmul(lhs, rhs)
    return lhs, rhs, check_scale(logit_scale, lhs), backends.choose(backend, lhs.device, lhs.dtype)


def autocast_like_matmul(lhs: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    device = lhs.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (lhs.dtype, rhs.dtype):
        dtype = torch.get_autocast_dtype(device)
        return lhs.to(dtype), rhs.to(dtype)
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"rhs: expected the dtype of lhs, {lhs.dtype}, got {rhs.dtype}")
    return lhs, rhs


# The autograd rule, as custom operators so that torch.compile sees one node and never the tiles inside.


@torch.library.custom_op("gcl_kernels::pairwise_logsumexp", mutates_args=())
def _forward(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    want: Sequence[bool],
    g_row: Tensor | None,
    g_col: Tensor | None,
    g_positive: Tensor | None,
    need: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row, col, positive), and the promised gradients (dlhs, drhs, dscale), empty without a promise."""
    module = backends.load(backend)
    inputs = lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids
    if g_positive is not None:
        return module.forward_with_gradient(*inputs, g_row, g_col, g_positive, *need)
    row, col, positive = module.forward(*inputs, *want)
    return row, col, positive, lhs.new_empty(0), lhs.new_empty(0), lhs.new_empty(0)


@_forward.register_fake
def _(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, want, g_row, g_col, g_positive, need, backend):
    kind = backends.statistics_dtype(lhs.device)
    n, m, promised = lhs.shape[0], rhs.shape[0], g_positive is not None
    return (
        lhs.new_empty(n if want[0] else 0, dtype=kind),
        lhs.new_empty(m if want[1] else 0, dtype=kind),
        lhs.new_empty((n, 1 if labels is None else labels.shape[1]), dtype=kind),
        lhs.new_empty(lhs.shape if promised and need[0] else 0),
        lhs.new_empty(rhs.shape if promised and need[1] else 0),
        logit_scale.new_empty(() if promised and need[2] else 0) if promised else lhs.new_empty(0),
    )


@torch.library.custom_op("gcl_kernels::pairwise_logsumexp_backward", mutates_args=())
def _backward(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    row: Tensor,
    col: Tensor,
    positive: Tensor,
    g_row: Tensor | None,
    g_col: Tensor | None,
    g_positive: Tensor | None,
    need: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return backends.load(backend).backward(
        lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, row, col, positive, g_row, g_col, g_positive, *need
    )


@_backward.register_fake
def _(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, row, col, positive, g_row, g_col, g_positive, need, backend):
    return (
        lhs.new_empty(lhs.shape if need[0] else 0),
        rhs.new_empty(rhs.shape if need[1] else 0),
        logit_scale.new_empty(() if need[2] else 0),
    )


def _setup_context(ctx, inputs, output):
    lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, ctx.want, g_row, g_col, g_positive, ctx.need, ctx.backend = inputs
    row, col, positive, *gradients = output
    ctx.save_for_backward(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, g_row, g_col, g_positive, row, col, positive)
    ctx.gradients = [g.detach() for g in gradients]  # the outputs themselves would hold this ctx, and it them
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g_row, g_col, g_positive, *through_the_gradients):
    if any(g is not None and g.numel() for g in through_the_gradients):
        _refuse_double_backward(ctx)
    *inputs, promised_row, promised_col, promised_positive, row, col, positive = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    g_row = g_row if ctx.want[0] else None
    g_col = g_col if ctx.want[1] else None
    if promised_positive is None:
        gradients = _backward(*inputs, row, col, positive, g_row, g_col, g_positive, list(need), ctx.backend)
    else:
        # Given away, so that they need no copy. A second backward through a retained graph makes them again, to the same bits;
        # so does one that is to be differentiated itself, which those made again refuse.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():
            promise = promised_row, promised_col, promised_positive
            gradients = _forward(*inputs, ctx.want, *promise, ctx.need, ctx.backend)[3:]
        factor = _common_factor((g_row, promised_row), (g_col, promised_col))
        gradients = [g.mul_(factor.to(g.dtype)) for g in gradients]
    return (*(g if needed else None for g, needed in zip(gradients, need, strict=True)), *[None] * 9)


def _common_factor(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """k of actual = k * promised, of the first pair that has both; no number is read on the host."""
    factor = None
    for actual, promised in pairs:
        if actual is None or promised is None:
            continue
        if factor is None:
            square = (promised * promised).sum()
            factor = (actual * promised).sum() / torch.where(square > 0, square, 1.0)
        if debug() and not torch.allclose(actual, factor * promised, equal_nan=True):
            raise RuntimeError("logsumexp_statistics: expected gradients proportional to the promised ones, got others")
    assert factor is not None
    return factor


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "pairwise_logsumexp: expected one backward pass, got a second through its gradient; double backward is not "
        "supported (reference.pairwise_logsumexp can be differentiated any number of times)"
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_refuse_double_backward, setup_context=lambda ctx, inputs, output: None)
