"""The sigmoid loss as a function of a tile, an epilogue of `kernels.forward_tile` with its signature as in `softmax`.

The logits are z2 = z log2(e), -inf at what is no negative. With t = exp2(-|z2|), at most 1,

    softplus(z) = max(z, 0) + log(1 + t)        sigmoid(z) = 1 / (1 + t) for z >= 0, t / (1 + t) below

are exact to a few roundings of themselves for every z. They take two operations of the special-function unit a logit, the
exponential and the reciprocal: log(1 + t) / t is a polynomial. Where a whole tile is below SMALL, as nearly all are once the bias
has learned that most pairs are no pairs, t = exp2(z2) takes one, and 1 / (1 + t) is a polynomial too.

    out     (p_sum, p_sigmoid, p_bias, p_lift): pointers to float32. Written at [tile, row]: the sums of softplus(z) and, where
            sigmoids are stored, of sigmoid(z) over the tile's columns. Read: the bias in base 2, and what stored sigmoids are
            multiplied by (None: 1), both 0-d
    target  (matrix, stride): where the sigmoids are stored, whole, or by HALVES in blocks of at most PART columns; or None
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .. import base2
from ..pointwise import PART as COLUMNS
from .tiles import column_halves, store_block

LN2 = tl.constexpr(base2.LN2)
# Columns of a tile (HALVES) whose numbers are in registers beside the logits at a time.
PART = tl.constexpr(COLUMNS)
# The base-2 logits of a small tile: t is at most 1/16.
SMALL = tl.constexpr(-4.0)


@triton.jit
def softplus_rows(b_s, out, target, tile, place, HALVES: tl.constexpr, FAST: tl.constexpr):
    """Sums of softplus by rows, and the tile's sigmoids. Exact for any logits: it is asked once."""
    p_sum, p_sigmoid, p_bias, p_lift = out
    b_z = b_s + tl.load(p_bias)
    if tl.max(tl.max(b_z, 1), 0) < SMALL:
        b_sum, b_sigmoid = sums_and_sigmoids(b_z, target, p_lift, place, HALVES, True)
    else:
        b_sum, b_sigmoid = sums_and_sigmoids(b_z, target, p_lift, place, HALVES, False)
    o_row = place[0] + tl.arange(0, b_s.shape[0])
    o_part = tile[1].to(tl.int64) * place[2] + o_row
    tl.store(p_sum + o_part, b_sum, mask=o_row < place[2])
    if p_sigmoid is not None:
        tl.store(p_sigmoid + o_part, b_sigmoid, mask=o_row < place[2])
    return True


@triton.jit
def sums_and_sigmoids(b_z, target, p_lift, place, HALVES: tl.constexpr, IS_SMALL: tl.constexpr):
    """Row sums of both, (rows,); the sigmoids are stored on the way if they are."""
    i_row, i_col, n, m = place
    if HALVES and b_z.shape[1] > PART:
        HALF: tl.constexpr = b_z.shape[1] // 2
        b_left, b_right = column_halves(b_z)
        b_sum, b_sigmoid = sums_and_sigmoids(b_left, target, p_lift, place, HALVES, IS_SMALL)
        place = (i_row, i_col + HALF, n, m)
        b_more, b_more_sigmoid = sums_and_sigmoids(b_right, target, p_lift, place, HALVES, IS_SMALL)
        return b_sum + b_more, b_sigmoid + b_more_sigmoid
    else:
        b_loss, b_sigmoid = small(b_z) if IS_SMALL else any_size(b_z)
        if target[0] is not None:
            if p_lift is None:
                store_block(b_sigmoid, target, place)
            else:
                store_block(b_sigmoid * tl.load(p_lift), target, place)
        return tl.sum(b_loss, 1), tl.sum(b_sigmoid, 1)


@triton.jit
def small(b_z):
    """(softplus(z), sigmoid(z)) for z2 < SMALL, to 2.1e-8 and 1.6e-9 of themselves besides roundings."""
    b_t = tl.exp2(b_z)
    b_loss = ((-0.22671106 * b_t + 0.33244488) * b_t - 0.49998903) * b_t + 1.0
    b_sigmoid = (((0.8583786 * b_t - 0.99250025) * b_t + 0.999835) * b_t - 0.99999875) * b_t + 1.0
    return b_t * b_loss, b_t * b_sigmoid


@triton.jit
def any_size(b_z):
    """(softplus(z), sigmoid(z)); the polynomial is within 3e-8 of log(1 + t) / t."""
    b_t = tl.exp2(-tl.abs(b_z))
    b_log = 0.0052326913 * b_t - 0.029505227
    b_log = b_log * b_t + 0.07822593
    b_log = b_log * b_t - 0.13663244
    b_log = b_log * b_t + 0.19106007
    b_log = b_log * b_t - 0.24842982
    b_log = b_log * b_t + 0.33319098
    b_log = b_log * b_t - 0.49999493
    b_log = b_log * b_t + 0.99999994
    b_loss = tl.maximum(b_z, 0.0, propagate_nan=tl.PropagateNan.ALL) * LN2 + b_t * b_log
    b_inverse = 1.0 / (1.0 + b_t)
    return b_loss, tl.where(b_z >= 0, b_inverse, b_t * b_inverse)
