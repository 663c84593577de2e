"""`multi_part_loss`: several kinds of queries against the same documents, which are prepared and exchanged once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import distributed, linear, sigmoid, softplus
from .derivatives import refuse_forward_mode
from .false_negatives import FalseNegatives
from .fields import FieldWeights
from .groups import ProcessGroupLike, local_tensor, resolve_group
from .losses import ROW_SHARE, check_options, false_negatives_of
from .lse import statistics_of_parts
from .pairs import Pairs
from .row_losses import RowLoss, denominator, losses_of, prepared, row_losses
from .sides import Side, local_side, one_vector, sides_of, tensors_of
from .types import TRANSPORTS, Backend, Directions, Reduction, Transport
from .validation import check_choice, check_device, check_fraction, check_scale, check_tensor

if TYPE_CHECKING:  # some builds of torch have no distributed
    from torch.distributed import ProcessGroup

NO_TERMS = RowLoss(0.5, 0.0, 0.0, FalseNegatives())


@dataclass(frozen=True, eq=False)
class Part:
    """One kind of query of `multi_part_loss`, as titles, colours or keywords, for the documents that all parts share.

    Args:
        lhs: (N, D) embeddings, or a mapping of fields (N, D).
        share: of this part in the loss, >= 0.
        weights: as in `gcl_loss`, shaped as labels.
        labels: as in `gcl_loss`.
        lhs_ids: as in `gcl_loss`.
        rhs_ids: (M,) or (M, K) int64 ids of the documents in this part: of their colours, say.
        lhs_field_weights: as in `gcl_loss`.
        lhs_field_mask: as in `gcl_loss`.
        present: (N,) bool: rows that have this part. What the others hold is never read into a result.
    """

    lhs: Side
    share: float = 1.0
    weights: Tensor | None = None
    labels: Tensor | None = None
    lhs_ids: Tensor | None = None
    rhs_ids: Tensor | None = None
    lhs_field_weights: FieldWeights = None
    lhs_field_mask: Tensor | None = None
    present: Tensor | None = None


def multi_part_loss(
    parts: Mapping[str, Part],
    rhs: Side,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    rhs_field_weights: FieldWeights = None,
    rhs_field_mask: Tensor | None = None,
    rhs_bias: Tensor | None = None,
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
    """Sum of `gcl_loss` over several kinds of queries of the same documents, each with weights, labels and ids of its own.

        loss = sum_k share_k * gcl_loss(lhs_k, rhs, logit_scale, weights=w_k, labels=t_k, ...)

    Multi-part training, as of the fashion models that were made by Generalized Contrastive Learning: a product is found by its
    description, its title, its colours, materials, categories, details and keywords. What all parts share is made once: the
    documents' fields are aggregated once, and over ranks one agreement is made and rhs and its gradient travel once. Over ranks
    `false_negative_margin` and `false_negative_ratio` send rhs once more for each part with labels or `present`.

    Args:
        parts: `Part`s by name. Names appear in errors. Scores become weights by `score_to_weight`.
        rhs: (M, D) documents or a mapping of fields (M, D), as in `gcl_loss`.
        logit_scale: as in `gcl_loss`, of all parts.
        logit_bias: None. With one, each part's loss is `sigmoid_loss`, in one direction, without what `sigmoid_loss` lacks.
        rhs_field_weights: as in `gcl_loss`, like everything below that is not explained.
        rhs_field_mask: as in `gcl_loss`.
        rhs_bias: as in `gcl_loss`.
        directions: as in `gcl_loss`.
        reduction: of each part, as in `gcl_loss`. `"none"` is the sum over parts of share_k l_k, (N,), for parts of one N.
        label_smoothing: as in `gcl_loss`.
        z_loss: as in `gcl_loss`.
        false_negative_margin: as in `gcl_loss`.
        false_negative_ratio: as in `gcl_loss`.
        process_group: as in `gcl_loss`: every rank passes its rows of every part, at least one.
        transport: as in `gcl_loss`.
        backend: as in `gcl_loss`.

    A row without a part (`Part.present` False) is neither a query nor a negative there, and `"mean"` and `"weighted_mean"` do not
    count it: the part's loss is that of its other rows alone. It has l_i = 0 and gradient 0. To save its arithmetic as well,
    pass the rows that have the part alone, beside `labels`. A row whose label is -1 stays a negative of the columns.

    Returns:
        As `gcl_loss`. Workspace is that of the part that needs most; operations are the sum of the parts' own.

    Raises:
        TypeError, ValueError: naming the part and the argument, what was expected and what came.
        RuntimeError: for forward-mode derivatives and `torch.func.grad`, which `gcl_kernels.reference` has.
    """
    group = resolve_group(process_group)
    check_choice("transport", transport, TRANSPORTS)
    with distributed.shared_failure(group):
        check_options("aggregate", directions, reduction, label_smoothing, z_loss)
        false_negatives = false_negatives_of(false_negative_margin, false_negative_ratio)
        options = RowLoss(ROW_SHARE[directions], label_smoothing, z_loss, false_negatives)
        if logit_bias is not None and options != NO_TERMS:
            raise ValueError(
                "logit_bias: expected None beside directions, label_smoothing, z_loss, false_negative_margin or "
                f"false_negative_ratio, which the sigmoid loss lacks, got {logit_bias}"
            )
        _check_parts(parts)
        of_parts = [x for part in parts.values() for x in (part.weights, *tensors_of(part.lhs))]
        refuse_forward_mode("multi_part_loss", logit_scale, logit_bias, *of_parts, *tensors_of(rhs))
        documents = one_vector("rhs", rhs, rhs_field_weights, rhs_field_mask, group, backend)
        ready: list[_Ready] = []
        for name, part in parts.items():
            with _naming(name):
                made = _checked(part, documents, logit_scale, rhs_bias, group, backend)
            if ready:  # the same tensors, so that they travel once
                first = ready[0].pairs
                shared = {"rhs": first.rhs, "logit_scale": first.logit_scale, "rhs_bias": first.rhs_bias}
                made = replace(made, pairs=replace(made.pairs, **shared))
            ready.append(made)
        first = ready[0].pairs
        if reduction == "none" and any(made.pairs.n != first.n for made in ready):
            rows = [made.pairs.n for made in ready]
            raise ValueError(f"reduction: expected parts of as many rows each beside 'none', got {rows}")
        bias = None
        if logit_bias is not None:
            bias = check_scale(local_tensor("logit_bias", logit_bias, group), first.lhs, "logit_bias")
    ranks: Sequence[distributed.Ranks | None] = [None] * len(ready)
    if group is not None:
        alike = {
            "directions": directions,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "false_negative_margin": false_negative_margin,
            "false_negative_ratio": false_negative_ratio,
            "logit_bias": "None" if bias is None else f"logit_bias, requires_grad={bias.requires_grad}",
            "parts": {name: made.described() for name, made in zip(parts, ready, strict=True)},
        }
        pairs_of_parts = {name: made.pairs for name, made in zip(parts, ready, strict=True)}
        ranks = distributed.agree_on_parts(group, transport, pairs_of_parts, logit_scale, alike)

    loss = first.lhs.new_zeros(())
    divisors = [made.divisor(reduction, of) for made, of in zip(ready, ranks, strict=True)]
    given = [(made, (made.present, None), made.factor(divisor), of)
             for made, divisor, of in zip(ready, divisors, ranks, strict=True)]  # fmt: skip
    some = ranks[0]
    if some is None:
        losses = [
            _softmax_losses(made, options, reduction, factor, backend)
            if bias is None
            else sigmoid.row_losses(made.pairs, bias, present, made.weights, factor, None, backend)
            for made, present, factor, _ in given
        ]
    elif bias is None:
        rows = [prepared(made.pairs, present, made.weights, options, factor, of) for made, present, factor, of in given]
        lines = statistics_of_parts([of.pairs for of in rows], rows[0].want, backend, some)
        losses = [losses_of(*of_part) for of_part in zip(rows, lines, ranks, strict=True)]
    else:
        rows = [sigmoid.prepared(made.pairs, present, made.weights, factor, of) for made, present, factor, of in given]
        known = [of.known for of in rows if of.known is not None] or None
        lines = softplus.statistics_of_parts([of.pairs for of in rows], bias, backend, known, some)
        losses = [sigmoid.losses_of(*of_part) for of_part in zip(rows, lines, strict=True)]
    for made, divisor, losses_of_rows in zip(ready, divisors, losses, strict=True):
        whole = losses_of_rows if divisor is None or losses_of_rows.ndim == 0 else losses_of_rows.sum() / divisor
        loss = loss + made.share * whole
    return loss.to(torch.promote_types(ready[0].dtype, torch.float32))


def _softmax_losses(
    made: _Ready, options: RowLoss, reduction: Reduction, factor: float | Tensor | None, backend: Backend | None
) -> Tensor:
    """(N,) l_i, or their mean or sum, 0-d, where that is made at once."""
    pairs, weights, plain = made.pairs, made.weights, options == NO_TERMS and made.present is None
    if plain and linear.takes(pairs, weights, "both", reduction, backend):
        return linear.loss(pairs, weights, "both", reduction, backend)
    return row_losses(pairs, (made.present, None), weights, options, factor, None, backend)


@dataclass(frozen=True)
class _Ready:
    """A part whose arguments are checked."""

    pairs: Pairs
    share: float
    weights: Tensor | None
    labels: Tensor | None
    present: Tensor | None
    dtype: torch.dtype  # of the embeddings as given

    def divisor(self, reduction: Reduction, ranks: distributed.Ranks | None) -> float | Tensor | None:
        """`row_losses.denominator` of the rows that have the part."""
        weights, labels = self.weights, self.labels
        if self.present is not None and reduction == "mean":  # how many there are
            weights, labels, reduction = None, torch.where(self.present, 0, -1), "weighted_mean"
        elif self.present is not None:
            labels = torch.where(_beside(labels, self.present), 0 if labels is None else labels, -1)
        return denominator(weights, labels, self.pairs.lhs, reduction, ranks)

    def factor(self, divisor: float | Tensor | None) -> float | Tensor | None:
        """By which the rows' losses enter the result; None if they are not added up."""
        return None if divisor is None else self.share / divisor

    def described(self) -> str:
        """What has to be alike on all ranks."""
        given = {"weights": self.weights, "present": self.present}
        return " ".join([f"{self.share:g}", *(name for name, x in given.items() if x is not None)])


def _checked(
    part: Part,
    documents: Tensor,
    logit_scale: Tensor | float,
    rhs_bias: Tensor | None,
    group: ProcessGroup | None,
    backend: Backend | None,
) -> _Ready:
    check_fraction("share", part.share, math.inf)
    lhs, weights = local_side("lhs", part.lhs, group), local_tensor("weights", part.weights, group)
    field_weights, mask = part.lhs_field_weights, local_tensor("lhs_field_mask", part.lhs_field_mask, group)
    present = local_tensor("present", part.present, group)
    if present is not None:  # what the other rows hold may be NaN
        check_tensor("present", present, (1,), (torch.bool,))
        for x in tensors_of(lhs):
            if isinstance(x, Tensor):
                if len(x) != len(present):
                    raise ValueError(f"present: expected shape ({len(x)},), got {tuple(present.shape)}")
                check_device("present", present, x.device)
        if isinstance(lhs, Mapping):  # until they are zeroed, absent rows are something whose direction is defined
            lhs = {field: torch.where(present[:, None], x, 1.0) for field, x in lhs.items()}
            if isinstance(mask, Tensor) and mask.dtype == torch.bool and len(mask) == len(present):
                mask = mask | ~present[:, None]
            lhs = one_vector("lhs", lhs, field_weights, mask, group, backend)
            field_weights = mask = None
        if isinstance(lhs, Tensor):
            lhs = torch.where(present[:, None], lhs, 0.0)
        if isinstance(weights, Tensor) and len(weights) == len(present):
            weights = torch.where(_beside(weights, present), weights, 0)
    sides = sides_of(
        lhs,
        documents,
        logit_scale,
        group,
        weights=weights,
        field_weights=(field_weights, None),
        field_masks=(mask, None),
        field_mode="aggregate",
        backend=backend,
        labels=part.labels,
        lhs_ids=part.lhs_ids,
        rhs_ids=part.rhs_ids,
        rhs_bias=rhs_bias,
    )
    return _Ready(sides.first, part.share, sides.weights, sides.labels, present, sides.dtype)


def _beside(x: Tensor | None, present: Tensor) -> Tensor:
    """`present` in a shape that is broadcast to x, (N,) or (N, P)."""
    return present if x is None or x.ndim == 1 else present[:, None]


def _check_parts(parts: object) -> None:
    if not isinstance(parts, Mapping):
        raise TypeError(f"parts: expected a mapping of names to Part, got {type(parts).__name__}")
    if not parts:
        raise ValueError("parts: expected at least one, got none")
    for name, part in parts.items():
        if not isinstance(part, Part):
            raise TypeError(f"parts[{name}]: expected a Part, got {type(part).__name__}")


@contextlib.contextmanager
def _naming(part: str) -> Iterator[None]:
    """Errors of a part's arguments say which part's they are."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"parts[{part}]: {error}") from None
