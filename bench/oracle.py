"""The loss and its gradients in float64, from the formula, a chunk of rows at a time: an oracle that fits at N = 65,536.

It shares nothing with the library; tests hold it against `reference` at small N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 2**28


def loss_and_gradients(lhs: Tensor, rhs: Tensor, logit_scale: Tensor, a: float) -> list[Tensor]:
    """[loss, dlhs, drhs, dscale] of mean_i a (row_i - s_ii) + (1 - a) (col_i - s_ii); lhs (N, D), rhs (M, D), M >= N."""
    x, y, scale = (v.detach().double() for v in (lhs, rhs, logit_scale))
    n, m = len(x), len(y)
    row, col = x.new_empty(n), x.new_full((m,), -math.inf)
    positive = scale * (x * y[:n]).sum(dim=1)
    for rows in chunks(n, m):
        s = scale * x[rows] @ y.T
        row[rows] = s.logsumexp(dim=1)
        col = torch.logaddexp(col, s.logsumexp(dim=0))
    loss = (a * (row - positive) + (1 - a) * (col[:n] - positive)).mean()

    dlhs, drhs, dscale = torch.empty_like(x), torch.zeros_like(y), scale.new_zeros(())
    by_column = x.new_zeros(m)  # of the columns that are a row's positive
    by_column[:n] = (1 - a) / n
    for rows in chunks(n, m):
        dot = x[rows] @ y.T
        g = a / n * torch.exp(scale * dot - row[rows, None]) + by_column * torch.exp(scale * dot - col)
        g.diagonal(rows.start).sub_(1 / n)
        dlhs[rows] = scale * g @ y
        drhs += scale * g.T @ x[rows]
        dscale += (g * dot).sum()
    return [loss, dlhs, drhs, dscale]


def sigmoid_loss_and_gradients(lhs: Tensor, rhs: Tensor, logit_scale: Tensor, logit_bias: float) -> list[Tensor]:
    """[loss, dlhs, drhs, dscale] of sum_ij softplus(z_ij), softplus(-z_ii) at the pairs, over N."""
    x, y, scale = (v.detach().double() for v in (lhs, rhs, logit_scale))
    n, m = len(x), len(y)
    loss, dlhs, drhs, dscale = scale.new_zeros(()), torch.empty_like(x), torch.zeros_like(y), scale.new_zeros(())
    for rows in chunks(n, m):
        dot = x[rows] @ y.T
        sign = torch.ones_like(dot)
        sign.diagonal(rows.start).fill_(-1)
        z = sign * (scale * dot + logit_bias)
        loss += torch.logaddexp(z, torch.zeros_like(z)).sum() / n
        g = sign * torch.sigmoid(z) / n
        dlhs[rows] = scale * g @ y
        drhs += scale * g.T @ x[rows]
        dscale += (g * dot).sum()
    return [loss, dlhs, drhs, dscale]


def sampled_gradients(
    lhs: Tensor, rhs: Tensor, logit_scale: Tensor, picked: Tensor, a: float, row: Tensor, col: Tensor
) -> list[Tensor]:
    """[row, col] statistics and [dlhs, drhs] gradients, (K, ...) each, at the K lines `picked`, of the mean loss of N = M pairs.

    The gradient of one line needs the statistics of all lines of the other side: those, `row` and `col`, (N,), are given, and
    the first two results say whether they are right where they were picked.
    """
    x, y, scale = (v.detach().double() for v in (lhs, rhs, logit_scale))
    n, own = len(x), torch.arange(len(picked), device=x.device)
    found = []
    for left, right, right_line, share in ((x, y, col, a), (y, x, row, 1 - a)):
        s = scale * left[picked] @ right.T
        exact = s.logsumexp(dim=1)
        g = share / n * torch.exp(s - exact[:, None]) + (1 - share) / n * torch.exp(s - right_line.double())
        g[own, picked] -= 1 / n
        found.append((exact, scale * g @ right))
    return [found[0][0], found[1][0], found[0][1], found[1][1]]


def sampled_sigmoid_gradients(
    lhs: Tensor, rhs: Tensor, logit_scale: Tensor, picked: Tensor, logit_bias: float
) -> list[Tensor]:
    """[dlhs, drhs], (K, D) each, of the sigmoid loss at the K lines `picked`; they need no other line."""
    x, y, scale = (v.detach().double() for v in (lhs, rhs, logit_scale))
    own = torch.arange(len(picked), device=x.device)
    found = []
    for left, right in ((x, y), (y, x)):
        g = torch.sigmoid(scale * left[picked] @ right.T + logit_bias)
        g[own, picked] -= 1
        found.append(scale / len(x) * g @ right)
    return found


def chunks(n: int, m: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (8 * m))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))
