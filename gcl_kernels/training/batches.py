"""What score weights and repeated ids make of the batches of a run, before anything is trained."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from gcl_kernels import score_to_weight
from gcl_kernels.training.options import weighting
from gcl_kernels.training.train import pair_file, training_rows

LITTLE = 0.1
"""A document has little weight where its best pair weighs less than this share of the mean pair."""


@dataclass(frozen=True)
class BatchStatistics:
    """Means over the first epoch's batches, and over the documents trained on.

    Args:
        rows: rows of a batch.
        effective_rows: as many rows of equal weight would make as noisy a mean, `effective_number`.
        little_weight: share of the documents whose best pair weighs less than `LITTLE` of the mean.
        floor: what the loss cannot go below, `loss_floor`; 0 unless repeated ids are kept as negatives.
    """

    rows: float
    effective_rows: float
    little_weight: float
    floor: float


def batch_statistics(args: argparse.Namespace) -> BatchStatistics:
    """The statistics of the run that `args`, of `parse_args`, describe; its training file is read."""
    pairs = pair_file(args, args.train_data, check_images="none")
    scores, ids, sampler = training_rows(args, pairs)
    weigh = score_to_weight(args.score_to_weight, **weighting(args))
    rows, effective, floors = [], [], []
    for batch in itertools.islice(sampler, sampler.batches_per_epoch):
        weights = weigh(scores[batch]).double()
        rows.append(len(batch))
        effective.append(effective_number(weights))
        floors.append(loss_floor(weights, ids[batch]) if args.false_negatives == "keep" else 0.0)
    weights = weigh(scores[sampler.rows]).double()
    documents, document = ids[sampler.rows, 1].unique(return_inverse=True)
    best = weights.new_zeros(len(documents)).scatter_reduce(0, document, weights, "amax")
    return BatchStatistics(
        rows=sum(rows) / len(rows),
        effective_rows=sum(effective) / len(effective),
        little_weight=(best < LITTLE * weights.mean()).double().mean().item(),
        floor=sum(floors) / len(floors),
    )


def effective_number(weights: Tensor) -> float:
    """`(sum w)^2 / sum w^2` of (N,) weights, Kish's effective sample size: N for equal weights, 1 where one has all."""
    return (weights.sum() ** 2 / weights.square().sum()).item()


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

    def totals(values: Tensor, columns: Tensor) -> Tensor:
        _, group = columns.unique(dim=0, return_inverse=True)
        return values.new_zeros(len(values)).index_add(0, group, values)[group]

    of_pair = totals(weights, ids)
    floor = torch.zeros_like(weights)
    for one, other in ((ids[:, 0], ids[:, 1]), (ids[:, 1], ids[:, 0])):
        floor += weights / 2 * (totals(weights, one) * totals(torch.ones_like(weights), other) / of_pair).log()
    return floor.mean().item()
