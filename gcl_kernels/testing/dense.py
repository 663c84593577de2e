"""Dense losses that a loss under test is held against. They store all pairs, and are written to be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def clip(
    lhs: Tensor,
    rhs: Tensor,
    scale: Any,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    lhs_ids: Tensor | None = None,
    rhs_ids: Tensor | None = None,
) -> Tensor:
    """The mean over rows of w_i ((row_i - s_ij) + (col_j - s_ij)) / 2 with s = scale lhs @ rhs.T and j = labels_i, or i.

    A pair whose ids are equal, and that is no positive, is left out of the logsumexps row_i and col_j.
    """
    logits = scale * lhs @ rhs.T
    rows = torch.arange(len(lhs), device=lhs.device)
    if weights is None and labels is None and lhs_ids is None:  # as open_clip writes it
        return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    labels = rows if labels is None else labels
    if lhs_ids is not None and rhs_ids is not None:
        hidden = lhs_ids[:, None] == rhs_ids[None, :]
        hidden[rows, labels] = False
        logits = logits.masked_fill(hidden, float("-inf"))
    positive = logits[rows, labels]
    losses = (logits.logsumexp(1) + logits.logsumexp(0)[labels]) / 2 - positive
    return (losses if weights is None else weights * losses).mean()


def siglip(lhs: Tensor, rhs: Tensor, scale: Any, bias: Any) -> Tensor:
    """-sum logsigmoid(z (scale lhs @ rhs.T + bias)) / N, z = 1 on the diagonal and -1 elsewhere."""
    signs = 2 * torch.eye(len(lhs), dtype=lhs.dtype, device=lhs.device) - 1
    return -F.logsigmoid(signs * (scale * lhs @ rhs.T + bias)).sum() / len(lhs)


def rows_only(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    """InfoNCE: the mean over rows of cross entropies with the diagonal as labels."""
    return F.cross_entropy(scale * lhs @ rhs.T, torch.arange(len(lhs), device=lhs.device))


def nt_xent(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    """SimCLR's loss of two views, normalised first: a row's positive is its other view, itself is no negative."""
    views = F.normalize(torch.cat((lhs, rhs)), dim=1)
    logits = scale * views @ views.T
    logits = logits.masked_fill(torch.eye(len(views), dtype=torch.bool, device=lhs.device), float("-inf"))
    labels = torch.arange(len(views), device=lhs.device).roll(len(lhs))
    return F.cross_entropy(logits, labels)


AGAINST = {"clip": clip, "siglip": siglip, "rows": rows_only, "nt_xent": nt_xent}
