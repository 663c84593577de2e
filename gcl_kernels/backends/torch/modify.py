"""Masks and additive terms on a tile of logits, the same in both passes. To add one: a function here, called in `modify_`."""

from __future__ import annotations

import math

from torch import Tensor

from ...pairs import Pairs


def modify_(s2: Tensor, pairs: Pairs, rows: slice, cols: slice) -> None:
    """Changes the logits of a tile in place. Labelled pairs may be hidden too: callers give positives their value."""
    if pairs.lhs_ids is not None and pairs.rhs_ids is not None:
        s2.masked_fill_(equal_ids(pairs.lhs_ids[rows], pairs.rhs_ids[cols]), -math.inf)


def equal_ids(left: Tensor, right: Tensor) -> Tensor:
    """(R, C) bool of ids (R, K) and (C, K): which pairs are false negatives."""
    hidden = left[:, None, 0] == right[None, :, 0]
    for k in range(1, left.shape[1]):
        hidden |= left[:, None, k] == right[None, :, k]
    return hidden


def prepared(pairs: Pairs) -> dict[str, Tensor]:
    """The inputs that `modify_` reads, in the form in which it compares them: negative ids are made unequal."""
    if pairs.lhs_ids is None or pairs.rhs_ids is None:
        return {}
    return {
        "lhs_ids": pairs.lhs_ids.masked_fill(pairs.lhs_ids < 0, -1),
        "rhs_ids": pairs.rhs_ids.masked_fill(pairs.rhs_ids < 0, -2),
    }
