"""The kernels. Two of them make the N x M logits tile by tile; neither writes them to memory.

    forward_tile     one tile of s = scale lhs rhs^T  ->  (max, sum of exponentials) of its rows and of its columns, positives
    merge_partials   those pairs over all tiles of a line  ->  one pair a line
    backward_tile    the same tile again  ->  the same tile of G, the gradient with respect to s

The two gradient products, dlhs = scale G rhs and drhs = scale G^T lhs, are library GEMMs (``launch``).

Logits are in base 2, ``s2 = s log2(e)``, because exp2 is what the hardware has. Both passes need a tile's softmax by rows and by
columns, and take both from ONE exponential a logit. Where that would be inexact (one scalar says so for the whole tile) the tile
is made a second time, in the form with two exponentials: holding its logits back instead would cost every other tile the
registers.

Names: ``p_`` pointers, ``b_`` blocks of values, ``o_`` offsets, ``m_`` masks, ``i_`` first row or column of a tile. A launch
covers a chunk of n rows and m columns: offsets are within the chunk, below 2^31, and become int64 before they meet a stride.
What travels together is a tuple:

    place     (i_row, i_col, n, m): where the tile is, and the chunk's extent
    operands  (lhs, rhs, lhs_stride, rhs_stride, d, p_scale)
    labels    (p_labels, shift): shift turns a label (a row number, for the default labels) into a column of the chunk
    ids       (p_lhs_ids, p_rhs_ids, lhs_ids_stride, rhs_ids_stride): (channels, lines) int32, ``launch.compress_ids``
    line      (p_line, stride): (3, lines) float32, a direction's softmax, ``launch.packed``

Boundaries: nothing past the last row or column of lhs and rhs is read. Row offsets are clamped to the last one, and what is
computed there, that row once more, is neither counted nor stored; descriptors read zeros there, with the same fate. Vectors
(labels, ids, lines) are ours and padded to whole tiles (``launch.PAD``), so that they load without a mask.
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

# The widest spread, in powers of two, over which one exponential serves rows and columns. float32 reaches down to 2^-126:
# what a factor of 2^-100 flushes to zero is below 2^-26 of the line's sum, less than the sum's own rounding.
SAFE_SPREAD = tl.constexpr(100.0)
SAFE_SUM = tl.constexpr(2.0**-100)

# Columns of a tile that a step with operands of its own takes at a time: what it holds must fit beside the logits.
NARROW = tl.constexpr(32)

# They change from batch to batch: none may be compiled in, or every ragged last batch would compile its own kernel.
SIZES = ["n", "m", "shift"]


# The steps of both tile kernels.


@triton.jit
def tile_of_program(n, m, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column tile of this program: bands of GROUP row tiles, column by column, so that neighbours share L2."""
    n_row_tiles = tl.cdiv(n, BLOCK_ROWS)
    n_col_tiles = tl.cdiv(m, BLOCK_COLS)
    i_program = tl.program_id(0)
    i_band = i_program // (GROUP * n_col_tiles)
    i_in_band = i_program % (GROUP * n_col_tiles)
    band_height = tl.minimum(n_row_tiles - i_band * GROUP, GROUP)
    return i_band * GROUP + i_in_band % band_height, i_in_band // band_height


@triton.jit
def clamped(i_first, n, BLOCK: tl.constexpr):
    """Offsets of a block of lines, the last line repeated where the block reaches past it."""
    return tl.minimum(i_first + tl.arange(0, BLOCK), n - 1)


@triton.jit
def dot(b_x, b_y, b_acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16; in float32 the same products are exact
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, tl.trans(b_y), b_acc, input_precision=PRECISION)


@triton.jit
def logits(
    operands,
    place,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL_SCALE: tl.constexpr,
):
    """s2 = scale log2(e) <x_i, y_j> of one tile, float32. The tail of D is read as zeros on both sides.

    Rounded to one float32 the scale would move all logits by up to 3e-8 of themselves: float32 inputs take its rest as well.
    """
    lhs, rhs, lhs_stride, rhs_stride, d, p_scale = operands
    i_row, i_col, n, m = place
    b_acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    if DESCRIPTORS:
        for i_d in range(0, d, BLOCK_D):
            b_x = lhs.load([i_row, i_d])
            b_y = rhs.load([i_col, i_d])
            b_acc = dot(b_x, b_y, b_acc, WIDEN, PRECISION)
    else:
        o_d = tl.arange(0, BLOCK_D)
        p_x = lhs + clamped(i_row, n, BLOCK_ROWS).to(tl.int64)[:, None] * lhs_stride + o_d[None, :]
        p_y = rhs + clamped(i_col, m, BLOCK_COLS).to(tl.int64)[:, None] * rhs_stride + o_d[None, :]
        for i_d in range(0, d, BLOCK_D):
            if WHOLE_D:
                b_x, b_y = tl.load(p_x), tl.load(p_y)
            else:
                # d is a multiple of 16 here (``launch.operand``): the mask does not narrow the loads
                m_d = (o_d < d - i_d)[None, :]
                b_x, b_y = tl.load(p_x, mask=m_d, other=0.0), tl.load(p_y, mask=m_d, other=0.0)
            b_acc = dot(b_x, b_y, b_acc, WIDEN, PRECISION)
            p_x += BLOCK_D
            p_y += BLOCK_D
    if FULL_SCALE:
        return b_acc * tl.load(p_scale) + b_acc * tl.load(p_scale + 1)
    else:
        return b_acc * tl.load(p_scale)


@triton.jit
def column_halves(b_s, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The left and the right half of a tile, which cost no data movement."""
    return tl.split(tl.permute(tl.reshape(b_s, (BLOCK_ROWS, 2, BLOCK_COLS // 2)), (0, 2, 1)))


@triton.jit
def label_of(labels, o_row, i_label, LABELS: tl.constexpr):
    """Each row's i-th positive as a column of the chunk; below 0 or past the end where it is elsewhere or there is none."""
    p_labels, shift = labels
    if LABELS == 0:
        return o_row + shift
    else:
        return tl.load(p_labels + o_row.to(tl.int64) * LABELS + i_label) + shift


@triton.jit
def holds_a_label(labels, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, LABELS: tl.constexpr):
    """Whether a positive lies in the tile: few tiles hold one, and only they pay for it."""
    i_row, i_col = place[0], place[1]
    if LABELS == 0:
        first = i_row + labels[1]
        return (first < i_col + BLOCK_COLS) & (first + BLOCK_ROWS > i_col)
    else:
        o_row = i_row + tl.arange(0, BLOCK_ROWS)
        b_count = tl.zeros((BLOCK_ROWS,), tl.int32)
        for i_label in range(LABELS):
            b_label = label_of(labels, o_row, i_label, LABELS)
            b_count += ((b_label >= i_col) & (b_label < i_col + BLOCK_COLS)).to(tl.int32)
        return tl.max(b_count, 0) > 0


@triton.jit
def hidden(ids, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a pair is a false negative: an equal id in any channel."""
    p_left, p_right, left_stride, right_stride = ids
    o_row, o_col = place[0] + tl.arange(0, BLOCK_ROWS), place[1] + tl.arange(0, BLOCK_COLS)
    m_hidden = tl.load(p_left + o_row)[:, None] == tl.load(p_right + o_col)[None, :]
    for i_channel in tl.static_range(1, CHANNELS):
        b_left = tl.load(p_left + i_channel * left_stride.to(tl.int64) + o_row)
        b_right = tl.load(p_right + i_channel * right_stride.to(tl.int64) + o_col)
        m_hidden = m_hidden | (b_left[:, None] == b_right[None, :])
    return m_hidden


@triton.jit
def joined(b_left, b_right, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The tile of which these are the halves."""
    return tl.reshape(tl.permute(tl.join(b_left, b_right), (0, 2, 1)), (BLOCK_ROWS, BLOCK_COLS))


@triton.jit
def store_block(
    b_x, target, stride, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """A tile's place in the chunk-sized matrix ``target``, in its dtype."""
    i_row, i_col, n, m = place
    if DESCRIPTORS:
        target.store([i_row, i_col], b_x.to(target.dtype))
    else:
        o_row, o_col = i_row + tl.arange(0, BLOCK_ROWS), i_col + tl.arange(0, BLOCK_COLS)
        p_x = target + o_row.to(tl.int64)[:, None] * stride + o_col[None, :]
        tl.store(p_x, b_x.to(target.dtype.element_ty), mask=(o_row < n)[:, None] & (o_col < m)[None, :])


# The steps below take the tile in narrow parts: whatever they compare with, a column number or an id for each column, is then
# held for a few columns at a time. For all columns it would need as many registers as the logits do.


@triton.jit
def put(b_s, b_label, b_value, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The tile with b_value[i] at [i, b_label[i]], for labels within it."""
    if BLOCK_COLS > NARROW:
        HALF: tl.constexpr = BLOCK_COLS // 2
        b_left, b_right = column_halves(b_s, BLOCK_ROWS, BLOCK_COLS)
        b_left = put(b_left, b_label, b_value, BLOCK_ROWS, HALF)
        b_right = put(b_right, b_label - HALF, b_value, BLOCK_ROWS, HALF)
        return joined(b_left, b_right, BLOCK_ROWS, BLOCK_COLS)
    else:
        return tl.where(b_label[:, None] == tl.arange(0, BLOCK_COLS)[None, :], b_value[:, None], b_s)


@triton.jit
def cut(b_s, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The tile with -inf in its columns from ``width`` on."""
    if BLOCK_COLS > NARROW:
        HALF: tl.constexpr = BLOCK_COLS // 2
        b_left, b_right = column_halves(b_s, BLOCK_ROWS, BLOCK_COLS)
        b_left = cut(b_left, width, BLOCK_ROWS, HALF)
        b_right = cut(b_right, width - HALF, BLOCK_ROWS, HALF)
        return joined(b_left, b_right, BLOCK_ROWS, BLOCK_COLS)
    else:
        return tl.where((tl.arange(0, BLOCK_COLS) < width)[None, :], b_s, float("-inf"))


@triton.jit
def hide_false_negatives(b_s, ids, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, CHANNELS: tl.constexpr):
    """The logits with -inf at false negatives."""
    i_row, i_col, n, m = place
    if BLOCK_COLS > NARROW:
        HALF: tl.constexpr = BLOCK_COLS // 2
        b_left, b_right = column_halves(b_s, BLOCK_ROWS, BLOCK_COLS)
        b_left = hide_false_negatives(b_left, ids, place, BLOCK_ROWS, HALF, CHANNELS)
        b_right = hide_false_negatives(b_right, ids, (i_row, i_col + HALF, n, m), BLOCK_ROWS, HALF, CHANNELS)
        return joined(b_left, b_right, BLOCK_ROWS, BLOCK_COLS)
    else:
        return tl.where(hidden(ids, place, BLOCK_ROWS, BLOCK_COLS, CHANNELS), float("-inf"), b_s)


# Forward.


@triton.jit
def negatives(
    b_s,
    ids,
    labels,
    place,
    has_label,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    LABELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The logits with -inf at what the tile's statistics leave out: past the end, false negatives, positives.

    Positives join their lines in float64 at the end: beside a well-trained pair's positive, float32 would round away the
    negatives, and they are its loss.
    """
    i_row, i_col, n, m = place
    o_row = i_row + tl.arange(0, BLOCK_ROWS)
    if CHANNELS > 0:
        b_s = hide_false_negatives(b_s, ids, place, BLOCK_ROWS, BLOCK_COLS, CHANNELS)
    if has_label:
        for i_label in range(LABELS if LABELS > 0 else 1):
            b_label = label_of(labels, o_row, i_label, LABELS) - i_col
            b_s = put(b_s, b_label, tl.full((BLOCK_ROWS,), float("-inf"), tl.float32), BLOCK_ROWS, BLOCK_COLS)
    if (i_row + BLOCK_ROWS > n) | (i_col + BLOCK_COLS > m):
        b_s = cut(tl.where((o_row < n)[:, None], b_s, float("-inf")), m - i_col, BLOCK_ROWS, BLOCK_COLS)
    return b_s


@triton.jit
def pick(b_s, b_label, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """b_s[i, label_i] for labels within the tile, 0 for others."""
    if BLOCK_COLS > NARROW:
        b_left, b_right = column_halves(b_s, BLOCK_ROWS, BLOCK_COLS)
        return pick(b_left, b_label, BLOCK_ROWS, BLOCK_COLS // 2) + pick(
            b_right, b_label - BLOCK_COLS // 2, BLOCK_ROWS, BLOCK_COLS // 2
        )
    else:
        return tl.sum(tl.where(b_label[:, None] == tl.arange(0, BLOCK_COLS)[None, :], b_s, 0.0), 1)


@triton.jit
def read_positives(
    p_positive, b_s, labels, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, LABELS: tl.constexpr
):
    """positive[i, p] = s2[i, t_ip] for the labels in this tile. Each lies in exactly one: no two programs write it."""
    i_row, i_col, n, m = place
    N_LABELS: tl.constexpr = LABELS if LABELS > 0 else 1
    o_row = i_row + tl.arange(0, BLOCK_ROWS)
    for i_label in range(N_LABELS):
        b_label = label_of(labels, o_row, i_label, LABELS)
        b_positive = pick(b_s, b_label - i_col, BLOCK_ROWS, BLOCK_COLS)
        m_inside = (o_row < n) & (b_label >= i_col) & (b_label < tl.minimum(i_col + BLOCK_COLS, m))
        tl.store(p_positive + o_row.to(tl.int64) * N_LABELS + i_label, b_positive, mask=m_inside)


@triton.jit
def logsumexp_parts(b_s, AXIS: tl.constexpr):
    """(max, sum of exp2(s - max)) along one axis: exact for any logits. -inf and 0 where all of a line is -inf."""
    b_top = tl.max(b_s, AXIS)
    b_reference = tl.where(b_top == float("-inf"), 0.0, b_top)
    return b_top, tl.sum(tl.exp2(b_s - tl.expand_dims(b_reference, AXIS)), AXIS)


@triton.jit
def merged(parts, other):
    """The (max, sum) of the union of two sets of pairs, line by line."""
    b_top = tl.maximum(parts[0], other[0])
    b_reference = tl.where(b_top == float("-inf"), 0.0, b_top)
    return b_top, parts[1] * tl.exp2(parts[0] - b_reference) + other[1] * tl.exp2(other[0] - b_reference)


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
def count_inexact(b_total, i_first, n_lines, BLOCK: tl.constexpr):
    """How many lines lie so far below the tile's maximum that their sums leave float32's range.

    A line with nothing visible, an infinity and a NaN show in the same way; hence "not >=" and not "<".
    """
    m_line = i_first + tl.arange(0, BLOCK) < n_lines
    return tl.sum((m_line & ~(b_total >= SAFE_SUM)).to(tl.int32), 0)


@triton.jit
def store_parts(parts, b_top, b_total, i_first, n_lines, BLOCK: tl.constexpr):
    """The (max, sum) of a tile's rows or columns, at [tile, line]."""
    p_top, p_total, i_tile = parts
    o_line = i_first + tl.arange(0, BLOCK)
    o_part = i_tile.to(tl.int64) * n_lines + o_line
    tl.store(p_top + o_part, b_top, mask=o_line < n_lines)
    tl.store(p_total + o_part, b_total, mask=o_line < n_lines)


@triton.jit
def store_both_parts(b_s, row_parts, col_parts, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Each line from its own maximum: two exponentials a logit. By halves, whose exponentials fit beside the logits."""
    i_row, i_col, n, m = place
    HALF: tl.constexpr = BLOCK_COLS // 2
    b_left, b_right = column_halves(b_s, BLOCK_ROWS, BLOCK_COLS)
    b_top, b_total = merged(logsumexp_parts(b_left, 1), logsumexp_parts(b_right, 1))
    store_parts(row_parts, b_top, b_total, i_row, n, BLOCK_ROWS)
    b_left_top, b_left_total = logsumexp_parts(b_left, 0)
    store_parts(col_parts, b_left_top, b_left_total, i_col, m, HALF)
    b_right_top, b_right_total = logsumexp_parts(b_right, 0)
    store_parts(col_parts, b_right_top, b_right_total, i_col + HALF, m, HALF)


@triton.jit
def keep_exponentials(
    b_s,
    kept,
    stride,
    p_reference,
    place,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    AXIS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Writes e = exp2(s2 - reference of its row) (AXIS 1; column: 0), 0 at what the statistics leave out; returns its sums."""
    i_row, i_col, n, m = place
    if HALVES:
        HALF: tl.constexpr = BLOCK_COLS // 2
        b_left, b_right = column_halves(b_s, BLOCK_ROWS, BLOCK_COLS)
        b_left_total = keep_exponentials(
            b_left, kept, stride, p_reference, place, BLOCK_ROWS, HALF, AXIS, DESCRIPTORS, False
        )
        place = (i_row, i_col + HALF, n, m)
        b_right_total = keep_exponentials(
            b_right, kept, stride, p_reference, place, BLOCK_ROWS, HALF, AXIS, DESCRIPTORS, False
        )
        if AXIS == 1:
            return b_left_total + b_right_total
        else:
            return tl.reshape(tl.permute(tl.join(b_left_total, b_right_total), (1, 0)), (BLOCK_COLS,))
    else:
        o_line = i_row + tl.arange(0, BLOCK_ROWS) if AXIS == 1 else i_col + tl.arange(0, BLOCK_COLS)
        b_e = tl.exp2(b_s - tl.expand_dims(tl.load(p_reference + o_line), AXIS))
        store_block(b_e, kept, stride, place, BLOCK_ROWS, BLOCK_COLS, DESCRIPTORS)
        return tl.sum(b_e, AXIS)


@triton.jit(do_not_specialize=SIZES)
def forward_tile(
    lhs,  # (n, D): descriptor or pointer, by DESCRIPTORS
    rhs,  # (m, D)
    p_scale,  # (2,) float32: logit_scale * log2(e), and what rounding took from it
    p_labels,  # (n, P) int32; not read where LABELS == 0
    p_lhs_ids,  # (K, n) int32; not read where CHANNELS == 0
    p_rhs_ids,  # (K, m)
    p_row_top,  # (column tiles, n) float32, written
    p_row_total,
    p_col_top,  # (row tiles, m) float32, written
    p_col_total,
    p_positive,  # (n, P) float32, base 2, written where a label lies in the chunk
    kept,  # (n, m) in the compute dtype, written if KEEP: descriptor or pointer, by DESCRIPTORS
    p_reference,  # float32, of each row or column, whichever is wanted; not read unless KEEP
    p_skip,  # 0-d int32: nothing is done unless 0; not read unless KEEP
    n,
    m,
    d,
    lhs_stride,
    rhs_stride,
    kept_stride,
    lhs_ids_stride,
    rhs_ids_stride,
    shift,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE_D: tl.constexpr,  # D is a multiple of BLOCK_D
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL_SCALE: tl.constexpr,
    LABELS: tl.constexpr,  # P; 0 for the default labels, row i's positive is column i
    CHANNELS: tl.constexpr,  # K, 0 without ids
    WANT_ROW: tl.constexpr,
    WANT_COL: tl.constexpr,
    ONE_EXPONENTIAL: tl.constexpr,
    KEEP: tl.constexpr,  # one direction, whose exponentials stay (``launch.forward_with_gradient``)
    HALVES: tl.constexpr,  # ... in two column halves; kept's blocks are then halves too
):
    if KEEP:  # noqa: SIM102, "and" would load in the other kernels as well
        if tl.load(p_skip) != 0:
            return
    i_row_tile, i_col_tile = tile_of_program(n, m, BLOCK_ROWS, BLOCK_COLS, GROUP)
    i_row, i_col = i_row_tile * BLOCK_ROWS, i_col_tile * BLOCK_COLS
    place = (i_row, i_col, n, m)
    operands = (lhs, rhs, lhs_stride, rhs_stride, d, p_scale)
    labels = (p_labels, shift)
    ids = (p_lhs_ids, p_rhs_ids, lhs_ids_stride, rhs_ids_stride)
    has_label = holds_a_label(labels, place, BLOCK_ROWS, BLOCK_COLS, LABELS)

    b_s = logits(operands, place, BLOCK_ROWS, BLOCK_COLS, BLOCK_D, DESCRIPTORS, WHOLE_D, WIDEN, PRECISION, FULL_SCALE)
    if has_label:
        read_positives(p_positive, b_s, labels, place, BLOCK_ROWS, BLOCK_COLS, LABELS)
    b_s = negatives(b_s, ids, labels, place, has_label, BLOCK_ROWS, BLOCK_COLS, LABELS, CHANNELS)
    row_parts, col_parts = (p_row_top, p_row_total, i_col_tile), (p_col_top, p_col_total, i_row_tile)
    if WANT_ROW and WANT_COL:
        if ONE_EXPONENTIAL:
            b_top, b_row_total, b_col_total = shared_logsumexp_parts(b_s)
            n_inexact = count_inexact(b_row_total, i_row, n, BLOCK_ROWS)
            n_inexact += count_inexact(b_col_total, i_col, m, BLOCK_COLS)
            if n_inexact == 0:
                store_parts(row_parts, b_top, b_row_total, i_row, n, BLOCK_ROWS)
                store_parts(col_parts, b_top, b_col_total, i_col, m, BLOCK_COLS)
            else:
                b_s = logits(
                    operands, place, BLOCK_ROWS, BLOCK_COLS, BLOCK_D, DESCRIPTORS, WHOLE_D, WIDEN, PRECISION, FULL_SCALE
                )
                b_s = negatives(b_s, ids, labels, place, has_label, BLOCK_ROWS, BLOCK_COLS, LABELS, CHANNELS)
                store_both_parts(b_s, row_parts, col_parts, place, BLOCK_ROWS, BLOCK_COLS)
        else:
            store_both_parts(b_s, row_parts, col_parts, place, BLOCK_ROWS, BLOCK_COLS)
    elif KEEP:
        AXIS: tl.constexpr = 1 if WANT_ROW else 0
        BLOCK: tl.constexpr = BLOCK_ROWS if WANT_ROW else BLOCK_COLS
        parts = row_parts if WANT_ROW else col_parts
        i_line, n_lines = (i_row, n) if WANT_ROW else (i_col, m)
        b_total = keep_exponentials(
            b_s, kept, kept_stride, p_reference, place, BLOCK_ROWS, BLOCK_COLS, AXIS, DESCRIPTORS, HALVES
        )
        if count_inexact(b_total, i_line, n_lines, BLOCK) == 0:
            store_parts(parts, tl.load(p_reference + i_line + tl.arange(0, BLOCK)), b_total, i_line, n_lines, BLOCK)
        else:
            b_s = logits(
                operands, place, BLOCK_ROWS, BLOCK_COLS, BLOCK_D, DESCRIPTORS, WHOLE_D, WIDEN, PRECISION, FULL_SCALE
            )
            b_s = negatives(b_s, ids, labels, place, has_label, BLOCK_ROWS, BLOCK_COLS, LABELS, CHANNELS)
            b_top, b_total = logsumexp_parts(b_s, AXIS)
            store_parts(parts, b_top, b_total, i_line, n_lines, BLOCK)
    elif WANT_ROW:
        b_row_top, b_row_total = logsumexp_parts(b_s, 1)
        store_parts(row_parts, b_row_top, b_row_total, i_row, n, BLOCK_ROWS)
    elif WANT_COL:
        b_col_top, b_col_total = logsumexp_parts(b_s, 0)
        store_parts(col_parts, b_col_top, b_col_total, i_col, m, BLOCK_COLS)


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
    p_part_top,  # (tiles, lines) float32
    p_part_total,
    p_top,  # (lines,) float32: the running pair, updated
    p_total,  # (lines,) float64
    n_lines,
    n_tiles,
    BLOCK_TILES: tl.constexpr,
    BLOCK_LINES: tl.constexpr,
):
    o_line = tl.program_id(0) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    m_line = o_line < n_lines
    b_top = tl.load(p_top + o_line, mask=m_line, other=float("-inf"))
    b_total = tl.load(p_total + o_line, mask=m_line, other=0.0)
    for i_tile in range(0, n_tiles, BLOCK_TILES):
        o_tile = i_tile + tl.arange(0, BLOCK_TILES)
        o_part = o_tile.to(tl.int64)[:, None] * n_lines + o_line[None, :]
        m_part = (o_tile < n_tiles)[:, None] & m_line[None, :]
        b_part_top = tl.load(p_part_top + o_part, mask=m_part, other=float("-inf"))
        b_part_total = tl.load(p_part_total + o_part, mask=m_part, other=0.0)
        b_top, b_total = online_logsumexp(b_top, b_total, b_part_top, b_part_total)
    tl.store(p_top + o_line, b_top, mask=m_line)
    tl.store(p_total + o_line, b_total, mask=m_line)


# Backward. Each direction's softmax arrives as g exp(s - lse) = gain * exp2(s2 - reference), ``torch_chunked.Line``.


@triton.jit
def one_exponential_is_exact(row_line, col_line, p_middle, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Whether ``shared_gradient`` is: no factor of it over- or underflows where it matters. False for NaN."""
    middle = tl.load(p_middle)
    high = tl.max(tl.load(row_line[0] + place[0] + tl.arange(0, BLOCK_ROWS)), 0)
    low = tl.min(tl.load(col_line[0] + place[1] + tl.arange(0, BLOCK_COLS)), 0)
    return (high - low <= SAFE_SPREAD) & (high - middle <= SAFE_SPREAD) & (middle - low <= SAFE_SPREAD)


@triton.jit
def shared_gradient(b_s, row_line, col_line, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """``gradient_tile`` from e = exp2(s2 - r_i) alone, which is at most 1 because s2 <= r_i:

    e * (gain_i + exp2(r_i - middle) * g_col_j exp2(middle - c_j)), the last two factors being the third row of each line.
    """
    p_row, p_col = row_line[0] + place[0] + tl.arange(0, BLOCK_ROWS), col_line[0] + place[1] + tl.arange(0, BLOCK_COLS)
    b_r, b_gain, b_left = tl.load(p_row), tl.load(p_row + row_line[1]), tl.load(p_row + 2 * row_line[1])
    b_right = tl.load(p_col + 2 * col_line[1])
    return tl.exp2(b_s - b_r[:, None]) * (b_gain[:, None] + b_left[:, None] * b_right[None, :])


@triton.jit
def gradient_tile(
    b_s,
    row_line,
    col_line,
    place,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr,
):
    """G without its positives, g_row_i exp(s_ij - row_i) + g_col_j exp(s_ij - col_j), exact for any logits."""
    p_row, p_col = row_line[0] + place[0] + tl.arange(0, BLOCK_ROWS), col_line[0] + place[1] + tl.arange(0, BLOCK_COLS)
    b_g = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    if HAS_ROW:
        b_g += tl.exp2(b_s - tl.load(p_row)[:, None]) * tl.load(p_row + row_line[1])[:, None]
    if HAS_COL:
        b_g += tl.exp2(b_s - tl.load(p_col)[None, :]) * tl.load(p_col + col_line[1])[None, :]
    return b_g


@triton.jit
def write_positives(
    b_g, p_entry, labels, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, LABELS: tl.constexpr
):
    """G with its entries at the labels, where p - 1 was taken in float64 beforehand."""
    N_LABELS: tl.constexpr = LABELS if LABELS > 0 else 1
    o_row = place[0] + tl.arange(0, BLOCK_ROWS)
    for i_label in range(N_LABELS):
        b_label = label_of(labels, o_row, i_label, LABELS) - place[1]
        b_g = put(b_g, b_label, tl.load(p_entry + o_row.to(tl.int64) * N_LABELS + i_label), BLOCK_ROWS, BLOCK_COLS)
    return b_g


@triton.jit
def store_gradient(
    b_s,
    gradient,
    stride,
    row_line,
    col_line,
    p_entry,
    labels,
    ids,
    place,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    LABELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr,
    HALVES: tl.constexpr,
    SHARED: tl.constexpr,
):
    """From the logits of a tile to its part of G: softmaxes, then positives, then one rounding."""
    i_row, i_col, n, m = place
    if HALVES:
        HALF: tl.constexpr = BLOCK_COLS // 2
        b_left, b_right = column_halves(b_s, BLOCK_ROWS, BLOCK_COLS)
        store_gradient(
            b_left, gradient, stride, row_line, col_line, p_entry, labels, ids, place,
            BLOCK_ROWS, HALF, DESCRIPTORS, LABELS, CHANNELS, HAS_ROW, HAS_COL, False, SHARED,
        )  # fmt: skip
        store_gradient(
            b_right, gradient, stride, row_line, col_line, p_entry, labels, ids, (i_row, i_col + HALF, n, m),
            BLOCK_ROWS, HALF, DESCRIPTORS, LABELS, CHANNELS, HAS_ROW, HAS_COL, False, SHARED,
        )  # fmt: skip
    else:
        has_label = holds_a_label(labels, place, BLOCK_ROWS, BLOCK_COLS, LABELS)
        if CHANNELS > 0:
            # a label that its id hides gets its entry back below
            b_s = hide_false_negatives(b_s, ids, place, BLOCK_ROWS, BLOCK_COLS, CHANNELS)
        if SHARED:
            b_g = shared_gradient(b_s, row_line, col_line, place, BLOCK_ROWS, BLOCK_COLS)
        else:
            b_g = gradient_tile(b_s, row_line, col_line, place, BLOCK_ROWS, BLOCK_COLS, HAS_ROW, HAS_COL)
        if has_label:
            b_g = write_positives(b_g, p_entry, labels, place, BLOCK_ROWS, BLOCK_COLS, LABELS)
        store_block(b_g, gradient, stride, place, BLOCK_ROWS, BLOCK_COLS, DESCRIPTORS)


@triton.jit(do_not_specialize=SIZES)
def backward_tile(
    lhs,  # these six as in forward_tile
    rhs,
    p_scale,
    p_labels,
    p_lhs_ids,
    p_rhs_ids,
    p_row_line,  # (3, n) float32: reference, gain, factor; not read unless HAS_ROW
    p_col_line,  # (3, m) float32; not read unless HAS_COL
    p_middle,  # 0-d float32
    p_entry,  # (n, P) float32: G at the labels
    gradient,  # (n, m) in the compute dtype, written: descriptor or pointer, by DESCRIPTORS
    n,
    m,
    d,
    lhs_stride,
    rhs_stride,
    gradient_stride,
    row_line_stride,
    col_line_stride,
    lhs_ids_stride,
    rhs_ids_stride,
    shift,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE_D: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL_SCALE: tl.constexpr,
    LABELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr,
    ONE_EXPONENTIAL: tl.constexpr,
    HALVES: tl.constexpr,  # the tile's epilogue in two column halves; gradient's blocks are then halves too
):
    i_row_tile, i_col_tile = tile_of_program(n, m, BLOCK_ROWS, BLOCK_COLS, GROUP)
    i_row, i_col = i_row_tile * BLOCK_ROWS, i_col_tile * BLOCK_COLS
    operands = (lhs, rhs, lhs_stride, rhs_stride, d, p_scale)
    labels = (p_labels, shift)
    ids = (p_lhs_ids, p_rhs_ids, lhs_ids_stride, rhs_ids_stride)
    row_line, col_line = (p_row_line, row_line_stride), (p_col_line, col_line_stride)
    place = (i_row, i_col, n, m)
    exact = False
    if HAS_ROW and HAS_COL and ONE_EXPONENTIAL:
        exact = one_exponential_is_exact(row_line, col_line, p_middle, place, BLOCK_ROWS, BLOCK_COLS)

    # The form is chosen before the products, so that neither form's vectors are held in registers for the other's sake.
    if exact:
        b_s = logits(
            operands, place, BLOCK_ROWS, BLOCK_COLS, BLOCK_D, DESCRIPTORS, WHOLE_D, WIDEN, PRECISION, FULL_SCALE
        )
        store_gradient(
            b_s, gradient, gradient_stride, row_line, col_line, p_entry, labels, ids, place,
            BLOCK_ROWS, BLOCK_COLS, DESCRIPTORS, LABELS, CHANNELS, HAS_ROW, HAS_COL, HALVES, True,
        )  # fmt: skip
    else:
        b_s = logits(
            operands, place, BLOCK_ROWS, BLOCK_COLS, BLOCK_D, DESCRIPTORS, WHOLE_D, WIDEN, PRECISION, FULL_SCALE
        )
        store_gradient(
            b_s, gradient, gradient_stride, row_line, col_line, p_entry, labels, ids, place,
            BLOCK_ROWS, BLOCK_COLS, DESCRIPTORS, LABELS, CHANNELS, HAS_ROW, HAS_COL, HALVES, False,
        )  # fmt: skip
