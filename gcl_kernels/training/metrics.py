"""Ranking metrics on graded relevance, one value per query, in float64.

Every function takes

    gains   (Q, K)  the grade of the document at each rank, best rank first, 0 where it was not judged
    judged  (Q, J)  every grade of the query's judged documents in any order, padded with 0

both >= 0 on one device, and returns a (Q,) float64 tensor with values in [0, 1]. A query without a positive grade
scores 0. How equal scores are ordered is the ranking's business: see `gcl_kernels.training.ranking.search`.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("NDCG@10", "ERR", "RBP.7", "RBP.8", "RBP.9", "AP", "RR", "recall@10")
"""What `all_metrics` computes."""


def ndcg(gains: Tensor, judged: Tensor, k: int = 10) -> Tensor:
    """NDCG@k with linear gain: `sum_r gain_r / log2(r + 1)` over the first k ranks, over the same for the ideal order.

    This is trec_eval's `ndcg_cut` (Järvelin and Kekäläinen, TOIS 2002).
    """
    dcg = _dcg(gains[:, :k])
    ideal = _dcg(judged.sort(dim=1, descending=True).values[:, :k])
    return torch.where(ideal > 0, dcg / ideal.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def err(gains: Tensor, judged: Tensor) -> Tensor:
    """Expected reciprocal rank over all K ranks: `sum_r R_r / r * prod_{s<r} (1 - R_s)`.

    `R_r = (2^gain_r - 1) / 2^max`, with the query's own largest judged grade as `max` (Chapelle et al., CIKM 2009).
    It is computed as `2^(gain - max) - 2^(-max)`, which cannot overflow.
    """
    gains, most = gains.double(), _largest(judged)
    stop = torch.exp2(gains - most) - torch.exp2(-most)
    go_on = torch.cumprod(1 - stop, dim=1)
    arrive = torch.cat([torch.ones_like(go_on[:, :1]), go_on[:, :-1]], dim=1)[:, : gains.shape[1]]
    return (arrive * stop / _ranks(gains)).sum(dim=1)


def rbp(gains: Tensor, judged: Tensor, p: float = 0.9) -> Tensor:
    """Rank-biased precision over all K ranks: `(1 - p) * sum_r gain_r / max * p^(r - 1)`.

    `max` is the query's own largest judged grade; `p` in (0, 1) is the chance that the reader goes on to the next
    rank (Moffat and Zobel, TOIS 2008). The best ranking of few relevant documents scores below 1.
    """
    if not 0 < p < 1:
        raise ValueError(f"expected p in (0, 1), got {p}")
    gains, most = gains.double(), _largest(judged)
    share = torch.where(most > 0, gains / most.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return (1 - p) * (share * p ** (_ranks(gains) - 1)).sum(dim=1)


def average_precision(gains: Tensor, judged: Tensor, k: int | None = None) -> Tensor:
    """Mean of the precision at each relevant rank, over the number of relevant documents; relevant is a gain > 0.

    `k`: only the first k ranks, trec_eval's `map_cut`.
    """
    hits = (gains[:, :k] > 0).double()
    precision = hits.cumsum(dim=1) / _ranks(hits)
    return (precision * hits).sum(dim=1) / _relevant(judged)


def reciprocal_rank(gains: Tensor, judged: Tensor) -> Tensor:
    """One over the rank of the first document with a gain > 0, 0 when there is none. `judged` is not needed."""
    hits = (gains > 0).double()
    first = hits * (hits.cumsum(dim=1) == 1)
    return (first / _ranks(hits)).sum(dim=1)


def precision(gains: Tensor, judged: Tensor, k: int = 10) -> Tensor:
    """Share of the first k ranks that hold a gain > 0, of k even where fewer are ranked. `judged` is not needed."""
    return (gains[:, :k] > 0).double().sum(dim=1) / k


def recall(gains: Tensor, judged: Tensor, k: int = 10) -> Tensor:
    """Share of the query's documents with a grade > 0 that are in the first k ranks."""
    return (gains[:, :k] > 0).double().sum(dim=1) / _relevant(judged)


def all_metrics(gains: Tensor, judged: Tensor) -> dict[str, Tensor]:
    """Every metric of this module by its usual name, each (Q,)."""
    return {
        "NDCG@10": ndcg(gains, judged, 10),
        "ERR": err(gains, judged),
        "RBP.7": rbp(gains, judged, 0.7),
        "RBP.8": rbp(gains, judged, 0.8),
        "RBP.9": rbp(gains, judged, 0.9),
        "AP": average_precision(gains, judged),
        "RR": reciprocal_rank(gains, judged),
        "recall@10": recall(gains, judged, 10),
    }


def _ranks(gains: Tensor) -> Tensor:
    return torch.arange(1, gains.shape[1] + 1, dtype=torch.float64, device=gains.device)


def _dcg(gains: Tensor) -> Tensor:
    return (gains.double() / torch.log2(_ranks(gains) + 1)).sum(dim=1)


def _largest(judged: Tensor) -> Tensor:
    return judged.double().amax(dim=1, keepdim=True)


def _relevant(judged: Tensor) -> Tensor:
    # At least 1, so that a query without a relevant document scores 0 instead of 0 / 0.
    return (judged > 0).double().sum(dim=1).clamp(min=1)
