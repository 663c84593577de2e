"""The forward of a large plane against one reference: every tile's exponentials are in one scale, and add up as they are.

    largest_norms    rows of both sides  ->  the largest squared norm of some of them, a program
    one_reference    those  ->  what all logits of the plane are taken relative to
    forward_strips   tiles of s = scale lhs rhs^T, down strips of columns  ->  sums of their negatives' exponentials; positives

`|s_ij| <= |scale| max|x| max|y|` is known before any logit is. So a tile needs no maximum of its own, its sums need no factors,
and a program that walks down a strip of columns adds up their sums in registers: exchanging them between threads, which is
most of `softmax.both_by_one_exponential`, is done once a segment of a strip. `strips` says when that is exact, and what runs
where it is not. Names and tuples as in `tiles`.
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import SIZES, negatives
from .modify import modify_positive
from .tiles import LOG2E, holds_a_label, products, read_positives, scale_in_base2, scaled


@triton.jit(do_not_specialize=["n", "m"])
def largest_norms(
    p_lhs,
    p_rhs,
    strides,  # elements from row to row
    p_norms,  # (programs,) float32, written: squared norms, of blocks of lhs, then of rhs
    n,
    m,
    d,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_program = tl.program_id(0)
    n_blocks = tl.cdiv(n, ROWS)
    if i_program < n_blocks:
        largest = largest_norm(p_lhs, strides[0], i_program, n, d, ROWS, BLOCK_D)
    else:
        largest = largest_norm(p_rhs, strides[1], i_program - n_blocks, m, d, ROWS, BLOCK_D)
    tl.store(p_norms + i_program, largest)


@triton.jit
def largest_norm(p_x, stride, i_block, n, d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    o_row = i_block * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    b_squares = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i_d in range(0, d, BLOCK_D):
        b_x = tl.load(p_rows + i_d, mask=(o_row < n)[:, None] & (o_d < d - i_d)[None, :], other=0.0).to(tl.float32)
        b_squares += b_x * b_x
    return tl.max(tl.sum(b_squares, 1), 0)


@triton.jit(do_not_specialize=["n_lhs", "n_rhs"])
def one_reference(
    p_norms,  # `largest_norms`
    p_scale,
    p_reference,  # 0-d float32, written, base 2
    p_exact,  # 0-d int32, written: 1, until a line's sum turns out to be too small
    n_lhs,  # programs of lhs
    n_rhs,
    UNSHIFTED: tl.constexpr,  # the largest bound for which the reference is 0
    HEADROOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """HEADROOM below the bound. Where no exponential over- or underflows the logits are taken as they are, and round least.

    A maximum passes over a NaN, whose line then says that it is not exact.
    """
    bound = tl.sqrt(largest_of(p_norms, n_lhs, BLOCK)) * tl.sqrt(largest_of(p_norms + n_lhs, n_rhs, BLOCK))
    bound *= tl.abs(tl.load(p_scale)).to(tl.float32) * LOG2E
    tl.store(p_reference, tl.where(bound <= UNSHIFTED, 0.0, bound - HEADROOM))
    tl.store(p_exact, 1)


@triton.jit
def largest_of(p_x, length, BLOCK: tl.constexpr):
    b_largest = tl.zeros((BLOCK,), tl.float32)
    for i_first in range(0, length, BLOCK):
        o_x = i_first + tl.arange(0, BLOCK)
        b_largest = tl.maximum(b_largest, tl.load(p_x + o_x, mask=o_x < length, other=0.0))
    return tl.max(b_largest, 0)


@triton.jit
def diagonal_of_strip(i_col, n_row_tiles, shift, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The row tiles from the first up to the second hold the positives of the strip's columns; default labels."""
    first = tl.maximum(i_col - shift, 0) // BLOCK_ROWS
    end = tl.cdiv(tl.maximum(i_col + BLOCK_COLS - shift, 0), BLOCK_ROWS)
    return tl.minimum(first, n_row_tiles), tl.minimum(end, n_row_tiles)


@triton.jit
def folded(b_e, FOLD: tl.constexpr, APART: tl.constexpr):
    """Sums of each FOLD rows that lie APART rows apart: where one thread holds them, no thread exchanges anything."""
    if FOLD == 1:
        return b_e
    else:
        ROWS: tl.constexpr = b_e.shape[0]
        COLS: tl.constexpr = b_e.shape[1]
        b_e = tl.reshape(b_e, (ROWS // (FOLD * APART), FOLD, APART, COLS))
        return tl.reshape(tl.sum(b_e, 1), (ROWS // FOLD, COLS))


@triton.jit(do_not_specialize=[*SIZES, "segment", "segments", "slots"])
def forward_strips(
    lhs,  # these as in `kernels.forward_tile`
    rhs,
    strides,
    scale,
    p_labels,
    p_positive,
    terms,
    p_reference,  # 0-d float32
    out,  # float32, written: sums of rows (strips, n) and of columns (slots, m)
    n,
    m,
    d,
    shift,
    segment,  # row tiles of a segment of a strip
    segments,  # of a strip
    slots,  # partial sums of a column: segments, the tiles on the diagonal, and the ragged row tile if there is one
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_D: tl.constexpr,
    PRECISION: tl.constexpr,
    LABELS: tl.constexpr,
    FOLD: tl.constexpr,
    APART: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """First the segments of whole strips, in which nothing is masked: they pass over the diagonal. Then the rest.

    Both in one loop, the rest's masks would take registers that the tiles without masks need.
    """
    operands = (lhs, rhs, strides, scale, d)
    p_row, p_col = out
    reference = tl.load(p_reference)
    n_row_tiles, n_strips = n // BLOCK_ROWS, m // BLOCK_COLS  # whole ones
    i_program = tl.program_id(0)
    if i_program < n_strips * segments:
        # bands of GROUP strips, segment by segment: what runs at a time shares both sides' rows in L2
        i_band = i_program // (GROUP * segments)
        i_in_band = i_program % (GROUP * segments)
        width = tl.minimum(n_strips - i_band * GROUP, GROUP)
        i_strip, i_segment = i_band * GROUP + i_in_band % width, i_in_band // width
        i_col = i_strip * BLOCK_COLS
        first = i_segment * segment
        end = tl.minimum(first + segment, n_row_tiles)
        diagonal, beyond = diagonal_of_strip(i_col, n_row_tiles, shift, BLOCK_ROWS, BLOCK_COLS)
        diagonal = tl.maximum(diagonal, first)
        passed_over = tl.maximum(tl.minimum(beyond, end) - diagonal, 0)
        scale2 = scale_in_base2(scale)
        p_sums = p_row + i_strip.to(tl.int64) * n
        b_col = tl.zeros((BLOCK_ROWS // FOLD, BLOCK_COLS), tl.float32)
        for i_tile in tl.range(first, end - passed_over, flatten=FLATTEN):
            i_row = (i_tile + tl.where(i_tile >= diagonal, passed_over, 0)) * BLOCK_ROWS
            b_acc = products(operands, (i_row, i_col, n, m), BLOCK_ROWS, BLOCK_COLS, BLOCK_D, WHOLE_D, PRECISION)
            b_e = tl.exp2(scaled(b_acc, scale2) - reference)
            tl.store(p_sums + i_row + tl.arange(0, BLOCK_ROWS), tl.sum(b_e, 1))
            b_col += folded(b_e, FOLD, APART)
        tl.store(p_col + i_segment.to(tl.int64) * m + i_col + tl.arange(0, BLOCK_COLS), tl.sum(b_col, 0))
    else:
        i_rest = i_program - n_strips * segments
        # Of a whole strip, the diagonal; of a whole strip, the ragged row tile if there is one; the ragged strip, by as many
        # programs as a column has sums. Selected, since Triton 3.5 fails at a loop whose bounds come out of branches.
        on_diagonal, in_row = i_rest < n_strips, i_rest < n_strips * (slots - segments)
        diagonal, beyond = diagonal_of_strip(i_rest * BLOCK_COLS, n_row_tiles, shift, BLOCK_ROWS, BLOCK_COLS)
        i_strip = tl.where(in_row, i_rest % tl.maximum(n_strips, 1), n_strips)
        i_slot = tl.where(in_row, segments + i_rest // tl.maximum(n_strips, 1), i_rest - n_strips * (slots - segments))
        all_row_tiles = tl.cdiv(n, BLOCK_ROWS)
        length = tl.cdiv(all_row_tiles, slots)
        first = tl.where(on_diagonal, diagonal, tl.where(in_row, n_row_tiles, i_slot * length))
        last = tl.minimum((i_slot + 1) * length, all_row_tiles)
        end = tl.where(on_diagonal, beyond, tl.where(in_row, all_row_tiles, last))
        i_col = i_strip * BLOCK_COLS
        labels = (p_labels, shift, p_positive)
        b_rest = tl.zeros((BLOCK_COLS,), tl.float32)
        for i_tile in tl.range(first, end, disable_licm=True):
            place = (i_tile * BLOCK_ROWS, i_col, n, m)
            has_label = holds_a_label(labels, place, BLOCK_ROWS, BLOCK_COLS, LABELS)
            b_acc = products(operands, place, BLOCK_ROWS, BLOCK_COLS, BLOCK_D, WHOLE_D, PRECISION)
            b_s = scaled(b_acc, scale_in_base2(scale))
            if has_label:
                read_positives(b_s, terms, labels, place, modify_positive, LABELS)
            b_e = tl.exp2(negatives(b_s, terms, labels, place, has_label, LABELS) - reference)
            o_row = place[0] + tl.arange(0, BLOCK_ROWS)
            tl.store(p_row + i_strip.to(tl.int64) * n + o_row, tl.sum(b_e, 1), mask=o_row < n)
            b_rest += tl.sum(b_e, 0)
        o_col = i_col + tl.arange(0, BLOCK_COLS)
        tl.store(p_col + i_slot.to(tl.int64) * m + o_col, b_rest, mask=o_col < m)
