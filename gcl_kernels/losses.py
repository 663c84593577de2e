"""`gcl_loss` and `GCLLoss`: plain PyTorch over the statistics of `lse`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import distributed, linear, whole
from .derivatives import refuse_forward_mode
from .false_negatives import FalseNegatives
from .fields import FieldWeights, normalized_weights
from .groups import ProcessGroupLike, check_process_group, local_tensor, resolve_group
from .row_losses import RowLoss, denominator, row_losses
from .score_to_weight import Knots, ScoreToWeight, score_to_weight
from .sides import Side, sides_of, tensors_of
from .types import (
    BACKEND_NAMES,
    DIRECTIONS,
    FIELD_MODES,
    REDUCTIONS,
    TRANSPORTS,
    Backend,
    Directions,
    FieldMode,
    Reduction,
    ScoreToWeightName,
    Transport,
    WeightNormalization,
    signature_of,
)
from .validation import DTYPES, check_choice, check_fraction, check_tensor

ROW_SHARE: dict[Directions, float] = {"both": 0.5, "lhs_to_rhs": 1.0, "rhs_to_lhs": 0.0}  # the formula's a


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
    rhs_bias: Tensor | None = None,
    field_mode: FieldMode = "aggregate",
    directions: Directions = "both",
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
    process_group: ProcessGroupLike = None,
    transport: Transport = "all_gather",
    backend: Backend | None = None,
) -> Tensor:
    """Weighted two-direction softmax loss of Generalized Contrastive Learning (arXiv 2404.08535), without N x M memory.

    With `s_ij = logit_scale <x_i, y_j>`, labels t and pair weights w:

        l_i = w_i * ( a * (row_i - s_{i,t_i})  +  (1 - a) * (col_{t_i} - s_{i,t_i}) )
        row_i = logsumexp_j s_ij        col_j = logsumexp_i s_ij        over visible pairs

    Args:
        lhs: (N, D) embeddings, used as given, or a mapping of fields (N, D), which are aggregated first.
        rhs: (M, D) embeddings or a mapping of fields (M, D), likewise.
        logit_scale: 1 / temperature: a float or a one-element tensor, which may need a gradient.
        weights: w >= 0, shaped as labels. None means 1, which is plain CLIP. See `score_to_weight`.
        labels: (N,) or (N, P): columns of row i's positives, -1 for none. With P positives l_i is the sum over them. A row
            without a positive has l_i = 0 and stays a negative for the columns. The default is `t_i = i`, which needs M >= N;
            columns beyond the labelled ones are negatives for every row.
        lhs_ids: int64 ids of the rows, (N,) or (N, K). A pair with an equal id >= 0 in any of the K channels is a false negative:
            it is left out of both logsumexps, unless it is labelled.
        rhs_ids: int64 ids of the columns, (M,) or (M, K).
        lhs_field_weights: of the fields of lhs, as `weights` in `aggregate_fields`.
        rhs_field_weights: of the fields of rhs.
        lhs_field_mask: (N, F) bool, which fields a row has, as `mask` in `aggregate_fields`.
        rhs_field_mask: (M, F) bool, likewise.
        rhs_bias: (M,) added to every logit of column j, as in `pairwise_logsumexp`.
        field_mode: `"aggregate"` makes one vector a side. `"pairwise"` takes every pair of fields: l_i is the sum over (f, g) of
            beta_fg l_i(L_f, R_g) of the normalised fields, beta_fg = u_f v_g, the weights summing to 1 on each side. A pair of
            fields leaves out the rows and columns that lack its field.
        directions: `"both"` (a = 1/2), `"lhs_to_rhs"` (a = 1) or `"rhs_to_lhs"` (a = 0). One direction computes one.
        reduction: `"mean"` is sum(l) / N. `"weighted_mean"` is sum(l) / sum(w) over labelled rows, 0 where sum(w) is 0. `"sum"`
            is sum(l). `"none"` is l, (N,).
        label_smoothing: e in [0, 1]: each (lse - s_pos) becomes (1 - e) (lse - s_pos) + e (lse - mean s). The mean is over
            all columns (rows), hidden by ids or not. It costs O(N D).
        z_loss: c >= 0: adds c * lse^2 to each direction (PaLM, arXiv 2204.02311).
        false_negative_margin: m >= 0: an unlabelled pair leaves both logsumexps where `<x_i, y_j> > p + m`, p being the
            similarity of row i's positive or of column j's (the largest of several); 0.1 in Qwen3-Embedding (arXiv 2506.05176). A
            row or column without a positive hides nothing. No gradient passes through the comparison. Within one rounding of
            the limit a pair may be hidden or not, so with m = 0 exact copies of a positive may be.
        false_negative_ratio: r >= 0: likewise where `<x_i, y_j> > r p`; 0.95 in NV-Retriever (arXiv 2407.15831). With both a pair
            leaves where either says so.
        process_group: as in `pairwise_logsumexp`: every rank passes its own rows of everything. Fields are aggregated first,
            so one vector a row travels.
        transport: as in `pairwise_logsumexp`.
        backend: as in `pairwise_logsumexp`.

    A `DTensor` is taken where it is `Shard(0)` beside a process group over the same ranks, or `Replicate()` without one: its
    local rows are used, and gradients go back to it.

    Returns:
        0-d loss, or (N,) for `"none"`; float32 (float64 for float64 inputs). With a process group each rank gets its own rows'
        share: world * sum(l) / (all ranks' N) for `"mean"`, world * sum(l) / (all ranks' sum(w)) for `"weighted_mean"`,
        world * sum(l) for `"sum"`. The mean over ranks is then the loss of the joined batch, and the gradient that
        DistributedDataParallel averages over ranks is its gradient. For `"none"` each rank gets its own l.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: for forward-mode derivatives and `torch.func.grad`, which `gcl_kernels.reference` has.
    """
    usual = (
        labels is lhs_ids is rhs_ids is rhs_bias is process_group is backend is None
        and lhs_field_weights is rhs_field_weights is lhs_field_mask is rhs_field_mask is None
        and false_negative_margin is false_negative_ratio is None
        and (field_mode, directions, reduction, transport) == ("aggregate", "both", "mean", "all_gather")
        and (label_smoothing, z_loss) == (0, 0)
        and whole.needs_no_check(lhs, rhs, logit_scale, weights=weights)
    )
    if usual:
        small = whole.of_checked(lhs, rhs, logit_scale, weights=weights)  # pyright: ignore[reportArgumentType]
        if small is not None:
            return small
    group = resolve_group(process_group)
    check_choice("transport", transport, TRANSPORTS)
    with distributed.shared_failure(group):
        check_options(field_mode, directions, reduction, label_smoothing, z_loss)
        false_negatives = false_negatives_of(false_negative_margin, false_negative_ratio)
        refuse_forward_mode("gcl_loss", logit_scale, weights, *tensors_of(lhs), *tensors_of(rhs))
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
            rhs_bias=rhs_bias,
        )
    first, weights, labels = sides.first, sides.weights, sides.labels
    ranks = None
    if group is not None:
        alike = {
            "directions": directions,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "false_negative_margin": false_negative_margin,
            "false_negative_ratio": false_negative_ratio,
            "weights": "None" if weights is None else f"weights, requires_grad={weights.requires_grad}",
            **sides.alike,
        }
        ranks = distributed.agree(group, transport, first, logit_scale, alike)

    plain = label_smoothing == z_loss == 0 and sides.whole and ranks is None
    if plain and linear.takes(first, weights, directions, reduction, backend):
        return linear.loss(false_negatives.hidden_in(first, None), weights, directions, reduction, backend)
    if plain and not usual and directions == "both" and false_negatives == FalseNegatives():
        small = whole.softmax(first, weights, reduction, backend)
        if small is not None:
            return small.to(torch.promote_types(sides.dtype, torch.float32))
    divisor = denominator(weights, labels, first.lhs, reduction, ranks)
    options = RowLoss(ROW_SHARE[directions], label_smoothing, z_loss, false_negatives)
    loss = first.lhs.new_zeros(())
    for share, pairs, present in sides.of_fields:
        factor = None if divisor is None else share / divisor
        loss = loss + share * row_losses(pairs, present, weights, options, factor, ranks, backend)
    if divisor is not None:
        loss = loss.sum() / divisor
    return loss.to(torch.promote_types(sides.dtype, torch.float32))


class GCLLoss(nn.Module):
    """`gcl_loss` of ranking scores: `forward(lhs, rhs, scores, logit_scale)` with `w = score_to_weight(scores)`.

    Args:
        score_to_weight: name or callable, as in `gcl_kernels.score_to_weight`, which also explains the next four.
        s_max: the highest score.
        knots: of `"piecewise"`.
        score_range: (lowest, highest) of scores in another unit, as (0, 1) for similarities.
        normalize: `"mean"` divides by the mean weight: of the batch, with a process group of all ranks' batches.
        lhs_field_weights: as in `gcl_loss`, like everything below.
        rhs_field_weights: as in `gcl_loss`.
        field_mode: as in `gcl_loss`.
        directions: as in `gcl_loss`.
        reduction: as in `gcl_loss`.
        label_smoothing: as in `gcl_loss`.
        z_loss: as in `gcl_loss`.
        false_negative_margin: as in `gcl_loss`.
        false_negative_ratio: as in `gcl_loss`.
        process_group: as in `gcl_loss`. A module with `"world"` can be pickled, copied and made before the group is; one with a
            `ProcessGroup` cannot.
        transport: as in `gcl_loss`.
        backend: as in `gcl_loss`.

    Raises:
        TypeError, ValueError: an option that is wrong whatever the batch is refused here, everything else when called.
    """

    def __init__(
        self,
        score_to_weight: ScoreToWeightName | ScoreToWeight = "log",
        *,
        s_max: float = 100.0,
        score_range: tuple[float, float] | None = None,
        knots: Knots | None = None,
        normalize: WeightNormalization | None = None,
        lhs_field_weights: FieldWeights = None,
        rhs_field_weights: FieldWeights = None,
        field_mode: FieldMode = "aggregate",
        directions: Directions = "both",
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        false_negative_margin: float | None = None,
        false_negative_ratio: float | None = None,
        process_group: ProcessGroupLike = None,
        transport: Transport = "all_gather",
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.weights_of = _by_name(
            score_to_weight, s_max=s_max, knots=knots, normalize=normalize, score_range=score_range
        )
        check_options(field_mode, directions, reduction, label_smoothing, z_loss)
        false_negatives_of(false_negative_margin, false_negative_ratio)
        check_process_group(process_group)
        check_choice("transport", transport, TRANSPORTS)
        if backend is not None:
            check_choice("backend", backend, BACKEND_NAMES)
        for name, given in (("lhs_field_weights", lhs_field_weights), ("rhs_field_weights", rhs_field_weights)):
            if given is not None:
                fields = given if isinstance(given, Mapping) else range(len(given))
                normalized_weights(name, given, [str(field) for field in fields])
        self.lhs_field_weights = lhs_field_weights
        self.rhs_field_weights = rhs_field_weights
        self.field_mode: FieldMode = field_mode
        self.directions: Directions = directions
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.false_negative_margin = false_negative_margin
        self.false_negative_ratio = false_negative_ratio
        self.process_group: ProcessGroupLike = process_group
        self.transport: Transport = transport
        self.backend: Backend | None = backend

    # Read from the one function that uses them.

    @property
    def score_to_weight(self) -> ScoreToWeightName | ScoreToWeight:
        return self.weights_of.function

    @property
    def s_max(self) -> float:
        return self.weights_of.s_max

    @property
    def score_range(self) -> tuple[float, float] | None:
        return self.weights_of.score_range

    @property
    def knots(self) -> Knots | None:
        return self.weights_of.knots

    @property
    def normalize(self) -> WeightNormalization | None:
        return self.weights_of.normalize

    def extra_repr(self) -> str:
        """The score function, and the options that differ from their defaults."""
        options = list(inspect.signature(GCLLoss).parameters.values())
        shown = [option for option in options[1:] if getattr(self, option.name) != option.default]
        return ", ".join([repr(self.score_to_weight), *(f"{o.name}={getattr(self, o.name)!r}" for o in shown)])

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
        rhs_bias: Tensor | None = None,
    ) -> Tensor:
        """`gcl_loss` with the weights of these scores.

        Args:
            lhs: as in `gcl_loss`, like everything that is not explained here.
            rhs: as in `gcl_loss`.
            scores: (N,), or (N, P) beside labels (N, P), of a floating-point dtype or int64. A score beside label -1 is not
                looked at.
            logit_scale: as in `gcl_loss`.
            labels: as in `gcl_loss`.
            lhs_ids: as in `gcl_loss`.
            rhs_ids: as in `gcl_loss`.
            lhs_field_mask: as in `gcl_loss`.
            rhs_field_mask: as in `gcl_loss`.
            rhs_bias: as in `gcl_loss`.
        """
        group = resolve_group(self.process_group)
        with distributed.shared_failure(group):
            scores = local_tensor("scores", scores, group)
            labels = local_tensor("labels", labels, group)
            check_tensor("scores", scores, (1, 2), (*DTYPES, torch.int64))
            refuse_forward_mode("GCLLoss", scores)
            labelled = labels >= 0 if isinstance(labels, Tensor) and labels.shape == scores.shape else None
            # over a process group the mean weight is known only once all ranks have called
            weights_of = self.weights_of if group is None else self.weights_of.not_normalized
            weights = weights_of(scores, labelled)
        loss = gcl_loss(
            lhs,
            rhs,
            logit_scale,
            weights=weights,
            labels=labels,
            lhs_ids=lhs_ids,
            rhs_ids=rhs_ids,
            lhs_field_weights=self.lhs_field_weights,
            rhs_field_weights=self.rhs_field_weights,
            lhs_field_mask=lhs_field_mask,
            rhs_field_mask=rhs_field_mask,
            rhs_bias=rhs_bias,
            field_mode=self.field_mode,
            directions=self.directions,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            false_negative_margin=self.false_negative_margin,
            false_negative_ratio=self.false_negative_ratio,
            process_group=group,
            transport=self.transport,
            backend=self.backend,
        )
        if group is None or self.normalize is None or self.reduction == "weighted_mean":
            return loss  # a weighted mean does not depend on it
        count = weights.new_full((), weights.numel()) if labelled is None else labelled.sum().clamp(min=1)
        total, count = distributed.total(torch.stack([weights.sum(), count.to(weights)]), group)
        return loss * torch.where(total > 0, count / total, 1.0).to(loss.dtype)

    if TYPE_CHECKING:  # nn.Module's own is typed as returning anything

        @signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


_by_name = score_to_weight  # inside GCLLoss the name is an argument


def check_options(field_mode: str, directions: str, reduction: str, label_smoothing: float, z_loss: float) -> None:
    check_choice("directions", directions, DIRECTIONS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("field_mode", field_mode, FIELD_MODES)
    check_fraction("label_smoothing", label_smoothing, 1.0)
    check_fraction("z_loss", z_loss, math.inf)


def false_negatives_of(margin: float | None, ratio: float | None) -> FalseNegatives:
    for name, value in (("false_negative_margin", margin), ("false_negative_ratio", ratio)):
        if value is not None:
            check_fraction(name, value, math.inf)
    return FalseNegatives(margin, ratio)
