"""The loss of each row for one pair of sides, and what the sum over rows is divided by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import distributed
from .backends import statistics_dtype
from .lse import logsumexp_statistics
from .validation import check_ids, check_labels, check_scale


def leave_out_absent(x, y, labels, lhs_ids, rhs_ids, has_x, has_y, ranks):
    """(labels, lhs_ids, rhs_ids) under which rows and columns without the field are neither positives nor negatives.

    Two more id channels say it: in one every row carries id 0 and so does every absent column (other columns -1, which
    equals nothing); in the other it is the rows' turn.
    """
    if has_x is None and has_y is None:
        return labels, lhs_ids, rhs_ids
    check_labels(labels, x, y, ranks is not None)
    check_ids(lhs_ids, rhs_ids, x, y)
    n, m = x.shape[0], y.shape[0]
    has_x = torch.ones(n, dtype=torch.bool, device=x.device) if has_x is None else has_x
    has_y = torch.ones(m, dtype=torch.bool, device=y.device) if has_y is None else has_y
    zero_if_absent = [torch.where(has, -1, 0) for has in (has_x, has_y)]
    lhs_channels = torch.stack([torch.zeros_like(zero_if_absent[0]), zero_if_absent[0]], dim=1)
    rhs_channels = torch.stack([zero_if_absent[1], torch.zeros_like(zero_if_absent[1])], dim=1)
    if lhs_ids is not None and rhs_ids is not None:
        lhs_channels = torch.cat([lhs_ids.reshape(n, -1), lhs_channels], dim=1)
        rhs_channels = torch.cat([rhs_ids.reshape(m, -1), rhs_channels], dim=1)
    if labels is None:
        labels = torch.arange(n, device=x.device) + (0 if ranks is None else ranks.first_column)
    if ranks is not None:
        has_y = ranks.all_columns(has_y)
    has_positive = has_y[labels.clamp(min=0)] & has_x.reshape(n, *[1] * (labels.ndim - 1))
    return torch.where(has_positive, labels, -1), lhs_channels, rhs_channels


def row_losses(
    x,
    y,
    logit_scale,
    weights,
    labels,
    lhs_ids,
    rhs_ids,
    has_x,
    has_y,
    a,
    label_smoothing,
    z_loss,
    factor,
    ranks,
    backend,
) -> Tensor:
    """(N,) l_i of one pair of sides, in the statistics' dtype. ``factor``: by which the caller adds them up, or None."""
    n, m = x.shape[0], y.shape[0]
    check_labels(labels, x, y, ranks is not None)
    labels = None if labels is None else labels.reshape(n, -1)
    column = None if labels is None else labels.clamp(min=0).to(torch.int64)
    w = torch.ones((n, 1) if labels is None else labels.shape, device=x.device) if weights is None else weights
    w = w.reshape(n, -1) if labels is None else torch.where(labels >= 0, w.reshape(n, -1), 0.0)
    promise = None
    if factor is not None and z_loss == 0 and ranks is None:
        # sum_i w_i (lse - (1 - e) s_it + ...) is linear: its gradients are known before the logsumexp is
        g = w.detach().to(statistics_dtype(x.device)) * factor
        g_row = a * g.sum(dim=1) if a > 0 else None
        g_col = (1 - a) * _sum_by_column(g, column, m) if a < 1 else None
        promise = g_row, g_col, (label_smoothing - 1) * g
    row, col, positive = logsumexp_statistics(
        x, y, logit_scale, labels, lhs_ids, rhs_ids,
        want_row=a > 0, want_col=a < 1, promise=promise, ranks=ranks, backend=backend,
    )  # fmt: skip
    if lhs_ids is not None:  # a line with nothing visible has no positive either: keep its -inf out of sums
        row, col = (v.masked_fill(v == -math.inf, 0.0) for v in (row, col))

    def direction(lse: Tensor, mean: Tensor | None) -> Tensor:
        loss = lse - positive
        if mean is not None:
            loss = (1 - label_smoothing) * loss + label_smoothing * (lse - mean)
        return loss + z_loss * lse**2 if z_loss else loss

    def at_labels(v: Tensor) -> Tensor:
        if column is None:
            return v[:n, None]
        return v[column] if ranks is None else ranks.all_columns(v)[column]

    scale = check_scale(logit_scale, x) if label_smoothing else None
    loss = positive.new_zeros(())
    if a > 0:
        mean = None if scale is None else scale * _dot_mean(x, y, has_y, ranks)[:, None]
        loss = loss + a * direction(row[:, None], mean)
    if a < 1:
        mean = None if scale is None else at_labels(scale * _dot_mean(y, x, has_x, ranks))
        loss = loss + (1 - a) * direction(at_labels(col), mean)
    loss = w.to(loss.dtype) * loss
    if labels is not None:
        loss = torch.where(labels >= 0, loss, 0.0)  # not 0 * NaN
    return loss.sum(dim=1)


def _sum_by_column(g: Tensor, column: Tensor | None, m: int) -> Tensor:
    """(M,) sum of g (N, P) over the labels that name each column, in a fixed order."""
    total = g.new_zeros(m)
    if column is None:
        total[: len(g)] = g[:, 0]
        return total
    return total.index_put((column,), g, accumulate=True)


def _dot_mean(x: Tensor, y: Tensor, present: Tensor | None, ranks: distributed.Ranks | None) -> Tensor:
    """mean_j <x_i, y_j> over the columns present (an absent one is a zero vector), from the mean vector: O((N + M) D)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    total = y.sum(dim=0, dtype=compute)
    count = total.new_full((), y.shape[0]) if present is None else present.sum().to(compute)
    if ranks is not None:
        total, count = ranks.total(total), ranks.total(count)
    return (x.to(compute) * (total / count.clamp(min=1))).sum(dim=1)


def denominator(
    weights: Tensor | None, labels: Tensor | None, x: Tensor, reduction: str, ranks: distributed.Ranks | None
) -> float | Tensor | None:
    """What the sum of this rank's l_i is divided by; None for reduction "none"."""
    if reduction == "none":
        return None
    if reduction == "sum":
        total = 1.0
    elif reduction == "mean":
        total = x.shape[0] if ranks is None else ranks.n
    else:
        total = _total_weight(weights, labels, x)
        total = total if ranks is None else ranks.total(total)
        total = torch.where(total > 0, total, 1.0)
    return total if ranks is None else total / ranks.world


def _total_weight(weights: Tensor | None, labels: Tensor | None, x: Tensor) -> Tensor:
    """Of the labelled entries, 0-d in the statistics' dtype."""
    kind = statistics_dtype(x.device)
    if weights is None:
        return x.new_full((), x.shape[0], dtype=kind) if labels is None else (labels >= 0).sum().to(kind)
    weights = weights.to(kind)
    return (weights if labels is None else torch.where(labels >= 0, weights, 0.0)).sum()
