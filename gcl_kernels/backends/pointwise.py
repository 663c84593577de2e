"""What passes between the sigmoid's operator and a backend: the fourth function of a backend, `softplus`.

`softplus(pairs, bias, upstream, need, *, dtype=None) -> (row, positive, PointwiseGradients)`
    With `z_ij = s_ij + bias` (bias: 0-d, in the scale's dtype): `row_i = sum_j softplus(z_ij)` over the visible negatives, (N,);
    the positives' logits s, (N, P), without the bias, 0 for label -1; both of `statistics_dtype`. `upstream` None: no gradients.

A loss of each pair alone needs no statistics of a line, so the gradient G leaves the same pass over the tiles:

    G_ij = g_row_i sigmoid(z_ij) + sum_p [j == t_ip] g_positive_ip
    dlhs = scale G rhs        drhs = scale G^T lhs        dscale = <G, lhs rhs^T>        dbias = sum_ij g_row_i sigmoid(z_ij)

in 6 N M D floating-point operations, statistics and gradients together. The gradient of the bias is that of `row` alone, since
`positive` does not have it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base2 import LOG2E
from .contract import statistics_dtype

# Columns of a tile whose sigmoids a Triton kernel makes and stores at a time: of a 128 x 256 tile, 64 would spill on sm_90.
PART = 32


class PointwiseUpstream(NamedTuple):
    """Gradients with respect to the results.

    `weighted`: `positive` holds the weights w of a loss `sum w softplus(-z)` instead, whose gradient with respect to the
    positives is known only once they are.
    """

    row: Tensor  # (N,)
    positive: Tensor | None  # (N, P)
    weighted: bool = False

    def at_positives(self, positive: Tensor, bias: Tensor, labels: Tensor | None) -> Tensor:
        """(N, P) gradients with respect to the positives' logits `positive`, in their dtype; 0 for label -1."""
        if self.positive is None:
            return torch.zeros_like(positive)
        g = self.positive.to(positive)
        if self.weighted:
            g = -g * torch.sigmoid(-(positive + bias.to(positive)))
        return g if labels is None else torch.where(labels >= 0, g, 0.0)


class PointwiseNeed(NamedTuple):
    """Which gradients are computed."""

    lhs: bool
    rhs: bool
    scale: bool
    bias: bool


class PointwiseGradients(NamedTuple):
    lhs: Tensor | None = None
    rhs: Tensor | None = None
    scale: Tensor | None = None  # 0-d in the scale's dtype
    bias: Tensor | None = None  # likewise


def bias2_of(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """0-d: the bias in base 2."""
    return (bias.to(statistics_dtype(bias.device)) * LOG2E).to(dtype)
