"""What changes a logit besides the product, in the base-2 units of tiles: the scale, limits of similarity, biases."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import Pairs
from .base2 import LOG2E
from .contract import statistics_dtype

# Stands for a scale of 0 beside limits: logits of this size are 0 to any rounding, and still in the order of their similarities.
TINY = 2.0**-60  # float32 holds what is 2^-66 of it
LARGEST_TINY = TINY * 2**10  # of a statistic of such logits


def scale_of_tiles(pairs: Pairs) -> Tensor:
    """0-d logit_scale, of which a tile makes `scale2`."""
    scale = pairs.logit_scale
    return torch.where(scale == 0, TINY, scale) if pairs.limited else scale


def scale2(pairs: Pairs) -> Tensor:
    """0-d `logit_scale log2(e)` in the statistics' dtype."""
    return scale_of_tiles(pairs).to(statistics_dtype(pairs.lhs.device)) * LOG2E


def without_tiny(statistic: Tensor, pairs: Pairs) -> Tensor:
    """Of logits, those that stand for 0 made 0; their gradients stay."""
    value = statistic.detach()
    stands_for_0 = (pairs.logit_scale == 0) & (value.abs() < LARGEST_TINY)
    return statistic - torch.where(stands_for_0, value, 0.0)


def sign(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """0-d, 1 or -1: `s2 sign > limit2` is `<x, y> > limit`."""
    return torch.where(logit_scale < 0, -1.0, 1.0).to(dtype)


def limits2(pairs: Pairs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The limits that there are, by name, in units of `s2 sign`."""
    limits = {"lhs_limit": pairs.lhs_limit, "rhs_limit": pairs.rhs_limit}
    return {name: (scale2(pairs).abs() * x).to(dtype) for name, x in limits.items() if x is not None}


def bias2(pairs: Pairs, dtype: torch.dtype) -> Tensor | None:
    """(M,) what is added to the logits of each column."""
    return None if pairs.rhs_bias is None else (LOG2E * pairs.rhs_bias).to(dtype)
