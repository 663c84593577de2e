"""`gcl_loss` and `GCLLoss`: plain PyTorch over `logsumexp_statistics`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import backends, distributed
from .fields import FieldWeights, aggregate_fields, check_mask, named_fields, normalized_weights, unit
from .pairs import Pairs
from .row_losses import RowLoss, denominator, row_losses
from .score_to_weight import ScoreToWeight, score_to_weight
from .validation import (
    check_choice,
    check_fraction,
    check_pair,
    check_tensor,
    check_weights,
)

if TYPE_CHECKING:  # some builds of torch have no distributed
    from torch.distributed import ProcessGroup


DIRECTIONS = {"both": 0.5, "lhs_to_rhs": 1.0, "rhs_to_lhs": 0.0}
REDUCTIONS = ("mean", "weighted_mean", "sum", "none")
FIELD_MODES = ("aggregate", "pairwise")

Side = Tensor | Mapping[str, Tensor]


def gcl_loss(
    lhs: Side,
    rhs: Side,
    logit_scale: Tensor | float,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    lhs_ids: Tensor | None = None,
    rhs_ids: Tensor | None = None,
    lhs_field_weights: FieldWeights = None,
    rhs_field_weights: FieldWeights = None,
    lhs_field_mask: Tensor | None = None,
    rhs_field_mask: Tensor | None = None,
    field_mode: str = "aggregate",
    directions: str = "both",
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    process_group: ProcessGroup | None = None,
    transport: str = "all_gather",
    backend: str | None = None,
) -> Tensor:
    """Weighted two-direction softmax loss of Generalized Contrastive Learning (arXiv 2404.08535), without N x M memory.

    With ``s_ij = logit_scale <x_i, y_j>``, labels t and pair weights w::

        l_i = w_i * ( a * (row_i - s_{i,t_i})  +  (1 - a) * (col_{t_i} - s_{i,t_i}) )
        row_i = logsumexp_j s_ij        col_j = logsumexp_i s_ij        over visible pairs

    Args:
        lhs, rhs: (N, D) and (M, D) tensors used as given, or mappings of fields (N, D) that are aggregated first.
        logit_scale: 1 / temperature: a float or a one-element tensor, which may need a gradient.
        weights: w >= 0, shaped as labels; None: 1, plain CLIP. See ``score_to_weight``.
        labels: (N,) or (N, P): columns of row i's positives, -1 for none (then l_i = 0, but the row stays a negative for the
            columns). With P positives l_i is the sum over them. Default ``t_i = i``, needing M >= N; columns beyond the
            labelled ones are negatives for every row.
        lhs_ids, rhs_ids: int64 ids, (N,) or (N, K) and (M,) or (M, K). A pair with an equal id >= 0 in any channel is a
            false negative and is left out, unless labelled.
        lhs_field_weights, rhs_field_weights, lhs_field_mask, rhs_field_mask: as in ``aggregate_fields``.
        field_mode: ``"aggregate"``: one vector a side. ``"pairwise"``: l_i is the sum over (f, g) of beta_fg l_i(L_f, R_g)
            of the normalised fields, beta_fg = u_f v_g (weights summing to 1 a side); a pair leaves out the rows and
            documents that lack its field.
        directions: ``"both"`` (a = 1/2), ``"lhs_to_rhs"`` (a = 1) or ``"rhs_to_lhs"`` (a = 0). One direction computes one.
        reduction: ``"mean"`` = sum(l) / N, ``"weighted_mean"`` = sum(l) / sum(w) over labelled rows (0 where that is 0),
            ``"sum"``, or ``"none"`` = l (N,).
        label_smoothing: e in [0, 1]: each (lse - s_pos) becomes (1 - e) (lse - s_pos) + e (lse - mean s). The mean is over
            all columns (rows), hidden by ids or not: it costs O(N D).
        z_loss: c >= 0: adds c * lse^2 to each direction (PaLM, arXiv 2204.02311).
        process_group, transport: as in ``pairwise_logsumexp``: every rank passes its own rows of everything. Fields are
            aggregated first, so one vector a document travels.
        backend: as in ``pairwise_logsumexp``.

    Returns:
        0-d loss, or (N,) for ``"none"``; float32 (float64 for float64 inputs). With a process group each rank gets its own rows'
        share: ``"mean"`` world * sum(l) / (all ranks' N), ``"weighted_mean"`` world * sum(l) / (all ranks' sum(w)), ``"sum"``
        world * sum(l), so that the mean over ranks is the loss of the joined batch and the gradient that
        DistributedDataParallel averages over ranks is its gradient; ``"none"`` its own l.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    distributed.check_group(process_group, transport)
    with distributed.shared_failure(process_group):
        check_choice("directions", directions, tuple(DIRECTIONS))
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("field_mode", field_mode, FIELD_MODES)
        check_fraction("label_smoothing", label_smoothing, 1.0)
        check_fraction("z_loss", z_loss, math.inf)
        left = _side("lhs", lhs, lhs_field_weights, lhs_field_mask, field_mode, backend)
        right = _side("rhs", rhs, rhs_field_weights, rhs_field_mask, field_mode, backend)
        check_pair(left[0][1], right[0][1])
        check_weights(weights, labels, len(left[0][1]), left[0][1].device)
        inputs = {"labels": labels, "lhs_ids": lhs_ids, "rhs_ids": rhs_ids, "distributed": process_group is not None}
        of_fields = [
            (u * v, Pairs.of(x, y, logit_scale, **inputs), (has_x, has_y))
            for u, x, has_x in left
            for v, y, has_y in right
        ]
        first = of_fields[0][1]
        if process_group is not None:
            backends.choose(backend, first.lhs.device, first.lhs.dtype)  # raises if there is no such backend
    ranks = None
    if process_group is not None:
        alike = {
            "directions": directions,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "weights": "None" if weights is None else f"weights, requires_grad={weights.requires_grad}",
            "field_mode": f"{field_mode} of {len(left)} and {len(right)} fields",
            "lhs_field_mask and rhs_field_mask": [m is not None for m in (lhs_field_mask, rhs_field_mask)],
        }
        ranks = distributed.agree(process_group, transport, first, logit_scale, alike)

    divisor = denominator(weights, labels, first.lhs, reduction, ranks)
    options = RowLoss(DIRECTIONS[directions], label_smoothing, z_loss)
    loss = first.lhs.new_zeros(())
    for share, pairs, present in of_fields:
        factor = None if divisor is None else share / divisor
        loss = loss + share * row_losses(pairs, present, weights, options, factor, ranks, backend)
    if divisor is not None:
        loss = loss.sum() / divisor
    return loss.to(torch.promote_types(left[0][1].dtype, torch.float32))


class GCLLoss(nn.Module):
    """:func:`gcl_loss` of ranking scores: ``forward(lhs, rhs, scores, logit_scale)`` with ``w = score_to_weight(scores)``.

    Args:
        score_to_weight: name or callable; with ``s_max``, ``knots`` and ``normalize`` as in ``gcl_kernels.score_to_weight``.
        Everything else: as in ``gcl_loss``.
    """

    def __init__(
        self,
        score_to_weight: str | ScoreToWeight = "linear",
        *,
        s_max: float = 100.0,
        knots: Sequence[tuple[float, float]] | None = None,
        normalize: str | None = None,
        **options,
    ):
        super().__init__()
        unknown = set(options) - OPTIONS
        if unknown:
            raise TypeError(f"GCLLoss: expected options among {sorted(OPTIONS)}, got {sorted(unknown)}")
        # over a process group the mean weight is known only once all ranks have called
        self.divide_by_mean_weight = normalize == "mean" and options.get("process_group") is not None
        self.score_to_weight = _by_name(
            score_to_weight, s_max=s_max, knots=knots, normalize=None if self.divide_by_mean_weight else normalize
        )
        self.options = options

    def forward(
        self,
        lhs: Side,
        rhs: Side,
        scores: Tensor,
        logit_scale: Tensor | float,
        *,
        labels: Tensor | None = None,
        lhs_ids: Tensor | None = None,
        rhs_ids: Tensor | None = None,
        lhs_field_mask: Tensor | None = None,
        rhs_field_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of scores (N,), or (N, P) beside labels (N, P); a score beside label -1 is not looked at."""
        process_group = self.options.get("process_group")
        with distributed.shared_failure(process_group):
            check_tensor(
                "scores", scores, (1, 2), (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
            )
            labelled = labels >= 0 if isinstance(labels, Tensor) and labels.shape == scores.shape else None
            weights = self.score_to_weight(scores, labelled)
        loss = gcl_loss(
            lhs,
            rhs,
            logit_scale,
            weights=weights,
            labels=labels,
            lhs_ids=lhs_ids,
            rhs_ids=rhs_ids,
            lhs_field_mask=lhs_field_mask,
            rhs_field_mask=rhs_field_mask,
            **self.options,
        )
        if not self.divide_by_mean_weight or self.options.get("reduction") == "weighted_mean":
            return loss  # a weighted mean does not depend on it
        count = weights.new_full((), weights.numel()) if labelled is None else labelled.sum().clamp(min=1)
        total, count = distributed.total(torch.stack([weights.sum(), count.to(weights)]), process_group)
        return loss * torch.where(total > 0, count / total, 1.0).to(loss.dtype)


OPTIONS = {
    "lhs_field_weights",
    "rhs_field_weights",
    "field_mode",
    "directions",
    "reduction",
    "label_smoothing",
    "z_loss",
    "process_group",
    "transport",
    "backend",
}
_by_name = score_to_weight  # inside GCLLoss the name is an argument


def _side(name: str, side: Side, weights: FieldWeights, mask: Tensor | None, field_mode: str, backend: str | None):
    """[(weight, (N, D) embedding, rows that have it or None)]: one entry, or one a field in pairwise mode."""
    if isinstance(side, Tensor):
        for argument, value in ((f"{name}_field_weights", weights), (f"{name}_field_mask", mask)):
            if value is not None:
                raise ValueError(f"{argument}: expected None beside a tensor {name}, got {type(value).__name__}")
        return [(1.0, side, None)]
    if not isinstance(side, Mapping):
        raise TypeError(f"{name}: expected a torch.Tensor or a mapping of fields, got {type(side).__name__}")
    names, tensors = named_fields(name, side)
    u = normalized_weights(f"{name}_field_weights", weights, names)
    if mask is not None:
        check_mask(f"{name}_field_mask", mask, tensors)
    if field_mode == "aggregate":
        return [(1.0, aggregate_fields(tensors, u, mask=mask, backend=backend), None)]
    columns = [None if mask is None else mask[:, f] for f in range(len(tensors))]
    return [(u[f], _unit_where(x, columns[f]), columns[f]) for f, x in enumerate(tensors)]


def _unit_where(x: Tensor, present: Tensor | None) -> Tensor:
    """Normalised rows in x's dtype; what an absent field holds (NaN even) becomes zero."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x_present = x if present is None else torch.where(present[:, None], x, 0.0)
    return unit(x_present.to(compute)).to(x.dtype)
