"""Softmaxes in base 2, as both backends make them: `s2 = s log2(e)`, because exp2 is the exponential that hardware has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .contract import statistics_dtype

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# The widest spread, in powers of two, over which one exponential serves rows and columns. float32 reaches down to 2^-126:
# what a factor of 2^-100 flushes to zero is below 2^-26 of the line's sum, less than the sum's own rounding.
SAFE_SPREAD = 100.0

# The least sum of a line's exponentials that all are relative to one number given beforehand: a million of those that float32
# flushes to zero, below 2^-126 each, are then below 2^-26 of it.
SMALLEST_SUM = 2.0**-80

# Stands for a scale nearer to 0 where the scale is part of the stored G, whose products must still tell the scale's gradient.
SMALLEST_SCALE = 2.0**-60


@dataclass
class Line:
    """One direction's softmax as the gradient uses it: g exp(s - lse) = gain * exp2(s2 - reference).

    `reference` is the float32 nearest to the base-2 lse: near it s2 - reference is exact. What float32 cannot hold of the
    lse goes into the gain.
    """

    g: Tensor
    lse2: Tensor  # 0 where nothing is visible: every pair of that line is hidden anyway
    compute: torch.dtype

    @classmethod
    def of(cls, lse: Tensor, g: Tensor, compute: torch.dtype) -> Line:
        lse2 = lse * LOG2E
        lse2 = lse2.masked_fill_(lse2 == -math.inf, 0.0)
        return cls(g, lse2, compute)

    @cached_property
    def reference(self) -> Tensor:
        return self.lse2.to(self.compute)

    @cached_property
    def gain(self) -> Tensor:
        return (self.g * torch.exp2(self.reference - self.lse2)).to(self.reference)


def logsumexp2_(s2: Tensor, dim: int) -> Tensor:
    """Base-2 logsumexp along one dimension; overwrites `s2`. -inf where all are; infinities and NaN pass through."""
    top, total = exponentials_(s2, dim)
    return top + total.log2()


def exponentials_(s2: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Turns logits into exp2(s2 - top) in place; (top, total) along `dim`, top 0 where every logit is -inf."""
    top = s2.amax(dim=dim, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    total = s2.sub_(top).exp2_().sum(dim=dim)
    return top.squeeze(dim), total.to(statistics_dtype(s2.device))


def high_and_low(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as the sum of two numbers of a narrower dtype."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)
