"""What score weights and repeated ids make of the batches of a run, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcl_kernels.training.inputs import pair_file, training_rows
from gcl_kernels.training.sampler import Sampler
from gcl_kernels.training.train_options import TrainOptions, weights_of

LITTLE = 0.1
"""A document has little weight where its best pair weighs less than this share of the mean pair."""


@dataclass(frozen=True)
class BatchStatistics:
    """Means over batches of the first epoch, and over the documents trained on.

    Args:
        rows: rows of a batch.
        effective_rows: as many rows of equal weight would make as noisy a mean, `effective_number`.
        little_weight: share of the documents whose best pair weighs less than `LITTLE` of the mean.
        floor: what the loss cannot go below, `loss_floor` or `sigmoid_floor`; 0 unless repeated ids are kept as negatives.
        without_negatives: share of the batches in which no row has a negative; their softmax loss is 0 whatever the model.
        without_weight: share of the batches in which every weight is 0.
    """

    rows: float
    effective_rows: float
    little_weight: float
    floor: float
    without_negatives: float
    without_weight: float


def batch_statistics(args: TrainOptions) -> BatchStatistics:
    """The statistics of the run that `args`, of `parse_args`, describe; its training file is read."""
    return statistics_of(args, *training_rows(args, pair_file(args, args.train_data, check_images="none")))


def statistics_of(
    args: TrainOptions, scores: Tensor, ids: Tensor, sampler: Sampler, most: int | None = None
) -> BatchStatistics:
    """`batch_statistics` of what `training_rows` has returned, over the first `most` batches."""
    weigh = weights_of(args)
    batches = sampler.first(most)
    keep = args.false_negatives == "keep"
    rows, effective, floors, no_negatives, no_weight = [], [], [], [], []
    for batch in batches:
        weights = weigh(scores[batch]).double()
        rows.append(len(batch))
        effective.append(effective_number(weights))
        no_weight.append(not weights.any())
        no_negatives.append(not has_negatives(ids[batch], masked=not keep))
        if args.loss == "sigmoid":
            floors.append(sigmoid_floor(weights, ids[batch]) if keep else 0.0)
        else:
            floors.append(loss_floor(weights, ids[batch]) if keep and weights.all() else 0.0)
    weights = weigh(scores[sampler.rows]).double()
    documents, document = ids[sampler.rows, 1].unique(return_inverse=True)
    best = weights.new_zeros(len(documents)).scatter_reduce(0, document, weights, "amax")
    count = len(batches)
    return BatchStatistics(
        rows=sum(rows) / count,
        effective_rows=sum(effective) / count,
        little_weight=(best < LITTLE * weights.mean()).double().mean().item(),
        floor=sum(floors) / count,
        without_negatives=sum(no_negatives) / count,
        without_weight=sum(no_weight) / count,
    )


def has_negatives(ids: Tensor, *, masked: bool) -> bool:
    """Whether some two rows of (N, 2) ids are negatives of each other.

    Masked, they have neither the query nor the document in common; of N^2 pairs, `N^2 - sum c_q^2 - sum c_d^2 + sum c_qd^2`
    are such, for counts c of equal queries, equal documents and equal pairs. Kept, they only have to differ.
    """

    def equal(columns: Tensor) -> int:
        return int(columns.unique(dim=0, return_counts=True)[1].square().sum())

    count = len(ids) ** 2
    if not masked:
        return equal(ids) < count
    return count - equal(ids[:, :1]) - equal(ids[:, 1:]) + equal(ids) > 0


def effective_number(weights: Tensor) -> float:
    """`(sum w)^2 / sum w^2` of (N,) weights, Kish's effective sample size: N for equal weights, 1 where one has all.

    Where all are 0 it is 0.
    """
    return (weights.sum() ** 2 / weights.square().sum()).item() if weights.any() else 0.0


def loss_floor(weights: Tensor, ids: Tensor) -> float:
    """The greatest lower bound of the loss of a batch in which repeated queries and documents are all negatives.

    Args:
        weights: (N,) > 0, float64.
        ids: (N, 2) int64, of query and document.

    Rows of one query have one embedding, hence one softmax over the columns, and the c columns of one document equal shares
    of it. With w_ij the total weight of the rows of query i and document j, W_i that of query i,

        sum_j -w_ij log p_j,  sum_j c_j p_j = 1,  is least at  p_j = w_ij / (W_i c_j)

    and likewise over columns; logits `log w_ij - log c_i - log c_j` reach both at once. The floor is the mean over the rows
    of `w/2 (log(W_i c_j / w_ij) + log(W_j c_i / w_ij))`.
    """

    of_pair = totals(weights, ids)
    floor = torch.zeros_like(weights)
    for one, other in ((ids[:, 0], ids[:, 1]), (ids[:, 1], ids[:, 0])):
        floor += weights / 2 * (totals(weights, one) * totals(torch.ones_like(weights), other) / of_pair).log()
    return floor.mean().item()


def sigmoid_floor(weights: Tensor, ids: Tensor) -> float:
    """`loss_floor` of the sigmoid loss; weights may be 0.

    Rows of one query and columns of one document have one logit z. Of the c_q c_d pairs that have it, c_qd are positives, of
    total weight w, and the other k are negatives:

        w softplus(-z) + k softplus(z)  is least at  sigmoid(z) = w / (w + k),  and is w log((w + k) / w) + k log((w + k) / k)

    there. A pair of a query and a document that no row has is a negative alone, which adds nothing.
    """
    ones = torch.ones_like(weights)
    of_pair, positives = totals(weights, ids), totals(ones, ids)
    negatives = totals(ones, ids[:, 0]) * totals(ones, ids[:, 1]) - positives
    both = of_pair + negatives
    least = torch.special.xlogy(of_pair, both / of_pair.clamp(min=1e-300)) + torch.special.xlogy(
        negatives, both / negatives.clamp(min=1)
    )
    return (least / positives).mean().item()


def totals(values: Tensor, columns: Tensor) -> Tensor:
    """(N,) for each row the sum of `values` (N,) over the rows with the same `columns`, (N,) or (N, K)."""
    _, group = columns.unique(dim=0, return_inverse=True)
    return values.new_zeros(len(values)).index_add(0, group, values)[group]
