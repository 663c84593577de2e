"""The loss of each row for one pair of sides, and what the sum over rows is divided by."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import distributed
from .backends import Lines, Want, statistics_dtype
from .false_negatives import FalseNegatives
from .lse import statistics
from .pairs import Pairs

Present = tuple[Tensor | None, Tensor | None]  # bool, rows of lhs and of rhs that have their field; None: all


@dataclass(frozen=True)
class RowLoss:
    """The options of the loss of a row."""

    lhs_to_rhs: float  # weight of this direction; the other has the rest
    label_smoothing: float
    z_loss: float
    false_negatives: FalseNegatives


def leave_out_absent(pairs: Pairs, present: Present, ranks: distributed.Ranks | None) -> Pairs:
    """With labels and ids under which rows and columns without the field are neither positives nor negatives.

    Two more id channels say it. In one every row carries id 0 and so does every absent column (other columns -1, which
    equals nothing). In the other it is the rows' turn.
    """
    has_x, has_y = present
    if has_x is None and has_y is None:
        return pairs
    device = pairs.lhs.device
    has_x = torch.ones(pairs.n, dtype=torch.bool, device=device) if has_x is None else has_x
    has_y = torch.ones(pairs.m, dtype=torch.bool, device=device) if has_y is None else has_y
    zero_if_absent = [torch.where(has, -1, 0) for has in (has_x, has_y)]
    lhs_channels = torch.stack([torch.zeros_like(zero_if_absent[0]), zero_if_absent[0]], dim=1)
    rhs_channels = torch.stack([zero_if_absent[1], torch.zeros_like(zero_if_absent[1])], dim=1)
    if pairs.lhs_ids is not None and pairs.rhs_ids is not None:
        lhs_channels = torch.cat([pairs.lhs_ids, lhs_channels], dim=1)
        rhs_channels = torch.cat([pairs.rhs_ids, rhs_channels], dim=1)
    labels = pairs.labels
    if labels is None:
        labels = torch.arange(pairs.n, device=device)[:, None] + (0 if ranks is None else ranks.first_column)
    if ranks is not None:
        has_y = ranks.all_columns(has_y)
    has_positive = has_y[labels.clamp(min=0)] & has_x[:, None]
    labels = torch.where(has_positive, labels, -1)
    return replace(pairs, labels=labels, lhs_ids=lhs_channels, rhs_ids=rhs_channels)


@dataclass(frozen=True)
class Rows:
    """A pair of sides whose loss needs its statistics and nothing else."""

    pairs: Pairs
    present: Present
    column: Tensor | None  # labels, 0 for none
    weights: Tensor  # (N, P), 0 beside label -1
    options: RowLoss
    known: Lines | None  # `known_upstream` of `lse.statistics`

    @property
    def want(self) -> Want:
        a = self.options.lhs_to_rhs
        return Want(a > 0, a < 1)


def row_losses(
    pairs: Pairs,
    present: Present,
    weights: Tensor | None,
    options: RowLoss,
    factor: Tensor | float | None,
    ranks: distributed.Ranks | None,
    backend: str | None,
) -> Tensor:
    """(N,) l_i of one pair of sides, in the statistics' dtype.

    `factor`: what the caller multiplies their sum by, which makes their gradients known here; None if it does not add them up.
    """
    rows = prepared(pairs, present, weights, options, factor, ranks)
    return losses_of(rows, statistics(rows.pairs, rows.want, backend, known_upstream=rows.known, ranks=ranks), ranks)


def prepared(
    pairs: Pairs,
    present: Present,
    weights: Tensor | None,
    options: RowLoss,
    factor: Tensor | float | None,
    ranks: distributed.Ranks | None,
) -> Rows:
    pairs = options.false_negatives.hidden_in(leave_out_absent(pairs, present, ranks), ranks)
    labels, a, smoothing = pairs.labels, options.lhs_to_rhs, options.label_smoothing
    column = None if labels is None else labels.clamp(min=0)
    if weights is None:
        w = torch.ones((pairs.n, pairs.positives), device=pairs.lhs.device)
    else:
        w = weights.reshape(pairs.n, -1)
    if labels is not None:
        w = torch.where(labels >= 0, w, 0.0)
    known = None
    if factor is not None and options.z_loss == 0 and ranks is None:
        # sum_i w_i (lse - (1 - e) s_it + ...) is linear: its gradients are known before the logsumexp is
        g = w.detach().to(statistics_dtype(w.device)) * factor
        g_row = a * g.sum(dim=1) if a > 0 else None
        g_col = (1 - a) * _sum_by_column(g, column, pairs.m) if a < 1 else None
        known = Lines(g_row, g_col, (smoothing - 1) * g)
    return Rows(pairs, present, column, w, options, known)


def losses_of(rows: Rows, lines: tuple[Tensor, Tensor, Tensor], ranks: distributed.Ranks | None) -> Tensor:
    """(N,) l_i by the statistics of `rows.pairs`."""
    pairs, (has_x, has_y), column, w, options = rows.pairs, rows.present, rows.column, rows.weights, rows.options
    labels, a, smoothing = pairs.labels, options.lhs_to_rhs, options.label_smoothing
    row, col, positive = lines
    if pairs.hides:  # a line with nothing visible has no positive either: keep its -inf out of sums
        row, col = (v.masked_fill(v == -math.inf, 0.0) for v in (row, col))

    def direction(lse: Tensor, mean: Tensor | None) -> Tensor:
        loss = lse - positive
        if mean is not None:
            loss = (1 - smoothing) * loss + smoothing * (lse - mean)
        return loss + options.z_loss * lse**2 if options.z_loss else loss

    def at_labels(v: Tensor) -> Tensor:
        if column is None:
            return v[: pairs.n, None]
        return v[column] if ranks is None else ranks.all_columns(v)[column]

    loss = positive.new_zeros(())
    if a > 0:
        mean = None
        if smoothing:
            mean = pairs.logit_scale * _dot_mean(pairs.lhs, pairs.rhs, has_y, ranks)
            mean = (mean if pairs.rhs_bias is None else mean + _mean(pairs.rhs_bias, has_y, ranks))[:, None]
        loss = loss + a * direction(row[:, None], mean)
    if a < 1:
        mean = None
        if smoothing:
            mean = pairs.logit_scale * _dot_mean(pairs.rhs, pairs.lhs, has_x, ranks)
            mean = at_labels(mean if pairs.rhs_bias is None else mean + pairs.rhs_bias)
        loss = loss + (1 - a) * direction(at_labels(col), mean)
    loss = w.to(loss.dtype) * loss
    if labels is not None:
        loss = torch.where(labels >= 0, loss, 0.0)  # w = 0 is not enough: 0 * NaN is NaN
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
    return (x.to(compute) * _mean(y, present, ranks)).sum(dim=1)


def _mean(y: Tensor, present: Tensor | None, ranks: distributed.Ranks | None) -> Tensor:
    """(...) mean over the lines present of y (M, ...), over all ranks' lines; float32, or float64 for float64."""
    compute = torch.promote_types(y.dtype, torch.float32)
    if present is not None and y.ndim == 1:
        y = torch.where(present, y, 0.0)  # an embedding that is absent is zero as it is
    total = y.sum(dim=0, dtype=compute)
    count = total.new_full((), y.shape[0]) if present is None else present.sum().to(compute)
    if ranks is not None:
        total, count = ranks.total(total), ranks.total(count)
    return total / count.clamp(min=1)


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
