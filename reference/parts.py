"""Dense reference of the loss of several kinds of queries: the sum of separate losses, without the rows that lack a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dense import aggregate_fields, diagonal_labels, gcl_loss, sigmoid_loss


def multi_part_loss(
    parts: Mapping[str, Any],
    rhs: Tensor | Mapping[str, Tensor],
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    rhs_field_weights: Mapping[str, float] | None = None,
    rhs_field_mask: Tensor | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """sum_k share_k l(lhs_k, rhs). A part has the attributes of `gcl_kernels.Part`; `options` are those of `gcl_loss`."""
    y = aggregate_fields(rhs, rhs_field_weights, mask=rhs_field_mask) if isinstance(rhs, Mapping) else rhs
    total = 0.0 * y.sum()
    for part in parts.values():
        x = part.lhs
        if isinstance(x, Mapping):
            x = aggregate_fields(x, part.lhs_field_weights, mask=part.lhs_field_mask)
        has = torch.ones(len(x), dtype=torch.bool, device=x.device) if part.present is None else part.present
        labels = diagonal_labels(len(x), x.device) if part.labels is None else part.labels
        of_rows = {"weights": part.weights, "labels": labels, "lhs_ids": part.lhs_ids}
        given: dict[str, Any] = {name: None if v is None else v[has] for name, v in of_rows.items()}
        given |= {"rhs_ids": part.rhs_ids, "reduction": reduction, **options}
        if not has.any():
            continue
        if logit_bias is None:
            loss = gcl_loss(x[has], y, logit_scale, **given)
        else:
            loss = sigmoid_loss(x[has], y, logit_scale, logit_bias, **given)
        if reduction == "none":
            loss = loss.new_zeros(len(x)).index_put((has.nonzero()[:, 0],), loss)
        total = total + part.share * loss
    return total
