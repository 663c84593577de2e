"""Masks and additive terms of the logits, the same in both passes: one function and one position of `terms` each.

`terms` is a tuple with a fixed position for every term, None where a term is absent. Triton resolves `is None` when it
compiles, so that an absent term costs nothing. They are pointers to (n..) numbers of rows or (m..) of columns, padded to whole
tiles; `operands.Terms` makes them and names them in this order.

    0  sign of logit_scale, float32; only beside limits
    1  ids: a pair of pointers a channel, int32
    2  limits of rows, float32, in units of the logits times the sign
    3  limits of columns
    4  biases of columns, float32, base 2

A mask never reaches a positive: the kernels read positives before and put them back. An additive term is part of `modify` and of
`modify_positive`, which does to a positive's logit what it does to the tile's. A mask that compares logits may decide otherwise
in a tile of another shape, within one rounding; `softmax.clamped_gradient` bounds what such a pair does in the backward.
"""

# The body of a kernel is Triton's language, which follows other rules than Python's types.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import in_narrow_parts


@triton.jit
def modify(b_s, terms, place):
    """The logits of a tile with every term that is there."""
    if terms[1] is not None:
        b_s = in_narrow_parts(b_s, hide_equal_ids, (terms[1], place[0]), place[1])
    if terms[2] is not None:
        b_limit = tl.load(terms[2] + place[0] + tl.arange(0, b_s.shape[0]))
        b_s = tl.where(b_s * tl.load(terms[0]) > b_limit[:, None], float("-inf"), b_s)
    if terms[3] is not None:
        b_s = in_narrow_parts(b_s, hide_above_limits, (terms[3], tl.load(terms[0])), place[1])
    if terms[4] is not None:  # after the limits, which are of similarities
        b_s = in_narrow_parts(b_s, add_bias, terms[4], place[1])
    return b_s


@triton.jit
def modify_positive(b_positive, terms, b_label, m_inside):
    """Base-2 logits of positives in the columns b_label of the chunk, with every additive term."""
    if terms[4] is not None:
        b_positive += tl.load(terms[4] + b_label, mask=m_inside, other=0.0)
    return b_positive


@triton.jit
def hide_above_limits(b_s, arguments, i_col):
    """-inf at pairs more similar than their column's limit."""
    p_limit, sign = arguments
    b_limit = tl.load(p_limit + i_col + tl.arange(0, b_s.shape[1]))
    return tl.where(b_s * sign > b_limit[None, :], float("-inf"), b_s)


@triton.jit
def add_bias(b_s, p_bias, i_col):
    return b_s + tl.load(p_bias + i_col + tl.arange(0, b_s.shape[1]))[None, :]


@triton.jit
def hide_equal_ids(b_s, arguments, i_col):
    """-inf at false negatives: pairs with an equal id in any channel."""
    ids, i_row = arguments
    o_row, o_col = i_row + tl.arange(0, b_s.shape[0]), i_col + tl.arange(0, b_s.shape[1])
    m_hidden = tl.load(ids[0][0] + o_row)[:, None] == tl.load(ids[0][1] + o_col)[None, :]
    for i_channel in tl.static_range(1, len(ids)):
        # The same addresses as above, added up in another order, because the registers of the backward depend on it (sm_90):
        # as above, two channels beside labels take 126 in tf32 instead of 79, and two blocks share an SM instead of three;
        # in this order above, one channel takes 178 in bfloat16 instead of 128, one block instead of two.
        b_left = tl.load(ids[i_channel][0] + tl.arange(0, b_s.shape[0]) + i_row)
        b_right = tl.load(ids[i_channel][1] + i_col + tl.arange(0, b_s.shape[1]))
        m_hidden = m_hidden | (b_left[:, None] == b_right[None, :])
    return tl.where(m_hidden, float("-inf"), b_s)
