"""`Pairs`: every input of a primitive, checked once and carried whole to the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .groups import local_tensor
from .validation import as_ids, as_labels, as_numbers, check_channels, check_label_range, check_pair, check_scale

if TYPE_CHECKING:  # some builds of torch have no distributed
    from torch.distributed import ProcessGroup


Check = Callable[
    [str, Tensor, int, Tensor], Tensor
]  # (name, x, length, lhs) -> x in the field's shape and dtype, or an error


def rows(check: Check) -> dict[str, Any]:
    """An optional input with an entry for each row, `check`ed by itself."""
    return {"along": "rows", "check": check}


def cols(check: Check) -> dict[str, Any]:
    return {"along": "cols", "check": check}


@dataclass(frozen=True)
class Pairs:
    """Rows of lhs against rows of rhs.

    A new input is a field here. `lse` offers it to users; `backends.terms` gives it a tile's units, `operands` makes vectors of
    it for Triton, and both backends' `modify` use it. Everything between (the check, the operator, the ranks) reads the fields.
    """

    lhs: Tensor  # (N, D)
    rhs: Tensor  # (M, D), the same dtype and device
    logit_scale: Tensor  # 0-d, float64 for float64 inputs, else float32
    # (N, P) int64, -1 for none; None: row i's positive is column i
    labels: Tensor | None = field(default=None, metadata=rows(as_labels))
    # (N, K) and (M, K) int64, below 0 for none; both or neither
    lhs_ids: Tensor | None = field(default=None, metadata=rows(as_ids))
    rhs_ids: Tensor | None = field(default=None, metadata=cols(as_ids))
    # (N,) and (M,) in logit_scale's dtype: an unlabelled pair of a larger <x_i, y_j> is hidden
    lhs_limit: Tensor | None = field(default=None, metadata=rows(as_numbers))
    rhs_limit: Tensor | None = field(default=None, metadata=cols(as_numbers))
    rhs_bias: Tensor | None = field(
        default=None, metadata=cols(as_numbers)
    )  # (M,) likewise, added to the column's logits

    @classmethod
    def of(
        cls, lhs: Tensor, rhs: Tensor, logit_scale: Tensor | float, group: ProcessGroup | None = None, **inputs: Any
    ) -> Pairs:
        """Checks a caller's arguments and brings them into the shapes and dtypes above. `inputs`: the optional fields.

        Beside a process group labels count the columns of all ranks, which only the ranks together can check.
        """
        lhs, rhs = local_tensor("lhs", lhs, group), local_tensor("rhs", rhs, group)
        check_pair(lhs, rhs)
        length, given = {"rows": lhs.shape[0], "cols": rhs.shape[0]}, {}
        for name, x in inputs.items():
            if x is not None:
                along, check = OPTIONAL[name]
                given[name] = check(name, local_tensor(name, x, group), length[along], lhs)
        check_label_range(given.get("labels"), lhs, rhs, distributed=group is not None)
        check_channels(given.get("lhs_ids"), given.get("rhs_ids"))
        lhs, rhs = autocast_like_matmul(lhs, rhs)
        return cls(lhs, rhs, check_scale(local_tensor("logit_scale", logit_scale, group), lhs), **given)

    def between(self, lhs: Tensor, rhs: Tensor) -> Pairs:
        """The same rows and columns by other embeddings, of the same shapes, dtype and device."""
        lhs, rhs = autocast_like_matmul(lhs, rhs)
        return replace(self, lhs=lhs, rhs=rhs)

    @property
    def n(self) -> int:
        return self.lhs.shape[0]

    @property
    def m(self) -> int:
        return self.rhs.shape[0]

    @property
    def d(self) -> int:
        return self.lhs.shape[1]

    @property
    def positives(self) -> int:
        """P, how many labels a row has."""
        return 1 if self.labels is None else self.labels.shape[1]

    @property
    def hides(self) -> bool:
        """Whether unlabelled pairs may be hidden, all of a line among them."""
        return self.lhs_ids is not None or self.limited

    @property
    def limited(self) -> bool:
        """Whether pairs are hidden by their similarity."""
        return self.lhs_limit is not None or self.rhs_limit is not None

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lhs, self.rhs, self.logit_scale

    def fields(self) -> tuple[Tensor | None, ...]:
        """What makes them again, `Pairs(*fields)`."""
        return fields_of(self)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The fields that are there, by name."""
        return ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None)

    def of_columns(self) -> dict[str, Tensor]:
        """The optional fields that are there and have an entry for each column, by name."""
        return {name: x for name, x in self.tensors() if name in OPTIONAL and OPTIONAL[name][0] == "cols"}


fields_of = attrgetter(*(f.name for f in fields(Pairs)))
OPTIONAL = {f.name: (f.metadata["along"], f.metadata["check"]) for f in fields(Pairs) if f.metadata}


def autocast_like_matmul(lhs: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    device = lhs.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (lhs.dtype, rhs.dtype):
        dtype = torch.get_autocast_dtype(device)
        return lhs.to(dtype), rhs.to(dtype)
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"rhs: expected the dtype of lhs, {lhs.dtype}, got {rhs.dtype}")
    return lhs, rhs
