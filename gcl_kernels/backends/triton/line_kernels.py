"""Kernels over lines: what a step does beside its tiles and its matrix products, O((N + M) D) work in few launches.

    finish_lines      partial sums of lines, positives  ->  row, col and positive in natural units
    pack_lines        statistics and their gradients  ->  what the backward's tiles read: lines (`softmax`), entries of positives
    pack_limits       limits of similarity  ->  those of tiles, padded, with the sign and the scale that go with them
    mark_ids          numbers that stand for ids  ->  those of rows and of columns, padded, apart where there is no id
    inner_products    rows of two matrices  ->  a part of their inner product for each program
    sum_parts         such parts  ->  the scale's gradient

Arithmetic of lines is in float64: at logit_scale 100 a float32 logsumexp near 100 is known to 4e-6 only. Every sum is in a fixed
order. Names as in `tiles`; a program has a block of rows or a block of columns, rows first. A loss is in `loss_kernels`.
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .. import base2, terms
from .kernels import merged_parts, online_logsumexp, summed_parts
from .tiles import LOG2E

LN2 = tl.constexpr(base2.LN2)
SMALLEST_SCALE = tl.constexpr(base2.SMALLEST_SCALE)
SMALLEST_SUM = tl.constexpr(base2.SMALLEST_SUM)
SAMPLE = tl.constexpr(128)
TINY = tl.constexpr(terms.TINY)
LARGEST_TINY = tl.constexpr(terms.LARGEST_TINY)


@triton.jit
def merged_line(parts, fixed, o_line, n_lines, n_tiles, BLOCK_TILES: tl.constexpr):
    """Base-2 logsumexp of some lines' negatives, float64, of (tiles, lines) parts. `fixed`: `finish_lines`."""
    if fixed[0] is None:
        b_top = tl.full(o_line.shape, float("-inf"), tl.float32)
        b_total = tl.zeros(o_line.shape, tl.float64)
        b_top, b_total = merged_parts(b_top, b_total, parts, o_line, n_lines, n_tiles, BLOCK_TILES)
        return tl.log2(b_total) + b_top
    else:
        b_total = summed_parts(parts[0], o_line, n_lines, n_tiles, BLOCK_TILES)
        # a line with nothing visible, an infinity and a NaN show in the same way; hence "not >=" and not "<"
        m_inexact = (o_line < n_lines) & ~(b_total >= SMALLEST_SUM)
        if tl.max(m_inexact.to(tl.int32), 0) > 0:
            tl.store(fixed[1], 0)  # whichever programs find one, they store the same
        return tl.log2(b_total) + tl.load(fixed[0])


@triton.jit
def logaddexp2(b_x, b_y):
    """Of float64; equal infinities and NaN pass through."""
    b_distance = tl.where(b_x == b_y, 0.0, tl.abs(b_x - b_y))
    return tl.maximum(b_x, b_y, propagate_nan=tl.PropagateNan.ALL) + tl.log2(1.0 + tl.exp2(-b_distance))


@triton.jit
def first_not_below(p_sorted, n, b_value):
    """How many of n sorted numbers are below each value."""
    b_low = tl.zeros(b_value.shape, tl.int32)
    b_high = b_low + n
    span = n
    while span > 0:
        m_open = b_low < b_high
        b_middle = (b_low + b_high) // 2
        m_below = m_open & (tl.load(p_sorted + b_middle, mask=m_open, other=0) < b_value)
        b_low = tl.where(m_below, b_middle + 1, b_low)
        b_high = tl.where(m_open & (m_below == 0), b_middle, b_high)
        span = span // 2
    return b_low


@triton.jit
def rows_of_columns(p_sorted, n, o_col, m_col):
    """The places in the sorted labels of the rows that name each column: (first, end), and the largest number of them."""
    b_first = first_not_below(p_sorted, n, o_col)
    b_end = tl.where(m_col, first_not_below(p_sorted, n, o_col + 1), b_first)
    return b_first, b_end, tl.max(b_end - b_first, 0)


@triton.jit
def joined_column(p_positive, labels, o_col, m_col, n, BLOCK_TILES: tl.constexpr):
    """Base-2 logsumexp, float64, of the positives of each column; -inf where there is none."""
    b_first, b_end, most = rows_of_columns(labels[1], n, o_col, m_col)
    b_top = tl.full(o_col.shape, float("-inf"), tl.float64)
    b_total = tl.zeros(o_col.shape, tl.float64)
    for i_row in range(0, most, BLOCK_TILES):
        o_place = b_first[None, :] + i_row + tl.arange(0, BLOCK_TILES)[:, None]
        m_place = o_place < b_end[None, :]
        b_row = tl.load(labels[2] + o_place, mask=m_place, other=0)
        b_part = tl.load(p_positive + b_row, mask=m_place, other=float("-inf")).to(tl.float64)
        b_top, b_total = online_logsumexp(b_top, b_total, b_part, tl.where(m_place, 1.0, 0.0).to(tl.float64))
    return tl.log2(b_total) + b_top


@triton.jit
def store_statistic(p_out, o_line, m_line, b_statistic2, p_zero):
    """In natural units. Logits that stand for 0 beside limits (`terms.TINY`) become 0 where the scale `p_zero` is."""
    b_statistic = b_statistic2 * LN2
    if p_zero is not None:
        below = tl.where(tl.load(p_zero) == 0, LARGEST_TINY, 0.0)
        b_statistic = tl.where(tl.abs(b_statistic) < below, 0.0, b_statistic)
    tl.store(p_out + o_line, b_statistic, mask=m_line)


@triton.jit
def load_labels(p_labels, o_row, m_row):
    """Columns of the rows' positives, -1 for none and past the end; by default row i's is column i."""
    if p_labels is None:
        return tl.where(m_row, o_row, -1)
    else:
        return tl.load(p_labels + o_row, mask=m_row, other=-1).to(tl.int32)


@triton.jit(do_not_specialize=["n", "m", "row_tiles", "col_tiles", "joined_cols"])
def finish_lines(
    row_parts,  # (tops, totals) of the rows' negatives, (row_tiles, n), or None; with `fixed` (sums,)
    col_parts,  # likewise (col_tiles, m)
    joined,  # base-2 logits of positives that join rows (n,) and columns (joined_cols,); None: nothing joins
    p_positive,  # (n,) base-2 logits, or None
    labels,  # None: row i's positive is column i. Else the labels of one positive a row, sorted, and the rows in this order,
    # the last two where a column wants them; `joined` are then the positives by row
    p_zero,  # 0-d logit_scale beside limits, else None
    out,  # float64, natural units, written: row (n,), col (m,), positive (n,), None where absent
    fixed,  # (reference of all sums; 0-d int32, written 0 where one is too small), or None twice
    p_skip,  # 0-d int32: nothing is done unless 0; or None
    n,
    m,
    row_tiles,
    col_tiles,
    joined_cols,
    BLOCK_TILES: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
):
    if p_skip is not None and tl.load(p_skip) != 0:
        return
    i_block = tl.program_id(0)
    n_blocks = tl.cdiv(n, BLOCK_LINES)
    o_line = tl.arange(0, BLOCK_LINES)
    if i_block < n_blocks:
        o_line += i_block * BLOCK_LINES
        m_line = o_line < n
        m_label = m_line
        if labels is not None:
            m_label = load_labels(labels[0], o_line, m_line) >= 0
        if row_parts is not None:
            b_lse = merged_line(row_parts, fixed, o_line, n, row_tiles, BLOCK_TILES)
            if joined[0] is not None:
                b_joined = tl.load(joined[0] + o_line, mask=m_label, other=float("-inf")).to(tl.float64)
                b_lse = logaddexp2(b_lse, b_joined)
            store_statistic(out[0], o_line, m_line, b_lse, p_zero)
        if p_positive is not None:
            b_positive = tl.load(p_positive + o_line, mask=m_label, other=0.0).to(tl.float64)
            store_statistic(out[2], o_line, m_line, b_positive, p_zero)
    elif col_parts is not None:
        o_line += (i_block - n_blocks) * BLOCK_LINES
        m_line = o_line < m
        b_lse = merged_line(col_parts, fixed, o_line, m, col_tiles, BLOCK_TILES)
        if joined[1] is not None:
            if labels is None:
                b_joined = tl.load(joined[1] + o_line, mask=o_line < joined_cols, other=float("-inf")).to(tl.float64)
            else:
                b_joined = joined_column(joined[1], labels, o_line, m_line, n, BLOCK_TILES)
            b_lse = logaddexp2(b_lse, b_joined)
        store_statistic(out[1], o_line, m_line, b_lse, p_zero)


@triton.jit
def load_lse2(p_lse, o_line, m_line):
    """Base-2 logsumexps, 0 where nothing is visible: every pair of that line is hidden anyway."""
    b_lse2 = tl.load(p_lse + o_line, mask=m_line, other=0.0) * LOG2E
    return tl.where(b_lse2 == float("-inf"), 0.0, b_lse2)


@triton.jit
def sampled_mean(p_lse, n):
    """Mean base-2 logsumexp of up to SAMPLE evenly spaced lines."""
    o_sample = (tl.arange(0, SAMPLE).to(tl.int64) * n) // SAMPLE
    return tl.sum(load_lse2(p_lse, o_sample, o_sample < n), 0) / SAMPLE


@triton.jit
def load_gradient(p_g, stride, o_line, m_line, factor):
    return tl.load(p_g + o_line.to(tl.int64) * stride, mask=m_line, other=0.0).to(tl.float64) * factor


@triton.jit
def pack_line(p_lse, g, p_line, o_line, sizes, middle, SIGN: tl.constexpr, SIDE: tl.constexpr):
    """What `lines.pack` says of some lines. g: (pointer, stride, factor) of their gradients. SIDE: of a tile, or None."""
    n, n_padded = sizes
    m_line = o_line < n
    b_lse2 = load_lse2(p_lse, o_line, m_line)
    b_g = load_gradient(g[0], g[1], o_line, m_line, g[2])
    b_reference = b_lse2.to(tl.float32)
    b_gain = b_g * tl.exp2(b_reference.to(tl.float64) - b_lse2)
    # past the end: neither the highest row nor the lowest column of its tile
    b_past = tl.full(o_line.shape, -SIGN * float("inf"), tl.float32)
    b_reference = tl.where(m_line, b_reference, b_past)
    tl.store(p_line + o_line, b_reference)
    tl.store(p_line + n_padded + o_line, b_gain.to(tl.float32))
    if SIDE is not None:
        b_factor = tl.exp2(SIGN * (b_lse2 - middle))
        if SIGN < 0:
            b_factor *= b_g
        b_factor = tl.where(m_line, b_factor, 0.0)
        tl.store(p_line + 2 * n_padded + o_line, b_factor.to(tl.float32))
        b_extreme = SIGN * highest_of_tile(SIGN * (b_reference.to(tl.float64) - middle), SIDE)
        tl.store(p_line + 3 * n_padded + o_line, b_extreme.to(tl.float32))


@triton.jit
def highest_of_tile(b_x, SIDE: tl.constexpr):
    """For each line the largest number in its tile of SIDE lines. NaN where one is."""
    b_tiles = tl.reshape(b_x, (b_x.shape[0] // SIDE, SIDE))
    b_nan = tl.max((b_tiles != b_tiles).to(tl.int32), 1) > 0
    b_highest = tl.where(b_nan, float("nan"), tl.max(b_tiles, 1))
    return tl.reshape(tl.broadcast_to(b_highest[:, None], b_tiles.shape), b_x.shape)


@triton.jit
def positive_softmax(b_positive, p_lse, o_line, m_line):
    """exp(positive - lse), 0 where there is no positive."""
    b_lse = tl.load(p_lse + o_line, mask=m_line, other=0.0)
    return tl.where(m_line, tl.exp2((b_positive - b_lse) * LOG2E), 0.0)


@triton.jit
def nonzero(p_scale):
    """The scale in float64. A scale of 0 would leave nothing of G for the scale's own gradient: a tiny number stands for it."""
    scale = tl.load(p_scale).to(tl.float64)
    return tl.where(tl.abs(scale) < SMALLEST_SCALE, SMALLEST_SCALE, scale)


@triton.jit(do_not_specialize=["n", "m", "strides"])
def pack_lines(
    lse,  # pointers, row and col, float64; a direction is None where its gradient is
    p_positive,  # (n,) float64; None: no entries
    p_labels,  # (n,) the positives' columns; None: row i's is column i
    g,  # pointers, gradients with respect to row, col and positive
    strides,  # of these
    p_scale,  # folded into G; None: it is not
    lines,  # (4, n..) and (4, m..) float32, written, (2, ..) for one direction; None where absent
    p_entry,  # (n..) float32, written; None: no entries
    n,
    m,
    PAD: tl.constexpr,
    JOINED: tl.constexpr,
    NONZERO: tl.constexpr,  # a scale of 0 as `nonzero`
    SIDES: tl.constexpr,  # rows and columns of the backward's tiles, which divide PAD; None for one direction
):
    i_block = tl.program_id(0)
    n_padded, m_padded = tl.cdiv(n, PAD) * PAD, tl.cdiv(m, PAD) * PAD
    factor = tl.full((), 1.0, tl.float64)
    if p_scale is not None:
        factor = nonzero(p_scale) if NONZERO else tl.load(p_scale).to(tl.float64)
    middle = tl.full((), 0.0, tl.float64)
    if SIDES[0] is not None:
        middle = (sampled_mean(lse[0], n) + sampled_mean(lse[1], m)) / 2
    n_blocks = n_padded // PAD
    o_line = tl.arange(0, PAD)
    if i_block < n_blocks:
        o_line += i_block * PAD
        m_line = o_line < n
        if lines[0] is not None:
            pack_line(lse[0], (g[0], strides[0], factor), lines[0], o_line, (n, n_padded), middle, 1, SIDES[0])
        if p_entry is not None:
            b_positive = tl.load(p_positive + o_line, mask=m_line, other=0.0)
            b_entry = tl.zeros(o_line.shape, tl.float64)
            if g[2] is not None:
                b_entry += load_gradient(g[2], strides[2], o_line, m_line, factor)
            b_label = o_line
            if p_labels is not None:
                b_label = tl.load(p_labels + o_line, mask=m_line, other=-1).to(tl.int32)
            m_label = m_line & (b_label >= 0)
            if JOINED and g[0] is not None:
                b_g = load_gradient(g[0], strides[0], o_line, m_line, factor)
                b_entry += positive_softmax(b_positive, lse[0], o_line, m_label) * b_g
            if JOINED and g[1] is not None:
                b_g = load_gradient(g[1], strides[1], b_label, m_label, factor)
                b_entry += positive_softmax(b_positive, lse[1], b_label, m_label) * b_g
            tl.store(p_entry + o_line, tl.where(m_label, b_entry, 0.0).to(tl.float32))
    elif lines[1] is not None:
        o_line += (i_block - n_blocks) * PAD
        pack_line(lse[1], (g[1], strides[1], factor), lines[1], o_line, (m, m_padded), middle, -1, SIDES[1])


@triton.jit(do_not_specialize=["n", "m"])
def pack_limits(
    limits,  # (n,) and (m,) similarities; None: no limit
    p_scale,  # 0-d logit_scale
    out,  # (n..) and (m..) float32, written: in units of the logits times the sign, inf past the end; None: no limit
    p_sign,  # 0-d float32, written: the scale's
    p_tiles_scale,  # 0-d, written: the scale, TINY in place of 0
    n,
    m,
    PAD: tl.constexpr,
):
    scale = tl.load(p_scale)
    tiles_scale = tl.where(scale == 0, TINY, scale)
    if tl.program_id(0) == 0:
        tl.store(p_sign, tl.where(scale < 0, -1.0, 1.0))
        tl.store(p_tiles_scale, tiles_scale)
    factor = tl.abs(tiles_scale.to(tl.float64) * LOG2E)
    o_line = tl.program_id(0) * PAD + tl.arange(0, PAD)
    if limits[0] is not None:
        store_limit(limits[0], out[0], o_line, n, factor, PAD)
    if limits[1] is not None:
        store_limit(limits[1], out[1], o_line, m, factor, PAD)


@triton.jit
def store_limit(p_limit, p_out, o_line, n, factor, PAD: tl.constexpr):
    b_limit = tl.load(p_limit + o_line, mask=o_line < n, other=float("inf")).to(tl.float64) * factor
    tl.store(p_out + o_line, b_limit.to(tl.float32), mask=o_line < tl.cdiv(n, PAD) * PAD)


@triton.jit(do_not_specialize=["n", "m"])
def mark_ids(
    p_found,  # (K, n + m) int32: numbers that stand for ids
    p_ids,  # (K, n + m) int64: below 0 for none
    p_left,  # (K, n..) int32, written: of the rows, -1 for none and past the end
    p_right,  # (K, m..): of the columns, -2, since none equals nothing
    n,
    m,
    PAD: tl.constexpr,
):
    left_blocks, right_blocks = tl.cdiv(n, PAD), tl.cdiv(m, PAD)
    i_channel = tl.program_id(0) // (left_blocks + right_blocks)
    i_block = tl.program_id(0) % (left_blocks + right_blocks)
    o_in_block, i_channel = tl.arange(0, PAD), i_channel.to(tl.int64)
    p_found += i_channel * (n + m)
    p_ids += i_channel * (n + m)
    if i_block < left_blocks:
        o_line = i_block * PAD + o_in_block
        m_line = o_line < n
        b_found = tl.load(p_found + o_line, mask=m_line, other=0)
        b_there = tl.load(p_ids + o_line, mask=m_line, other=-1) >= 0
        tl.store(p_left + i_channel * left_blocks * PAD + o_line, tl.where(b_there, b_found, -1))
    else:
        o_line = (i_block - left_blocks) * PAD + o_in_block
        m_line = o_line < m
        b_found = tl.load(p_found + n + o_line, mask=m_line, other=0)
        b_there = tl.load(p_ids + n + o_line, mask=m_line, other=-1) >= 0
        tl.store(p_right + i_channel * right_blocks * PAD + o_line, tl.where(b_there, b_found, -2))


@triton.jit(do_not_specialize=["n", "m"])
def inner_products(
    p_x,  # (n, d), each row contiguous: a gradient
    p_y,  # (n, d), likewise
    p_other,  # (m, d), the other gradient, or None
    strides,  # of x, y and the other: elements from row to row
    p_scale,  # what both gradients are proportional to: where it is 0, what stands for it is taken out of them
    p_parts,  # (programs,) float64, written
    n,
    m,
    d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_x = o_row.to(tl.int64)[:, None] * strides[0]
    o_y = o_row.to(tl.int64)[:, None] * strides[1]
    is_zero = tl.load(p_scale) == 0
    b_sum = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i_d in range(0, d, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = (o_d < d)[None, :]
        m_x = (o_row < n)[:, None] & m_d
        b_x = tl.load(p_x + o_x + o_d[None, :], mask=m_x, other=0.0)
        b_y = tl.load(p_y + o_y + o_d[None, :], mask=m_x, other=0.0)
        b_sum += b_x.to(tl.float32) * b_y.to(tl.float32)
        if is_zero:
            tl.store(p_x + o_x + o_d[None, :], tl.zeros_like(b_x), mask=m_x)
            if p_other is not None:
                o_other = o_row.to(tl.int64)[:, None] * strides[2]
                tl.store(p_other + o_other + o_d[None, :], tl.zeros_like(b_x), mask=(o_row < m)[:, None] & m_d)
    tl.store(p_parts + tl.program_id(0), tl.sum(tl.sum(b_sum, 1).to(tl.float64), 0))


@triton.jit(do_not_specialize=["n_parts"])
def sum_parts(p_parts, p_scale, p_out, n_parts, BLOCK: tl.constexpr):
    """out = sum of parts / folded scale, by one program."""
    b_sum = tl.zeros((BLOCK,), tl.float64)
    for i_part in range(0, n_parts, BLOCK):
        o_part = i_part + tl.arange(0, BLOCK)
        b_sum += tl.load(p_parts + o_part, mask=o_part < n_parts, other=0.0)
    tl.store(p_out, (tl.sum(b_sum, 0) / nonzero(p_scale)).to(p_out.dtype.element_ty))
