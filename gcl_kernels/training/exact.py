"""Exact search in the time of one float32 product: the ranking of `ranking.search`, ties included.

A float32 product of two vectors of unit length differs from the true one by at most eps = D 2^-24. So the k-th best score is
at least the k-th largest of (score - eps), and what is above that by no more than its own eps is a candidate. Those few are
scored again in float64, as `ranking.search` scores all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def error_bound(dimension: int) -> float:
    """eps, doubled for vectors whose length is 1 only to rounding, and for sums of fields."""
    return 2 * (dimension + 8) * 2.0**-24


def best(
    scores: Tensor, k: int, rescore: Callable[[Tensor], Tensor], *, error: Tensor | float, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions and scores of the k best documents of one query, equal scores by position; fewer where fewer can be found.

    Args:
        scores: (N,) float32; -inf for what cannot be found.
        rescore: the true scores (C,), float64, of candidates' positions (C,), ascending.
        error: how far each score is from the true one at most, (N,) or one number.
        allowed: (N,) bool, the documents to choose from.
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    k = min(k, len(scores))
    if k == 0:
        return torch.empty(0, dtype=torch.int64), scores[:0]
    least = (scores - error).topk(k, sorted=False).values.min()
    # Where fewer than k can be found, the k-th is -inf, and every one that can be is a candidate.
    candidates = ((scores + error >= least) & (scores > -torch.inf)).nonzero().flatten()
    true = rescore(candidates).to(scores.dtype)
    order = true.sort(descending=True, stable=True).indices[:k]
    return candidates[order], true[order]
