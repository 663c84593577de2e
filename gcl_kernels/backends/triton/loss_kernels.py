"""Kernels of a loss that is linear in the statistics of lines (`linear`), forward and backward.

    sum_losses        row, col and positive  ->  sum or mean of every row's loss
    spread_gradient   its gradient  ->  those with respect to row, col and positive

Arithmetic is in float64, and every sum is in a fixed order. Names as in `tiles`.
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .line_kernels import load_labels, rows_of_columns


@triton.jit(do_not_specialize=["n"])
def sum_losses(lines, p_weight, p_labels, p_out, n, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum_i w_i ((row_i + col_{t_i}) / 2 - positive_i), or its mean, by one program.

    lines: row, col and positive; row or col is None for the other direction alone. p_weight is None for 1, p_labels for t_i = i.
    """
    SHARE: tl.constexpr = 0.5 if lines[0] is not None and lines[1] is not None else 1.0
    b_sum = tl.zeros((BLOCK,), tl.float64)
    for i_first in range(0, n, BLOCK):
        o_row = i_first + tl.arange(0, BLOCK)
        m_row = o_row < n
        b_label = load_labels(p_labels, o_row, m_row)
        m_label = b_label >= 0
        b_positive = tl.load(lines[2] + o_row, mask=m_label, other=0.0)
        b_loss = tl.zeros((BLOCK,), tl.float64)
        if lines[0] is not None:
            b_loss += SHARE * (tl.load(lines[0] + o_row, mask=m_label, other=0.0) - b_positive)
        if lines[1] is not None:
            b_loss += SHARE * (tl.load(lines[1] + b_label, mask=m_label, other=0.0) - b_positive)
        if p_weight is not None:
            b_loss *= tl.load(p_weight + o_row, mask=m_label, other=0).to(tl.float64)
        b_sum += b_loss
    total = tl.sum(b_sum, 0)
    if MEAN:
        total = total / n
    tl.store(p_out, total.to(p_out.dtype.element_ty))


@triton.jit
def load_weights(p_weight, o_row, m_row):
    """float64, 1 without weights; 0 where masked."""
    if p_weight is None:
        return tl.where(m_row, 1.0, 0.0).to(tl.float64)
    else:
        return tl.load(p_weight + o_row, mask=m_row, other=0).to(tl.float64)


@triton.jit(do_not_specialize=["n", "m"])
def spread_gradient(
    p_g,  # 0-d
    p_weight,  # (n,) or None for 1
    labels,  # as in `finish_lines`
    out,  # float64, written: g_row (n,), g_col (m,), g_positive (n,); one of the first two is None for one direction
    n,
    m,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    SHARE: tl.constexpr = 0.5 if out[0] is not None and out[1] is not None else 1.0
    o_line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row, m_col = o_line < n, o_line < m
    g = tl.load(p_g).to(tl.float64)
    if MEAN:
        g = g / n
    m_label = m_row
    if labels is not None:
        m_label = load_labels(labels[0], o_line, m_row) >= 0
    b_w = load_weights(p_weight, o_line, m_label)
    if out[0] is not None:
        tl.store(out[0] + o_line, SHARE * (g * b_w), mask=m_row)
    tl.store(out[2] + o_line, -(g * b_w), mask=m_row)
    if out[1] is not None:
        b_total = b_w
        if labels is not None:
            # of the rows that name a column, in a fixed order
            b_first, b_end, most = rows_of_columns(labels[1], n, o_line, m_col)
            b_total = tl.zeros((BLOCK,), tl.float64)
            for i_row in range(0, most, BLOCK_ROWS):
                o_place = b_first[None, :] + i_row + tl.arange(0, BLOCK_ROWS)[:, None]
                m_place = o_place < b_end[None, :]
                b_row = tl.load(labels[2] + o_place, mask=m_place, other=0)
                b_total += tl.sum(load_weights(p_weight, b_row, m_place), 0)
        tl.store(out[1] + o_line, SHARE * (g * b_total), mask=m_col)
