"""Two sides, tensors or mappings of fields, as the pairs of embeddings that a loss adds up over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .fields import FieldWeights, aggregate_fields, check_mask, named_fields, normalized_weights, unit
from .groups import local_tensor
from .pairs import Pairs
from .row_losses import Present
from .types import Backend, FieldMode
from .validation import check_weights

if TYPE_CHECKING:  # some builds of torch have no distributed
    from torch.distributed import ProcessGroup

Side = Tensor | Mapping[str, Tensor]


class Sides(NamedTuple):
    of_fields: list[tuple[float, Pairs, Present]]  # the share in the loss of each pair of fields
    weights: Tensor | None  # this rank's, as are the labels
    labels: Tensor | None
    dtype: torch.dtype  # of the embeddings as given
    alike: dict[str, Any]  # what all ranks must have in common

    @property
    def first(self) -> Pairs:
        """Sizes, labels and device are those of every pair of fields."""
        return self.of_fields[0][1]

    @property
    def whole(self) -> bool:
        """Whether there is one pair of fields, and every row and column has its field."""
        return len(self.of_fields) == 1 and self.of_fields[0][2] == (None, None)


def sides_of(
    lhs: Side,
    rhs: Side,
    logit_scale: Tensor | float,
    group: ProcessGroup | None,
    *,
    weights: Tensor | None,
    field_weights: tuple[FieldWeights, FieldWeights],
    field_masks: tuple[Tensor | None, Tensor | None],
    field_mode: FieldMode,
    backend: Backend | None,
    **inputs: Tensor | None,
) -> Sides:
    """Checks a loss's arguments; `inputs` are `Pairs`' optional fields.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    lhs, rhs = local_side("lhs", lhs, group), local_side("rhs", rhs, group)
    weights, labels = local_tensor("weights", weights, group), local_tensor("labels", inputs["labels"], group)
    masks = local_tensor("lhs_field_mask", field_masks[0], group), local_tensor("rhs_field_mask", field_masks[1], group)
    left = _side("lhs", lhs, field_weights[0], masks[0], field_mode, backend)
    right = _side("rhs", rhs, field_weights[1], masks[1], field_mode, backend)
    first = Pairs.of(left[0][1], right[0][1], logit_scale, group, **inputs)
    check_weights(weights, labels, first.n, first.lhs.device)
    # fields of a side are alike, which was checked with them
    of_fields = [
        (u * v, first if i == j == 0 else first.between(x, y), (has_x, has_y))
        for i, (u, x, has_x) in enumerate(left)
        for j, (v, y, has_y) in enumerate(right)
    ]
    if group is not None:
        backends.choose(backend, first.lhs.device, first.lhs.dtype)  # raises if there is no such backend
    alike = {
        "field_mode": f"{field_mode} of {len(left)} and {len(right)} fields",
        "lhs_field_mask and rhs_field_mask": [m is not None for m in masks],
    }
    return Sides(of_fields, weights, labels, left[0][1].dtype, alike)


def one_vector(
    name: str,
    side: Side,
    field_weights: FieldWeights,
    field_mask: Tensor | None,
    group: ProcessGroup | None,
    backend: Backend | None,
) -> Tensor:
    """(N, D) one vector a row, for a side that several losses use."""
    mask = local_tensor(f"{name}_field_mask", field_mask, group)
    return _side(name, local_side(name, side, group), field_weights, mask, "aggregate", backend)[0][1]


def tensors_of(side: Side) -> Iterable[object]:
    return side.values() if isinstance(side, Mapping) else (side,)


def local_side(name: str, side: Side, group: ProcessGroup | None) -> Side:
    if isinstance(side, Mapping):
        return {field: local_tensor(f"{name}[{field}]", x, group) for field, x in side.items()}
    return local_tensor(name, side, group)


def _side(
    name: str, side: Side, weights: FieldWeights, mask: Tensor | None, field_mode: FieldMode, backend: Backend | None
) -> list[tuple[float, Tensor, Tensor | None]]:
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
