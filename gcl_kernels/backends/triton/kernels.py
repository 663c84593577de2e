"""The kernels. Two of them make the N x M logits tile by tile; neither writes them to memory.

    forward_tile     one tile of s = scale lhs rhs^T  ->  what the loss's epilogue makes of its negatives; positives
    merge_partials   (max, sum) pairs over all tiles of a line  ->  one pair a line
    backward_tile    the same tile again  ->  the same tile of G, the gradient with respect to s

The two gradient products, dlhs = scale G rhs and drhs = scale G^T lhs, are library GEMMs (`launch`).

The two tile kernels know no loss. A loss is three functions, EPILOGUE, FITS and GRADIENT, with signatures as in `softmax`;
`out` and `lines` are tuples of pointers whose meaning and number are theirs. The softmax's other half is on the host: `launch`
and `one_pass` merge its partials, join positives and pack `lines`. Masks and additive terms are in `modify`. An argument is None
where a kernel does not read it. `tiles` says how things are named and which tuples travel together.
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .modify import modify, modify_positive
from .tiles import (
    column_halves,
    cut,
    hide_positives,
    holds_a_label,
    logits,
    products,
    read_positives,
    scale_in_base2,
    scaled,
    store_block,
    tile_of_program,
    write_positives,
)

# They change from batch to batch: none may be compiled in, or every ragged last batch would compile its own kernel.
SIZES = ["n", "m", "shift"]


@triton.jit
def negatives(b_s, terms, labels, place, has_label, LABELS: tl.constexpr):
    """The logits with -inf at what the tile's statistics leave out: past the end, masked, positives.

    Positives join their lines in float64 at the end: beside a well-trained pair's positive, float32 would round away the
    negatives, and they are its loss.
    """
    i_row, i_col, n, m = place
    # This line stands before `if has_label`, because it then separates it from the caller's `if has_label`, which reads the
    # positives. With nothing between the two, the compiler makes one branch of them and keeps the label comparisons of the
    # first in registers for the second: 187 registers instead of 128 on sm_90 at D <= 256, and so one block an SM, not two.
    o_row = i_row + tl.arange(0, b_s.shape[0])
    b_s = modify(b_s, terms, place)
    if has_label:
        b_s = hide_positives(b_s, labels, o_row, i_col, LABELS)
    if (i_row + b_s.shape[0] > n) | (i_col + b_s.shape[1] > m):
        b_s = cut(tl.where((o_row < n)[:, None], b_s, float("-inf")), m - i_col)
    return b_s


@triton.jit(do_not_specialize=SIZES)
def forward_tile(
    lhs,  # (n, d): descriptor or pointer, and so are rhs and stored
    rhs,  # (m, d)
    strides,  # of lhs, rhs, stored: elements from row to row
    scale,  # pointers: logit_scale, and again where what rounding takes of it in base 2 counts, else None
    p_labels,  # (n, P) int32; None for the default labels, row i's positive is column i
    p_positive,  # (n, P) float32, base 2, written where a label lies in the chunk
    terms,  # `modify`
    out,  # pointers, written or read by EPILOGUE
    stored,  # (n, m) in the compute dtype, written by EPILOGUE; None where it stores nothing
    p_skip,  # 0-d int32: nothing is done unless 0; or None. A launch of it that stores nothing may have fewer programs than tiles
    n,
    m,
    d,
    shift,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_D: tl.constexpr,  # D is a multiple of BLOCK_D
    PRECISION: tl.constexpr,
    LABELS: tl.constexpr,  # P
    EPILOGUE: tl.constexpr,
    HALVES: tl.constexpr,  # the epilogue in two column halves; stored's blocks are then halves too
):
    operands = (lhs, rhs, strides, scale, d)
    labels = (p_labels, shift, p_positive)
    written = (out, (stored, strides[2]))
    SHAPE: tl.constexpr = (BLOCK_ROWS, BLOCK_COLS, BLOCK_D, WHOLE_D, PRECISION, LABELS, GROUP, HALVES)
    if p_skip is not None and tl.load(p_skip) != 0:
        return
    if p_skip is None or stored is not None:
        negatives_of_tile(tl.program_id(0), (n, m), operands, labels, terms, written, SHAPE, EPILOGUE)
    else:  # seldom: few programs return at once, or share the tiles
        n_tiles = tl.cdiv(n, BLOCK_ROWS) * tl.cdiv(m, BLOCK_COLS)
        for i_program in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), disable_licm=True):
            negatives_of_tile(i_program, (n, m), operands, labels, terms, written, SHAPE, EPILOGUE)


@triton.jit
def negatives_of_tile(i_program, sizes, operands, labels, terms, written, SHAPE: tl.constexpr, EPILOGUE: tl.constexpr):
    """`forward_tile` of one tile."""
    BLOCK_ROWS: tl.constexpr = SHAPE[0]
    BLOCK_COLS: tl.constexpr = SHAPE[1]
    LABELS: tl.constexpr = SHAPE[5]
    n, m = sizes
    out, target = written
    tile = tile_of_program(i_program, n, m, BLOCK_ROWS, BLOCK_COLS, SHAPE[6])
    place = (tile[0] * BLOCK_ROWS, tile[1] * BLOCK_COLS, n, m)
    has_label = holds_a_label(labels, place, BLOCK_ROWS, BLOCK_COLS, LABELS)

    b_s = logits(operands, place, BLOCK_ROWS, BLOCK_COLS, SHAPE[2], SHAPE[3], SHAPE[4])
    if has_label:
        read_positives(b_s, terms, labels, place, modify_positive, LABELS)
    b_s = negatives(b_s, terms, labels, place, has_label, LABELS)
    if not EPILOGUE(b_s, out, target, tile, place, SHAPE[7], True):
        b_s = logits(operands, place, BLOCK_ROWS, BLOCK_COLS, SHAPE[2], SHAPE[3], SHAPE[4])
        b_s = negatives(b_s, terms, labels, place, has_label, LABELS)
        EPILOGUE(b_s, out, target, tile, place, SHAPE[7], False)


@triton.jit
def online_logsumexp(b_top, b_total, b_part_top, b_part_total):
    """Merge (tiles, lines) pairs into the running (lines,) pairs. Totals are float64: thousands of tiles add into one."""
    b_new_top = tl.maximum(b_top, tl.max(b_part_top, 0))
    b_reference = tl.where(b_new_top == float("-inf"), 0.0, b_new_top)
    b_rescaled = b_part_total * tl.exp2(b_part_top - b_reference[None, :])
    b_total = b_total * tl.exp2(b_top - b_reference) + tl.sum(b_rescaled.to(tl.float64), 0)
    return b_new_top, b_total


@triton.jit(do_not_specialize=["n_lines", "n_tiles"])
def merge_partials(
    p_part_top,  # (tiles, lines) float32; None, as is p_top, where all are the same
    p_part_total,
    p_top,  # (lines,) float32: the running pair, updated
    p_total,  # (lines,) float64
    p_skip,  # 0-d int32: nothing is done unless 0; or None
    n_lines,
    n_tiles,
    BLOCK_TILES: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
):
    if p_skip is not None and tl.load(p_skip) != 0:
        return
    o_line = tl.program_id(0) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    m_line = o_line < n_lines
    b_total = tl.load(p_total + o_line, mask=m_line, other=0.0)
    if p_part_top is None:
        b_total += summed_parts(p_part_total, o_line, n_lines, n_tiles, BLOCK_TILES)
    else:
        b_top = tl.load(p_top + o_line, mask=m_line, other=float("-inf"))
        parts = (p_part_top, p_part_total)
        b_top, b_total = merged_parts(b_top, b_total, parts, o_line, n_lines, n_tiles, BLOCK_TILES)
        tl.store(p_top + o_line, b_top, mask=m_line)
    tl.store(p_total + o_line, b_total, mask=m_line)


@triton.jit
def merged_parts(b_top, b_total, parts, o_line, n_lines, n_tiles, BLOCK_TILES: tl.constexpr):
    """The running (max, sum) of some lines and that of their (tiles, lines) parts."""
    for i_tile in range(0, n_tiles, BLOCK_TILES):
        o_part, m_part = part_of_lines(i_tile, o_line, n_lines, n_tiles, BLOCK_TILES)
        b_part_top = tl.load(parts[0] + o_part, mask=m_part, other=float("-inf"))
        b_part_total = tl.load(parts[1] + o_part, mask=m_part, other=0.0)
        b_top, b_total = online_logsumexp(b_top, b_total, b_part_top, b_part_total)
    return b_top, b_total


@triton.jit
def summed_parts(p_part_total, o_line, n_lines, n_tiles, BLOCK_TILES: tl.constexpr):
    """The sum of (tiles, lines) parts that are all relative to the same number, float64."""
    b_total = tl.zeros(o_line.shape, tl.float64)
    for i_tile in range(0, n_tiles, BLOCK_TILES):
        o_part, m_part = part_of_lines(i_tile, o_line, n_lines, n_tiles, BLOCK_TILES)
        b_total += tl.sum(tl.load(p_part_total + o_part, mask=m_part, other=0.0).to(tl.float64), 0)
    return b_total


@triton.jit
def part_of_lines(i_tile, o_line, n_lines, n_tiles, BLOCK_TILES: tl.constexpr):
    o_tile = i_tile + tl.arange(0, BLOCK_TILES)
    o_part = o_tile.to(tl.int64)[:, None] * n_lines + o_line[None, :]
    return o_part, (o_tile < n_tiles)[:, None] & (o_line < n_lines)[None, :]


@triton.jit
def store_gradient(
    b_acc, arguments, place, LABELS: tl.constexpr, GRADIENT: tl.constexpr, HALVES: tl.constexpr, FAST: tl.constexpr
):
    """From the products of a tile to its part of G: logits, the loss's gradient, then positives, then one rounding.

    The scale is applied here, in each form, where it is the factor of a fused multiply-add.
    """
    i_row, i_col, n, m = place
    if HALVES:
        HALF: tl.constexpr = b_acc.shape[1] // 2
        b_left, b_right = column_halves(b_acc)
        store_gradient(b_left, arguments, place, LABELS, GRADIENT, False, FAST)
        place = (i_row, i_col + HALF, n, m)
        store_gradient(b_right, arguments, place, LABELS, GRADIENT, False, FAST)
    else:
        scale2, terms, lines, labels, target = arguments
        has_label = holds_a_label(labels, place, b_acc.shape[0], b_acc.shape[1], LABELS)
        b_s = modify(scaled(b_acc, scale2), terms, place)  # a label that a mask hides gets its entry back below
        b_g = GRADIENT(b_s, lines, place, FAST)
        if has_label:
            b_g = write_positives(b_g, labels, place, LABELS)
        store_block(b_g, target, place)


@triton.jit(do_not_specialize=SIZES)
def backward_tile(
    lhs,  # these five as in forward_tile
    rhs,
    strides,
    scale,
    p_labels,
    p_entry,  # (n, P) float32: G at the labels
    terms,
    lines,  # read by FITS and GRADIENT
    gradient,  # (n, m) in the compute dtype, written: descriptor or pointer, as lhs
    n,
    m,
    d,
    shift,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    LABELS: tl.constexpr,
    FITS: tl.constexpr,  # None: GRADIENT is never asked with FAST
    GRADIENT: tl.constexpr,
    HALVES: tl.constexpr,  # the tile's epilogue in two column halves; gradient's blocks are then halves too
):
    i_row_tile, i_col_tile = tile_of_program(tl.program_id(0), n, m, BLOCK_ROWS, BLOCK_COLS, GROUP)
    place = (i_row_tile * BLOCK_ROWS, i_col_tile * BLOCK_COLS, n, m)
    operands = (lhs, rhs, strides, scale, d)
    # What one number says is read before the products, and arrives meanwhile. Without a fast form the scale is read after them:
    # held over them, it takes sm_100 beyond its registers in tf32.
    if FITS is not None:
        scale2, seen = scale_in_base2(scale), FITS(lines, place, None)
    b_acc = products(operands, place, BLOCK_ROWS, BLOCK_COLS, BLOCK_D, WHOLE_D, PRECISION)
    if FITS is None:
        scale2 = scale_in_base2(scale)
    arguments = (scale2, terms, lines, (p_labels, shift, p_entry), (gradient, strides[2]))
    if FITS is not None and FITS(lines, place, seen):
        store_gradient(b_acc, arguments, place, LABELS, GRADIENT, HALVES, True)
    else:
        store_gradient(b_acc, arguments, place, LABELS, GRADIENT, HALVES, False)
