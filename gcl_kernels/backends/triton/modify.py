"""Masks and additive terms of the logits, the same in both passes: one function and one position of `terms` each.

`terms` is a tuple with a fixed position for every term, None where a term is absent. Triton resolves `is None` when it
compiles, so that an absent term costs nothing.

    0  ids: K pairs (p_left, p_right) of pointers to (n..) and (m..) int32, `operands.compress_ids`; one pair a channel
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
    if terms[0] is not None:
        b_s = in_narrow_parts(b_s, hide_equal_ids, (terms[0], place[0]), place[1])
    return b_s


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
