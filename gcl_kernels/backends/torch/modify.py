"""Masks and additive terms on a tile of logits, the same in both passes.

A mask is a function here, called in `modify_`. It never reaches a positive: callers read positives before and put them back. An
additive term is part of `modify_` and of `modify_positives_`, which does to the positives' logits what it does to the tile's. It
must not depend on the tile's shape. A mask that compares logits may decide otherwise in a tile of another shape, within one
rounding; `softmax` bounds what such a pair does in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...pairs import Pairs
from ..settings import may_read_on_host
from ..terms import bias2, limits2, sign


def modify_(s2: Tensor, pairs: Pairs, rows: slice, cols: slice) -> None:
    """Changes the logits of a tile in place. Labelled pairs may be hidden too: callers give positives their value."""
    if pairs.lhs_ids is not None and pairs.rhs_ids is not None:
        s2.masked_fill_(equal_ids(pairs.lhs_ids[rows], pairs.rhs_ids[cols]), -math.inf)
    if pairs.lhs_limit is not None:
        hide_above_(s2, pairs.lhs_limit[rows, None], pairs.logit_scale)
    if pairs.rhs_limit is not None:
        hide_above_(s2, pairs.rhs_limit[cols], pairs.logit_scale)
    if pairs.rhs_bias is not None:  # after the limits, which are of similarities
        s2.add_(pairs.rhs_bias[cols])


def modify_positives_(positive2: Tensor, pairs: Pairs, labels: Callable[[], Tensor]) -> Tensor:
    """The base-2 logits of labelled pairs, changed in place; `labels()`, of the same shape, are their columns."""
    if pairs.rhs_bias is not None:
        positive2.add_(pairs.rhs_bias[labels()])
    return positive2


def equal_ids(left: Tensor, right: Tensor) -> Tensor:
    """(R, C) bool of ids (R, K) and (C, K): which pairs are false negatives."""
    hidden = left[:, None, 0] == right[None, :, 0]
    for k in range(1, left.shape[1]):
        hidden |= left[:, None, k] == right[None, :, k]
    return hidden


def hide_above_(s2: Tensor, limit2: Tensor, logit_scale: Tensor) -> None:
    rising = may_read_on_host(s2.device) and not bool(logit_scale < 0)  # logits are in the order of their similarities
    s2.masked_fill_((s2 if rising else s2 * sign(logit_scale, s2.dtype)) > limit2, -math.inf)


def prepared(pairs: Pairs, compute: torch.dtype) -> dict[str, Tensor]:
    """The inputs that `modify_` reads, in the form in which it uses them: base 2, and negative ids made unequal."""
    inputs = limits2(pairs, compute)
    bias = bias2(pairs, compute)
    if bias is not None:
        inputs["rhs_bias"] = bias
    if pairs.lhs_ids is not None and pairs.rhs_ids is not None:
        inputs["lhs_ids"] = pairs.lhs_ids.masked_fill(pairs.lhs_ids < 0, -1)
        inputs["rhs_ids"] = pairs.rhs_ids.masked_fill(pairs.rhs_ids < 0, -2)
    return inputs
