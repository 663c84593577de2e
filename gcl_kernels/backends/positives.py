"""The algebra of positives, shared by both backends. They stay out of the tiles' float32 sums and join their lines here.

Beside a well-trained row's positive, 1, float32 would round its negatives away, and they are its loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base2 import logsumexp2_
from .chunks import slices
from .contract import Lines
from .settings import may_read_on_host


def positive_entries(labels: Tensor | None, statistics: Lines, upstream: Lines, joined: bool) -> Tensor:
    """(N, P) entries of G at the labels, in the statistics' dtype: p - 1 is taken here, before anything is rounded.

    `joined`: positives are part of their lines.
    """
    (row, col, positive), (g_row, g_col, g_positive) = statistics, upstream
    assert positive is not None
    entry = None
    if joined and g_row is not None and row is not None:
        entry = (positive - row[:, None]).exp_().mul_(g_row[:, None])
    if joined and g_col is not None and col is not None:
        column = slice(len(positive)) if labels is None else labels.clamp(min=0).flatten()
        by_col = (positive.flatten() - col[column]).exp_().mul_(g_col[column]).view_as(positive)
        entry = by_col if entry is None else entry.add_(by_col)
    if entry is None:
        entry = torch.zeros_like(positive)
    if g_positive is None:
        return entry
    if labels is None:
        return entry + g_positive
    for q in range(labels.shape[1]):  # a column labelled twice in a row gets both gradients, in both entries
        entry += torch.where(labels == labels[:, q : q + 1], g_positive[:, q : q + 1], 0.0)
    return entry


def distinct_positives(labels: Tensor | None, positive: Tensor) -> Tensor:
    """positive (N, P) with -inf for label -1, and for a column its row labels twice, all but once."""
    if labels is None:
        return positive
    out = labels < 0
    for q in range(1, labels.shape[1]):
        out[:, q] |= (labels[:, :q] == labels[:, q : q + 1]).any(dim=1)
    return positive.masked_fill(out, -math.inf)


def positives_by_row(labels: Tensor | None, positive: Tensor) -> Tensor:
    """(N,) base-2 logsumexp of each row's positives (N, P); -inf where there is none."""
    visible = distinct_positives(labels, positive)
    return visible[:, 0] if visible.shape[1] == 1 else logsumexp2_(visible.clone(), 1)


def positives_by_column(labels: Tensor | None, positive: Tensor, m: int) -> Tensor:
    """(M,) base-2 logsumexp of each column's positives; -inf where there is none."""
    visible = distinct_positives(labels, positive)
    top = visible.new_full((m,), -math.inf)
    if labels is None:
        top[: len(visible)] = visible[:, 0]
        return top
    column, visible = labels.clamp(min=0).flatten().long(), visible.flatten()
    top.scatter_reduce_(0, column, visible, "amax")
    reference = top.masked_fill(top == -math.inf, 0.0)
    parts = torch.exp2(visible - reference[column])
    if may_read_on_host(top.device):  # a CPU, whose additions come in one order
        total = torch.zeros_like(top).index_add_(0, column, parts)
    else:
        # Elsewhere additions come in any order. Integers in units of 2^-40 add up to the same bits in every order. No
        # integer stands for a NaN, but where there is one, top is NaN as well.
        parts = (parts * 2.0**40).nan_to_num(0, 0, 0).to(torch.int64)
        total = torch.zeros_like(top, dtype=torch.int64).index_add_(0, column, parts).to(top.dtype) * 2.0**-40
    return top + total.log2()


def add_positives(
    entry: Tensor,
    labels: Tensor | None,
    sides: tuple[Tensor, Tensor],
    products: tuple[Tensor | None, Tensor | None],
) -> None:
    """What G's entries at the labels (N, P) add to both products, G rhs and G^T lhs, in the same order every time."""
    (lhs, rhs), (d_lhs, d_rhs) = sides, products
    wide = d_lhs if d_lhs is not None else d_rhs
    if wide is None:
        return
    entry = entry.to(wide.dtype)
    for rows in slices(len(lhs), 4096):
        x = lhs[rows]
        for position in range(entry.shape[1]):
            share = entry[rows, position, None]
            if labels is None:
                if d_lhs is not None:
                    d_lhs[rows] += share * rhs[rows]
                if d_rhs is not None:
                    d_rhs[rows] += share * x
                continue
            column = labels[rows, position].clamp(min=0)
            if d_lhs is not None:
                d_lhs[rows] += share * rhs[column]
            if d_rhs is not None:
                d_rhs.index_put_((column,), share * x, accumulate=True)
