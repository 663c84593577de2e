"""The softmax loss as functions of a tile. `kernels` runs them and knows none of them.

    epilogue(b_s, out, target, tile, place, HALVES, FAST) -> exact    the forward's, from a tile's negatives
    fits(lines, place, None) -> seen                                  what is read before the products, for the next
    fits(lines, place, seen) -> exact                                 whether the backward's fast form is exact in this tile
    gradient(b_s, lines, place, FAST) -> b_g                          the backward's, G without its positives

Logits are in base 2, `s2 = s log2(e)`, because exp2 is what the hardware has. Both passes need a tile's softmax by rows and by
columns, and take both from one exponential a logit, or from two where that would be inexact for a tile. The backward knows
which before it has the logits. The forward's exponentials themselves say it, and its kernel then makes the logits again: keeping
them would cost registers in every tile, and this branch is rare. So an epilogue is asked with FAST first; where it returns that
it is not exact, the kernel makes the logits again and asks without. An inexact answer has written nothing to `out`.
`one_direction_stored` has then stored the tile's exponentials all the same, which does no harm: they are relative to a reference
that was given, the same for both forms, so that the second form need not store them again; and `one_pass` makes a chunk again if
that reference is too far from one of its lines.

    out     pointers to float32, written at [tile, line]: the (max, sum of exponentials) of the tile's rows and of its columns
    target  (matrix, stride): where the exponentials themselves are stored, if they are (`one_pass`)
    tile    (row tile, column tile), by number
    lines   (row, col): a direction's (p_line, stride), None where it is absent; p_line is (4, lines) float32, reference, gain,
            factor and extreme (`lines.pack`)
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .. import base2
from .tiles import column_halves, store_block

SAFE_SPREAD = tl.constexpr(base2.SAFE_SPREAD)
SAFE_SUM = tl.constexpr(2.0**-base2.SAFE_SPREAD)


# Forward.


@triton.jit
def both_by_one_exponential(b_s, out, target, tile, place, HALVES: tl.constexpr, FAST: tl.constexpr):
    """Rows and columns, from one exponential a logit where the tile allows it."""
    if FAST:
        b_top, b_row_total, b_col_total = shared_logsumexp_parts(b_s)
        n_inexact = count_inexact(b_row_total, place[0], place[2])
        n_inexact += count_inexact(b_col_total, place[1], place[3])
        if n_inexact == 0:
            store_parts((out[0], out[1], tile[1]), b_top, b_row_total, place[0], place[2])
            store_parts((out[2], out[3], tile[0]), b_top, b_col_total, place[1], place[3])
        return n_inexact == 0
    else:
        return both_by_two(b_s, out, target, tile, place, HALVES, FAST)


@triton.jit
def both_by_two(b_s, out, target, tile, place, HALVES: tl.constexpr, FAST: tl.constexpr):
    """Rows and columns, each line from its own maximum. By halves, whose exponentials fit beside the logits."""
    i_row, i_col, n, m = place
    HALF: tl.constexpr = b_s.shape[1] // 2
    b_left, b_right = column_halves(b_s)
    b_top, b_total = merged(logsumexp_parts(b_left, 1), logsumexp_parts(b_right, 1))
    store_parts((out[0], out[1], tile[1]), b_top, b_total, i_row, n)
    b_left_top, b_left_total = logsumexp_parts(b_left, 0)
    store_parts((out[2], out[3], tile[0]), b_left_top, b_left_total, i_col, m)
    b_right_top, b_right_total = logsumexp_parts(b_right, 0)
    store_parts((out[2], out[3], tile[0]), b_right_top, b_right_total, i_col + HALF, m)
    return True


@triton.jit
def rows(b_s, out, target, tile, place, HALVES: tl.constexpr, FAST: tl.constexpr):
    b_top, b_total = logsumexp_parts(b_s, 1)
    store_parts((out[0], out[1], tile[1]), b_top, b_total, place[0], place[2])
    return True


@triton.jit
def columns(b_s, out, target, tile, place, HALVES: tl.constexpr, FAST: tl.constexpr):
    b_top, b_total = logsumexp_parts(b_s, 0)
    store_parts((out[0], out[1], tile[0]), b_top, b_total, place[1], place[3])
    return True


@triton.jit
def rows_stored(b_s, out, target, tile, place, HALVES: tl.constexpr, FAST: tl.constexpr):
    """Rows, and the tile's exponentials: exp2(s2 - reference of its row), the reference being the third of `out`."""
    return one_direction_stored(b_s, out, target, tile, place, 1, HALVES, FAST)


@triton.jit
def columns_stored(b_s, out, target, tile, place, HALVES: tl.constexpr, FAST: tl.constexpr):
    return one_direction_stored(b_s, out, target, tile, place, 0, HALVES, FAST)


@triton.jit
def one_direction_stored(b_s, out, target, tile, place, AXIS: tl.constexpr, HALVES: tl.constexpr, FAST: tl.constexpr):
    p_top, p_total, p_reference = out
    parts = (p_top, p_total, tile[AXIS])
    i_line, n_lines = place[1 - AXIS], place[3 - AXIS]
    if FAST:
        b_total = store_exponentials(b_s, target, p_reference, place, AXIS, HALVES)
        n_inexact = count_inexact(b_total, i_line, n_lines)
        if n_inexact == 0:
            b_reference = tl.load(p_reference + i_line + tl.arange(0, b_total.shape[0]))
            store_parts(parts, b_reference, b_total, i_line, n_lines)
        return n_inexact == 0
    else:
        b_top, b_total = logsumexp_parts(b_s, AXIS)
        store_parts(parts, b_top, b_total, i_line, n_lines)
        return True


@triton.jit
def store_exponentials(b_s, target, p_reference, place, AXIS: tl.constexpr, HALVES: tl.constexpr):
    """Writes e = exp2(s2 - reference of its row) (AXIS 1; column: 0), 0 at what the statistics leave out; returns its sums."""
    i_row, i_col, n, m = place
    if HALVES:
        HALF: tl.constexpr = b_s.shape[1] // 2
        b_left, b_right = column_halves(b_s)
        b_left_total = store_exponentials(b_left, target, p_reference, place, AXIS, False)
        b_right_total = store_exponentials(b_right, target, p_reference, (i_row, i_col + HALF, n, m), AXIS, False)
        if AXIS == 1:
            return b_left_total + b_right_total
        else:
            return tl.reshape(tl.permute(tl.join(b_left_total, b_right_total), (1, 0)), (b_s.shape[1],))
    else:
        o_line = place[1 - AXIS] + tl.arange(0, b_s.shape[1 - AXIS])
        b_e = tl.exp2(b_s - tl.expand_dims(tl.load(p_reference + o_line), AXIS))
        store_block(b_e, target, place)
        return tl.sum(b_e, AXIS)


@triton.jit
def logsumexp_parts(b_s, AXIS: tl.constexpr):
    """(max, sum of exp2(s - max)) along one axis: exact for any logits. -inf and 0 where all of a line is -inf."""
    b_top = tl.max(b_s, AXIS)
    b_reference = tl.where(b_top == float("-inf"), 0.0, b_top)
    return b_top, tl.sum(tl.exp2(b_s - tl.expand_dims(b_reference, AXIS)), AXIS)


@triton.jit
def shared_logsumexp_parts(b_s):
    """(max of the tile, row sums, column sums) of e = exp2(s - max): one exponential a logit for both directions.

    On sm_90 a row's columns lie within a thread and its three neighbours, but a column's rows across eight threads of a warp:
    the column sums of a 128 x 256 tile are 192 shuffles a thread, 1,536 cycles of a multiprocessor beside 12,288 of products
    at D = 768. Halving the columns at each exchange would take 56; Triton's reductions do not.
    """
    b_top = tl.max(tl.max(b_s, 1), 0)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_e = tl.exp2(b_s - b_top)
    return b_top, tl.sum(b_e, 1), tl.sum(b_e, 0)


@triton.jit
def count_inexact(b_total, i_first, n_lines):
    """How many lines lie so far below the tile's maximum that their sums leave float32's range.

    A line with nothing visible, an infinity and a NaN show in the same way; hence "not >=" and not "<".
    """
    m_line = i_first + tl.arange(0, b_total.shape[0]) < n_lines
    return tl.sum((m_line & ~(b_total >= SAFE_SUM)).to(tl.int32), 0)


@triton.jit
def merged(parts, other):
    """The (max, sum) of the union of two sets of pairs, line by line."""
    b_top = tl.maximum(parts[0], other[0])
    b_reference = tl.where(b_top == float("-inf"), 0.0, b_top)
    return b_top, parts[1] * tl.exp2(parts[0] - b_reference) + other[1] * tl.exp2(other[0] - b_reference)


@triton.jit
def store_parts(parts, b_top, b_total, i_first, n_lines):
    """The (max, sum) of a tile's rows or columns, at [tile, line]."""
    p_top, p_total, i_tile = parts
    o_line = i_first + tl.arange(0, b_total.shape[0])
    o_part = i_tile.to(tl.int64) * n_lines + o_line
    tl.store(p_top + o_part, b_top, mask=o_line < n_lines)
    tl.store(p_total + o_part, b_total, mask=o_line < n_lines)


# Backward. Each direction's softmax arrives as g exp(s - lse) = gain * exp2(s2 - reference), `base2.Line`.


@triton.jit
def one_exponential_is_exact(lines, place, seen):
    """Whether `shared_gradient` is: no factor of it over- or underflows where it matters. False for NaN.

    Two numbers say so, the tile's highest row and its lowest column, each relative to the factors' middle. `lines.pack` takes
    them: reductions over the tile's own lines would stand before its first loads. Read before the products and compared after,
    they arrive meanwhile.
    """
    if seen is None:
        row, col = lines
        return tl.load(row[0] + 3 * row[1] + place[0]), tl.load(col[0] + 3 * col[1] + place[1])
    else:
        high, low = seen
        return (high - low <= SAFE_SPREAD) & (high <= SAFE_SPREAD) & (-low <= SAFE_SPREAD)


@triton.jit
def gradient(b_s, lines, place, FAST: tl.constexpr):
    if FAST:
        return shared_gradient(b_s, lines, place)
    else:
        return gradient_by_line(b_s, lines, place)


@triton.jit
def clamped_gradient(b_s, lines, place, FAST: tl.constexpr):
    """`gradient` where no softmax is above 2.

    A pair that a limit hid from its lines may be seen here, within one rounding of the limit. 2 and not 1, since a pair that is
    alone in its line may exceed the line's logsumexp by a rounding.
    """
    row, col = lines[0], lines[1]
    if row is not None:
        b_r = tl.load(row[0] + place[0] + tl.arange(0, b_s.shape[0]))
        b_s = tl.minimum(b_s, b_r[:, None] + 1, propagate_nan=tl.PropagateNan.ALL)
    if col is not None:
        b_c = tl.load(col[0] + place[1] + tl.arange(0, b_s.shape[1]))
        b_s = tl.minimum(b_s, b_c[None, :] + 1, propagate_nan=tl.PropagateNan.ALL)
    return gradient(b_s, lines, place, FAST)


@triton.jit
def shared_gradient(b_s, lines, place):
    """`gradient_by_line` of both directions from e = exp2(s2 - r_i) alone, which is at most 1 because s2 <= r_i:

    e * (gain_i + exp2(r_i - middle) * g_col_j exp2(middle - c_j)), the last two being the third row of each line.
    """
    row, col = lines[0], lines[1]
    p_row, p_col = row[0] + place[0] + tl.arange(0, b_s.shape[0]), col[0] + place[1] + tl.arange(0, b_s.shape[1])
    b_r, b_gain, b_left = tl.load(p_row), tl.load(p_row + row[1]), tl.load(p_row + 2 * row[1])
    b_right = tl.load(p_col + 2 * col[1])
    return tl.exp2(b_s - b_r[:, None]) * (b_gain[:, None] + b_left[:, None] * b_right[None, :])


@triton.jit
def gradient_by_line(b_s, lines, place):
    """G without its positives, g_row_i exp(s_ij - row_i) + g_col_j exp(s_ij - col_j), exact for any logits."""
    row, col = lines[0], lines[1]
    b_g = tl.zeros(b_s.shape, tl.float32)
    if row is not None:
        p_row = row[0] + place[0] + tl.arange(0, b_s.shape[0])
        b_g += tl.exp2(b_s - tl.load(p_row)[:, None]) * tl.load(p_row + row[1])[:, None]
    if col is not None:
        p_col = col[0] + place[1] + tl.arange(0, b_s.shape[1])
        b_g += tl.exp2(b_s - tl.load(p_col)[None, :]) * tl.load(p_col + col[1])[None, :]
    return b_g
