"""A tile of the N x M plane: where it is, its logits, its labels, its place in memory. Nothing here knows a loss.

Names: `p_` pointers, `b_` blocks of values, `o_` offsets, `m_` masks, `i_` first row or column of a tile. A launch covers a
chunk of n rows and m columns: offsets are within the chunk, below 2^31, and become int64 before they meet a stride. What
travels together is a tuple:

    place     (i_row, i_col, n, m): where the tile is, and the chunk's extent
    operands  (lhs, rhs, strides, scale, d) as `kernels.forward_tile` takes them
    labels    (p_labels, shift, p_value): shift turns a label (a row number, for the default labels, whose p_labels is None)
              into a column of the chunk; p_value is (n, P), one number of each label
    target    (matrix, stride): a chunk-sized matrix that tiles are written to, as a descriptor or a pointer

Boundaries: nothing past the last row or column of lhs and rhs is read. Row offsets are clamped to the last one, and what is
computed there, that row once more, is neither counted nor stored; descriptors read zeros there, with the same fate. Vectors
(labels, ids, lines) are ours and padded to whole tiles (`operands.PAD`), so that they load without a mask.
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .. import base2

LOG2E = tl.constexpr(base2.LOG2E)

# Columns of a tile that a step with operands of its own takes at a time: what it holds must fit beside the logits.
NARROW = tl.constexpr(32)


@triton.jit
def tile_of_program(i_program, n, m, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column tile of this program: bands of GROUP row tiles, column by column, so that neighbours share L2."""
    n_row_tiles = tl.cdiv(n, BLOCK_ROWS)
    n_col_tiles = tl.cdiv(m, BLOCK_COLS)
    i_band = i_program // (GROUP * n_col_tiles)
    i_in_band = i_program % (GROUP * n_col_tiles)
    band_height = tl.minimum(n_row_tiles - i_band * GROUP, GROUP)
    return i_band * GROUP + i_in_band % band_height, i_in_band // band_height


INTERPRETED = tl.constexpr(not isinstance(tile_of_program, triton.JITFunction))


@triton.jit
def clamped(i_first, n, BLOCK: tl.constexpr):
    """Offsets of a block of lines, the last line repeated where the block reaches past it."""
    return tl.minimum(i_first + tl.arange(0, BLOCK), n - 1)


@triton.jit
def dot(b_x, b_y, b_acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16; in float32 the same products are exact
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, tl.trans(b_y), b_acc, input_precision=PRECISION)


@triton.jit
def logits(
    operands,
    place,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s2 = scale log2(e) <x_i, y_j> of one tile, float32."""
    b_acc = products(operands, place, BLOCK_ROWS, BLOCK_COLS, BLOCK_D, WHOLE_D, PRECISION)
    return scaled(b_acc, scale_in_base2(operands[3]))


@triton.jit
def products(
    operands,
    place,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<x_i, y_j> of one tile, float32. The tail of D is read as zeros on both sides."""
    lhs, rhs, strides, _, d = operands
    i_row, i_col, n, m = place
    b_acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    if isinstance(lhs, tl.tensor_descriptor):
        for i_d in range(0, d, BLOCK_D):
            b_x = lhs.load([i_row, i_d])
            b_y = rhs.load([i_col, i_d])
            b_acc = dot(b_x, b_y, b_acc, PRECISION)
    else:
        o_d = tl.arange(0, BLOCK_D)
        p_x = lhs + clamped(i_row, n, BLOCK_ROWS).to(tl.int64)[:, None] * strides[0] + o_d[None, :]
        p_y = rhs + clamped(i_col, m, BLOCK_COLS).to(tl.int64)[:, None] * strides[1] + o_d[None, :]
        for i_d in range(0, d, BLOCK_D):
            if WHOLE_D:
                b_x, b_y = tl.load(p_x), tl.load(p_y)
            else:
                # d is a multiple of 16 here (`operands.operand`): the mask does not narrow the loads
                m_d = (o_d < d - i_d)[None, :]
                b_x, b_y = tl.load(p_x, mask=m_d, other=0.0), tl.load(p_y, mask=m_d, other=0.0)
            b_acc = dot(b_x, b_y, b_acc, PRECISION)
            p_x += BLOCK_D
            p_y += BLOCK_D
    return b_acc


@triton.jit
def scale_in_base2(scale):
    """scale log2(e) as the sum of two float32 numbers, of which the second is there for float32 inputs alone.

    Rounded to one float32 the scale would move all logits by up to 3e-8 of themselves: float32 inputs take its rest as well.
    """
    exact = tl.load(scale[0]).to(tl.float64) * LOG2E
    high = exact.to(tl.float32)
    if scale[1] is None:
        return (high,)
    else:
        return high, (tl.load(scale[1]).to(tl.float64) * LOG2E - high.to(tl.float64)).to(tl.float32)


@triton.jit
def scaled(b_acc, scale2):
    if len(scale2) == 1:
        return b_acc * scale2[0]
    else:
        return b_acc * scale2[0] + b_acc * scale2[1]


@triton.jit
def store_block(b_x, target, place):
    """Writes a block to its place in the matrix, in the matrix's dtype."""
    matrix, stride = target
    i_row, i_col, n, m = place
    if isinstance(matrix, tl.tensor_descriptor):
        matrix.store([i_row, i_col], b_x.to(matrix.dtype))
    else:
        o_row, o_col = i_row + tl.arange(0, b_x.shape[0]), i_col + tl.arange(0, b_x.shape[1])
        p_x = matrix + o_row.to(tl.int64)[:, None] * stride + o_col[None, :]
        tl.store(p_x, b_x.to(matrix.dtype.element_ty), mask=(o_row < n)[:, None] & (o_col < m)[None, :])


# Parts of a tile.


@triton.jit
def column_halves(b_s):
    """The left and the right half of a tile, which cost no data movement."""
    return tl.split(tl.permute(tl.reshape(b_s, (b_s.shape[0], 2, b_s.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def joined(b_left, b_right):
    """The tile of which these are the halves."""
    return tl.reshape(tl.permute(tl.join(b_left, b_right), (0, 2, 1)), (b_left.shape[0], 2 * b_left.shape[1]))


@triton.jit
def in_narrow_parts(b_s, STEP: tl.constexpr, arguments, i_first):
    """`STEP(part, arguments, first column)` of every NARROW columns of a tile, joined again.

    Whatever a step compares with, a column number or an id for each column, is then held for a few columns at a time. For
    all columns it would need as many registers as the logits do.
    """
    if b_s.shape[1] > NARROW:
        HALF: tl.constexpr = b_s.shape[1] // 2
        b_left, b_right = column_halves(b_s)
        b_left = in_narrow_parts(b_left, STEP, arguments, i_first)
        b_right = in_narrow_parts(b_right, STEP, arguments, i_first + HALF)
        return joined(b_left, b_right)
    else:
        return STEP(b_s, arguments, i_first)


@triton.jit
def put_in_part(b_s, arguments, i_first):
    b_label, b_value = arguments
    return tl.where((b_label - i_first)[:, None] == tl.arange(0, b_s.shape[1])[None, :], b_value[:, None], b_s)


@triton.jit
def put(b_s, b_label, b_value):
    """The tile with b_value[i] at [i, b_label[i]], for labels within it."""
    return in_narrow_parts(b_s, put_in_part, (b_label, b_value), 0)


@triton.jit
def cut_part(b_s, width, i_first):
    return tl.where((tl.arange(0, b_s.shape[1]) < width - i_first)[None, :], b_s, float("-inf"))


@triton.jit
def cut(b_s, width):
    """The tile with -inf in its columns from `width` on."""
    return in_narrow_parts(b_s, cut_part, width, 0)


@triton.jit
def pick(b_s, b_label):
    """b_s[i, label_i] for labels within the tile, 0 for others; in narrow parts too."""
    if b_s.shape[1] > NARROW:
        HALF: tl.constexpr = b_s.shape[1] // 2
        b_left, b_right = column_halves(b_s)
        return pick(b_left, b_label) + pick(b_right, b_label - HALF)
    else:
        return tl.sum(tl.where(b_label[:, None] == tl.arange(0, b_s.shape[1])[None, :], b_s, 0.0), 1)


# Labels. Positives do not pass through a tile's float32 sums: the forward reads them off, the backward puts G's entries back.


@triton.jit
def label_of(labels, o_row, i_label, LABELS: tl.constexpr):
    """Each row's i-th positive as a column of the chunk; below 0 or past the end where it is elsewhere or there is none."""
    p_labels, shift = labels[0], labels[1]
    if p_labels is None:
        return o_row + shift
    else:
        return tl.load(p_labels + o_row.to(tl.int64) * LABELS + i_label) + shift


@triton.jit
def holds_a_label(labels, place, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, LABELS: tl.constexpr):
    """Whether a positive lies in the tile: few tiles hold one, and only they pay for it."""
    i_row, i_col = place[0], place[1]
    if labels[0] is None:
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
def read_positives(b_s, terms, labels, place, MODIFY: tl.constexpr, LABELS: tl.constexpr):
    """value[i, p] = s2[i, t_ip] for the labels in this tile, with MODIFY's terms. Each lies in exactly one tile: no two programs
    write it."""
    i_row, i_col, n, m = place
    p_value = labels[2]
    o_row = i_row + tl.arange(0, b_s.shape[0])
    for i_label in range(LABELS):
        b_label = label_of(labels, o_row, i_label, LABELS)
        b_positive = pick(b_s, b_label - i_col)
        m_inside = (o_row < n) & (b_label >= i_col) & (b_label < tl.minimum(i_col + b_s.shape[1], m))
        b_positive = MODIFY(b_positive, terms, b_label, m_inside)
        tl.store(p_value + o_row.to(tl.int64) * LABELS + i_label, b_positive, mask=m_inside)


@triton.jit
def hide_positives(b_s, labels, o_row, i_col, LABELS: tl.constexpr):
    """The logits with -inf at the labels."""
    for i_label in range(LABELS):
        b_label = label_of(labels, o_row, i_label, LABELS) - i_col
        b_s = put(b_s, b_label, tl.full((b_s.shape[0],), float("-inf"), tl.float32))
    return b_s


@triton.jit
def write_positives(b_g, labels, place, LABELS: tl.constexpr):
    """G with value[i, p] at the labels, where p - 1 was taken in float64 beforehand."""
    p_value = labels[2]
    o_row = place[0] + tl.arange(0, b_g.shape[0])
    for i_label in range(LABELS):
        b_label = label_of(labels, o_row, i_label, LABELS) - place[1]
        b_g = put(b_g, b_label, tl.load(p_value + o_row.to(tl.int64) * LABELS + i_label))
    return b_g
