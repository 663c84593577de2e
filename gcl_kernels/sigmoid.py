"""`sigmoid_loss`: SigLIP's loss with pair weights, fields, ids and several positives, over `pairwise_softplus`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import distributed, whole
from .backends import statistics_dtype
from .derivatives import refuse_forward_mode
from .fields import FieldWeights
from .groups import ProcessGroupLike, local_tensor, resolve_group
from .pairs import Pairs
from .row_losses import Present, denominator, leave_out_absent
from .sides import Side, sides_of, tensors_of
from .softplus import statistics
from .types import FIELD_MODES, REDUCTIONS, TRANSPORTS, Backend, FieldMode, Reduction, Transport
from .validation import check_choice, check_scale


def sigmoid_loss(
    lhs: Side,
    rhs: Side,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    lhs_ids: Tensor | None = None,
    rhs_ids: Tensor | None = None,
    lhs_limit: Tensor | None = None,
    rhs_limit: Tensor | None = None,
    rhs_bias: Tensor | None = None,
    lhs_field_weights: FieldWeights = None,
    rhs_field_weights: FieldWeights = None,
    lhs_field_mask: Tensor | None = None,
    rhs_field_mask: Tensor | None = None,
    field_mode: FieldMode = "aggregate",
    reduction: Reduction = "mean",
    process_group: ProcessGroupLike = None,
    transport: Transport = "all_gather",
    backend: Backend | None = None,
) -> Tensor:
    """The sigmoid loss of SigLIP (arXiv 2303.15343) with weighted positives, without N x M memory, in 6 N M D operations.

    With `z_ij = logit_scale <x_i, y_j> + logit_bias`, labels t and pair weights w:

        l_i = sum_p w_ip softplus(-z_{i,t_ip})  +  sum_j softplus(z_ij)        j over the visible pairs that are not labelled

    Args:
        lhs: as in `gcl_loss`, like everything that is not explained here.
        rhs: as in `gcl_loss`.
        logit_scale: as in `gcl_loss`.
        logit_bias: a float or a one-element tensor, which may need a gradient. SigLIP starts at -10 beside a scale of 10.
        weights: w >= 0, shaped as labels. None means 1. They weigh positives alone: a graded score says how relevant a document
            is to its own query, and nothing about the pairs that it is not part of. Every negative counts 1.
        labels: as in `gcl_loss`; but a row without a positive keeps the loss of its negatives.
        lhs_ids: as in `gcl_loss`.
        rhs_ids: as in `gcl_loss`.
        lhs_limit: as in `pairwise_logsumexp`: similarities above which an unlabelled pair is no negative.
        rhs_limit: as in `pairwise_logsumexp`.
        rhs_bias: as in `pairwise_logsumexp`, beside logit_bias.
        lhs_field_weights: as in `gcl_loss`.
        rhs_field_weights: as in `gcl_loss`.
        lhs_field_mask: as in `gcl_loss`.
        rhs_field_mask: as in `gcl_loss`.
        field_mode: as in `gcl_loss`.
        reduction: `"mean"` is sum(l) / N, SigLIP's. `"weighted_mean"` is sum(l) / sum(w) over labelled rows, sum(l) where sum(w)
            is 0. `"sum"` is sum(l). `"none"` is l, (N,); only this one takes 8 N M D operations.
        process_group: as in `gcl_loss`.
        transport: as in `gcl_loss`.
        backend: as in `gcl_loss`.

    Returns:
        0-d loss, or (N,) for `"none"`; float32 (float64 for float64 inputs). With a process group as in `gcl_loss`: the mean over
        ranks is the loss of the joined batch. The gradients of logit_scale and logit_bias are of the rank's own rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: for forward-mode derivatives and `torch.func.grad`, which `gcl_kernels.reference` has.
    """
    group = resolve_group(process_group)
    check_choice("transport", transport, TRANSPORTS)
    with distributed.shared_failure(group):
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("field_mode", field_mode, FIELD_MODES)
        refuse_forward_mode("sigmoid_loss", logit_scale, logit_bias, weights, *tensors_of(lhs), *tensors_of(rhs))
        sides = sides_of(
            lhs,
            rhs,
            logit_scale,
            group,
            weights=weights,
            field_weights=(lhs_field_weights, rhs_field_weights),
            field_masks=(lhs_field_mask, rhs_field_mask),
            field_mode=field_mode,
            backend=backend,
            labels=labels,
            lhs_ids=lhs_ids,
            rhs_ids=rhs_ids,
            lhs_limit=lhs_limit,
            rhs_limit=rhs_limit,
            rhs_bias=rhs_bias,
        )
        first, weights, labels = sides.first, sides.weights, sides.labels
        bias = check_scale(local_tensor("logit_bias", logit_bias, group), first.lhs, "logit_bias")
    ranks = None
    if group is not None:
        alike = {
            "reduction": reduction,
            "requires_grad of logit_bias": bias.requires_grad,
            **sides.alike,
        }
        ranks = distributed.agree(group, transport, first, logit_scale, alike)

    if len(sides.of_fields) == 1 and weights is None and ranks is None:
        small = whole.sigmoid(first, bias, reduction, backend)
        if small is not None:
            return small.to(torch.promote_types(sides.dtype, torch.float32))
    divisor = denominator(weights, labels, first.lhs, reduction, ranks)
    loss = first.lhs.new_zeros(())
    for share, pairs, present in sides.of_fields:
        factor = None if divisor is None else share / divisor
        loss = loss + share * row_losses(pairs, bias, present, weights, factor, ranks, backend)
    if divisor is not None:
        loss = loss.sum() / divisor
    return loss.to(torch.promote_types(sides.dtype, torch.float32))


def row_losses(
    pairs: Pairs,
    bias: Tensor,
    present: Present,
    weights: Tensor | None,
    factor: Tensor | float | None,
    ranks: distributed.Ranks | None,
    backend: str | None,
) -> Tensor:
    """(N,) l_i of one pair of sides, in the statistics' dtype. `factor`: by which the caller adds them up, or None."""
    rows = prepared(pairs, present, weights, factor, ranks)
    known_row, known_weights = rows.known or (None, None)
    lines = statistics(rows.pairs, bias, backend, known_row=known_row, weights=known_weights, ranks=ranks)
    return losses_of(rows, lines)


class Rows(NamedTuple):
    """A pair of sides whose loss needs its sums and nothing else."""

    pairs: Pairs
    weights: Tensor  # (N, P), 0 beside label -1
    known: tuple[Tensor, Tensor] | None  # `known_row` and `weights` of `softplus.statistics`


def prepared(
    pairs: Pairs,
    present: Present,
    weights: Tensor | None,
    factor: Tensor | float | None,
    ranks: distributed.Ranks | None,
) -> Rows:
    pairs = leave_out_absent(pairs, present, ranks)
    kind, labels = statistics_dtype(pairs.lhs.device), pairs.labels
    if weights is None:
        w = torch.ones((pairs.n, pairs.positives), dtype=kind, device=pairs.lhs.device)
    else:
        w = weights.reshape(pairs.n, -1).to(kind)
    if labels is not None:
        w = torch.where(labels >= 0, w, 0.0)
    return Rows(pairs, w, None if factor is None else (w.new_ones(pairs.n) * factor, w.detach() * factor))


def losses_of(rows: Rows, lines: tuple[Tensor, Tensor]) -> Tensor:
    """(N,) l_i by the sums of `rows.pairs`."""
    row, positive = lines
    of_positives = rows.weights * -torch.nn.functional.logsigmoid(positive)
    if rows.pairs.labels is not None:
        of_positives = torch.where(rows.pairs.labels >= 0, of_positives, 0.0)  # w = 0 is not enough: 0 * NaN is NaN
    return row + of_positives.sum(dim=1)
