"""`pairwise_softplus`: the primitive of losses of each pair alone, as `lse` is of those of whole rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import backends, distributed, pointwise_ops
from .backends.terms import without_tiny
from .derivatives import refuse_forward_mode
from .groups import ProcessGroupLike, local_tensor, resolve_group
from .pairs import Pairs
from .types import TRANSPORTS, Backend, Transport
from .validation import check_choice, check_scale


class PairwiseSoftplus(NamedTuple):
    """Result of `pairwise_softplus`: float64 on every device but MPS (float32), differentiable.

    Attributes:
        row: (N,) sum of `softplus(z_ij)` over row i's negatives; 0 if none.
        positive: shaped as labels: `z[i, t_i]`; 0 for label -1.
    """

    row: Tensor
    positive: Tensor


def pairwise_softplus(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    labels: Tensor | None = None,
    lhs_ids: Tensor | None = None,
    rhs_ids: Tensor | None = None,
    lhs_limit: Tensor | None = None,
    rhs_limit: Tensor | None = None,
    rhs_bias: Tensor | None = None,
    process_group: ProcessGroupLike = None,
    transport: Transport = "all_gather",
    backend: Backend | None = None,
) -> PairwiseSoftplus:
    """Row sums of softplus over the negatives of `z = logit_scale * lhs @ rhs.T + logit_bias + rhs_bias`, and the positives' z.

    `row_i = sum_j log(1 + exp(z_ij))` over the pairs (i, j) that are visible and not labelled, `positive_i = z[i, t_i]`. SigLIP's
    loss (arXiv 2303.15343) is `(row + softplus(-positive)).mean()`. No N x M matrix is stored.

    Args:
        lhs: as in `pairwise_logsumexp`, like everything that is not explained here.
        rhs: as in `pairwise_logsumexp`.
        logit_scale: as in `pairwise_logsumexp`.
        logit_bias: added to every logit: a float, or a tensor of one element, which may need a gradient.
        labels: as in `pairwise_logsumexp`. A labelled pair is never a negative.
        lhs_ids: as in `pairwise_logsumexp`.
        rhs_ids: as in `pairwise_logsumexp`.
        lhs_limit: as in `pairwise_logsumexp`.
        rhs_limit: as in `pairwise_logsumexp`.
        rhs_bias: as in `pairwise_logsumexp`; limits see neither bias.
        process_group: as in `pairwise_logsumexp`. Every rank gets the rows of its own lhs, over all ranks' columns.
        transport: as in `pairwise_logsumexp`.
        backend: as in `pairwise_logsumexp`.

    Returns:
        PairwiseSoftplus(row (N,), positive shaped as labels), float64 (float32 on MPS). Gradients return in the input dtypes.

    The forward takes 2 N M D floating-point operations, the backward 6 N M D. `sigmoid_loss` takes 6 N M D for both, because it
    knows the gradient of `row` up to a factor. The result cannot be differentiated twice.

    Raises:
        TypeError, ValueError: naming the argument, as `pairwise_logsumexp`.
        RuntimeError: as `pairwise_logsumexp`.
    """
    group = resolve_group(process_group)
    check_choice("transport", transport, TRANSPORTS)
    with distributed.shared_failure(group):
        refuse_forward_mode("pairwise_softplus", lhs, rhs, logit_scale, logit_bias)
        inputs = {"labels": labels, "lhs_ids": lhs_ids, "rhs_ids": rhs_ids}
        inputs |= {"lhs_limit": lhs_limit, "rhs_limit": rhs_limit, "rhs_bias": rhs_bias}
        pairs = Pairs.of(lhs, rhs, logit_scale, group, **inputs)
        bias = check_scale(local_tensor("logit_bias", logit_bias, group), pairs.lhs, "logit_bias")
        if group is not None:
            backends.choose(backend, pairs.lhs.device, pairs.lhs.dtype)  # raises if there is no such backend
    alike = {"requires_grad of logit_bias": bias.requires_grad}
    ranks = None if group is None else distributed.agree(group, transport, pairs, logit_scale, alike)
    row, positive = statistics(pairs, bias, backend, ranks=ranks)
    return PairwiseSoftplus(row, positive[:, 0] if labels is None or labels.ndim == 1 else positive)


def statistics(
    pairs: Pairs,
    bias: Tensor,
    backend: str | None,
    *,
    known_row: Tensor | None = None,
    weights: Tensor | None = None,
    ranks: distributed.Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """(row (N,), positive (N, P)) in the statistics' dtype. `known_row` and `weights` as in `pointwise_ops.softplus`.

    `ranks`: the problem is cut over a process group whose ranks have agreed; row and positive are this rank's.
    """
    if ranks is not None:
        known = None if known_row is None else [(known_row, weights)]
        return statistics_of_parts([pairs], bias, backend, known, ranks)[0]
    return _with_bias(pointwise_ops.softplus(pairs, bias, backend, known_row, weights), pairs, bias)


def statistics_of_parts(
    parts: Sequence[Pairs],
    bias: Tensor,
    backend: str | None,
    known: Sequence[tuple[Tensor, Tensor | None]] | None,
    ranks: distributed.Ranks,
) -> list[tuple[Tensor, Tensor]]:
    """`statistics` of each part over ranks. Parts have one rhs, which travels once."""
    name = backends.choose(backend, parts[0].lhs.device, parts[0].lhs.dtype)
    of_parts = distributed.softplus_of_parts(parts, bias, name, known, ranks)
    return [_with_bias(lines, pairs, bias) for lines, pairs in zip(of_parts, parts, strict=True)]


def _with_bias(lines: tuple[Tensor, Tensor], pairs: Pairs, bias: Tensor) -> tuple[Tensor, Tensor]:
    row, positive = lines
    if pairs.limited:
        positive = without_tiny(positive, pairs)
    positive = positive + bias.to(positive.dtype)
    if pairs.labels is not None:
        positive = positive.masked_fill(pairs.labels < 0, 0.0)
    return row, positive
