"""Field aggregation: one kernel forward, one backward, each reading every input once and writing every output once.

    t = sum_f share_f x_f / |x_f|        share_f = u_f m_f / sum_g u_g m_g        out = t / |t|

A program holds whole rows of every field in registers (`config.row_block`): all its loads are under way before the first
is waited for, norms and sums follow without a second look at memory. Bytes, of s a number: forward (F + 1) N D s, backward
(2 F + 1) N D s, where plain PyTorch moves three float32 copies of a field and direction.

The forward leaves 1 / |x_f| and 1 / |t| of each row in float32, 0 for a norm of 0, 1 where nothing is normalised. Multiplied by
it, a vector without a direction stays zero and so does its gradient, in straight-line code. The backward makes t again from the
fields, in float32: the output is rounded, and projecting a gradient off it would leave that rounding in the result.

    dt   = (g - out <out, g>) / |t|
    dx_f = share_f (dt - y_f <y_f, dt>) / |x_f|        y_f = x_f / |x_f|

Names as in `tiles`. What belongs to several fields is a tuple: of pointers, of (row, element) strides, of floats.
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def addresses(p_x, strides, o_row, o_d):
    """int64 whatever the layout: an element of a transposed field lies N apart from its neighbour."""
    return p_x + o_row.to(tl.int64)[:, None] * strides[0] + o_d.to(tl.int64)[None, :] * strides[1]


@triton.jit
def load_fields(fields, strides, mask, place, HAS_MASK: tl.constexpr):
    """(values, presence) of each field in some rows: blocks as stored, 0 where absent, which is not read, and past the end."""
    p_mask, mask_strides = mask
    o_row, o_d, n, d = place
    b_fields, m_fields = (), ()
    m_row = o_row < n
    for f in tl.static_range(len(fields)):
        m_present = m_row
        if HAS_MASK:
            p_present = p_mask + o_row.to(tl.int64) * mask_strides[0] + f * mask_strides[1]
            m_present = m_row & (tl.load(p_present, mask=m_row, other=0) != 0)
        m_fields += (m_present,)
    for f in tl.static_range(len(fields)):
        m_x = m_fields[f][:, None] & (o_d < d)[None, :]
        b_fields += (tl.load(addresses(fields[f], strides[f], o_row, o_d), mask=m_x, other=0.0),)
    return b_fields, m_fields


@triton.jit
def shares(weights, m_fields, HAS_MASK: tl.constexpr):
    """Each field's share of its row's mean, (rows,): its weight over the weights of the fields present."""
    b_shares = ()
    b_present = tl.zeros(m_fields[0].shape, tl.float32)
    for f in tl.static_range(len(weights)):
        b_shares += (tl.where(m_fields[f], weights[f], 0.0),)
        b_present += b_shares[f]
    if not HAS_MASK:  # the weights already sum to 1
        return b_shares
    b_present = tl.where(b_present > 0, b_present, 1.0)
    b_parts = ()
    for f in tl.static_range(len(weights)):
        b_parts += (b_shares[f] / b_present,)
    return b_parts


@triton.jit
def inverse_norm(b_x, NORMALIZE: tl.constexpr):
    """What normalising multiplies each row by: 1 / |x|, 0 for a zero row; a NaN stays one. 1 where nothing is normalised."""
    if not NORMALIZE:
        return tl.full((b_x.shape[0],), 1.0, tl.float32)
    b_square = tl.sum(b_x * b_x, 1)
    return tl.where(b_square == 0, 0.0, 1.0 / tl.sqrt_rn(b_square))


@triton.jit
def load_norms(p_norms, m_row, N_NORMS: tl.constexpr):
    """Each row's inverse norms, before anything is stored: a load behind a store would wait for it."""
    b_norms = ()
    for k in tl.static_range(N_NORMS):
        b_norms += (tl.load(p_norms + k, mask=m_row, other=0.0),)
    return b_norms


@triton.jit
def off(b_g, b_unit):
    """The part of g that is orthogonal to a unit vector: what normalising a vector lets through of its gradient."""
    return b_g - b_unit * tl.sum(b_unit * b_g, 1)[:, None]


@triton.jit(do_not_specialize=["n"])
def aggregate_forward(
    fields,  # pointers, F of them
    p_mask,  # (n, F) bool; not read unless HAS_MASK
    p_out,  # (n, d) contiguous, written
    p_inverse_norms,  # (n, F + 1) float32, written: the fields', the total's
    n,
    d,
    strides,
    mask_strides,
    weights,  # F floats that sum to 1
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NORMALIZE_FIELDS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    N_FIELDS: tl.constexpr = len(fields)
    o_row, o_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    b_fields, m_fields = load_fields(fields, strides, (p_mask, mask_strides), (o_row, o_d, n, d), HAS_MASK)
    b_shares = shares(weights, m_fields, HAS_MASK)
    p_norms = p_inverse_norms + o_row.to(tl.int64) * (N_FIELDS + 1)
    b_total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for f in tl.static_range(N_FIELDS):
        b_x = b_fields[f].to(tl.float32)
        b_inverse = inverse_norm(b_x, NORMALIZE_FIELDS)
        tl.store(p_norms + f, b_inverse, mask=o_row < n)
        b_total += (b_shares[f] * b_inverse)[:, None] * b_x
    b_inverse = inverse_norm(b_total, NORMALIZE)
    tl.store(p_norms + N_FIELDS, b_inverse, mask=o_row < n)
    b_total *= b_inverse[:, None]
    m_out = (o_row < n)[:, None] & (o_d < d)[None, :]
    tl.store(addresses(p_out, (d, 1), o_row, o_d), b_total.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["n"])
def aggregate_backward(
    fields,  # these three as in aggregate_forward
    p_mask,
    p_inverse_norms,
    p_g,  # (n, d) the output's gradient
    gradients,  # pointers to (n, d) contiguous, written where NEED[f]
    n,
    d,
    strides,
    mask_strides,
    g_strides,
    weights,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr,
    NORMALIZE_FIELDS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEED: tl.constexpr,
):
    N_FIELDS: tl.constexpr = len(fields)
    o_row, o_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    m_out = (o_row < n)[:, None] & (o_d < d)[None, :]
    b_norms = load_norms(p_inverse_norms + o_row.to(tl.int64) * (N_FIELDS + 1), o_row < n, N_FIELDS + 1)
    b_fields, m_fields = load_fields(fields, strides, (p_mask, mask_strides), (o_row, o_d, n, d), HAS_MASK)
    b_g = tl.load(addresses(p_g, g_strides, o_row, o_d), mask=m_out, other=0.0)
    b_shares = shares(weights, m_fields, HAS_MASK)
    b_g = b_g.to(tl.float32)
    if NORMALIZE:
        b_total = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for f in tl.static_range(N_FIELDS):
            b_total += (b_shares[f] * b_norms[f])[:, None] * b_fields[f].to(tl.float32)
        b_inverse = b_norms[N_FIELDS][:, None]
        b_g = off(b_g, b_total * b_inverse) * b_inverse
    for f in tl.static_range(N_FIELDS):
        if NEED[f]:
            b_dx = off(b_g, b_fields[f].to(tl.float32) * b_norms[f][:, None]) if NORMALIZE_FIELDS else b_g
            b_dx *= (b_shares[f] * b_norms[f])[:, None]
            b_dx = tl.where(m_fields[f][:, None], b_dx, 0.0)  # not 0 * NaN
            p_dx = addresses(gradients[f], (d, 1), o_row, o_d)
            tl.store(p_dx, b_dx.to(gradients[f].dtype.element_ty), mask=m_out)
