"""`Pairs`: every input of a primitive, checked once and carried whole to the backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .validation import check_ids, check_labels, check_pair, check_scale

# Along which side of the N x M plane a field's first dimension lies.
ALONG = {"lhs": "rows", "labels": "rows", "lhs_ids": "rows", "rhs": "cols", "rhs_ids": "cols"}


@dataclass(frozen=True)
class Pairs:
    """Rows of lhs against rows of rhs. To add an input: a field, its side in `ALONG`, its check in `of`."""

    lhs: Tensor  # (N, D)
    rhs: Tensor  # (M, D), the same dtype and device
    logit_scale: Tensor  # 0-d, float64 for float64 inputs, else float32
    labels: Tensor | None = None  # (N, P) int64, -1 for none; None: row i's positive is column i
    lhs_ids: Tensor | None = None  # (N, K) int64, below 0 for none; both or neither
    rhs_ids: Tensor | None = None  # (M, K)

    @classmethod
    def of(
        cls,
        lhs: Tensor,
        rhs: Tensor,
        logit_scale: Tensor | float,
        *,
        labels: Tensor | None = None,
        lhs_ids: Tensor | None = None,
        rhs_ids: Tensor | None = None,
        distributed: bool = False,
    ) -> Pairs:
        """Checks a caller's arguments and brings them into the shapes and dtypes above.

        `distributed`: labels count the columns of all ranks, which only the ranks together can check.
        """
        check_pair(lhs, rhs)
        check_labels(labels, lhs, rhs, distributed)
        check_ids(lhs_ids, rhs_ids, lhs, rhs)
        lhs, rhs = autocast_like_matmul(lhs, rhs)
        return cls(
            lhs,
            rhs,
            check_scale(logit_scale, lhs),
            None if labels is None else labels.reshape(len(lhs), -1).to(torch.int64),
            None if lhs_ids is None else lhs_ids.reshape(len(lhs), -1),
            None if rhs_ids is None else rhs_ids.reshape(len(rhs), -1),
        )

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
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lhs, self.rhs, self.logit_scale

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The fields that are there, by name."""
        return ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None)


def autocast_like_matmul(lhs: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    device = lhs.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (lhs.dtype, rhs.dtype):
        dtype = torch.get_autocast_dtype(device)
        return lhs.to(dtype), rhs.to(dtype)
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"rhs: expected the dtype of lhs, {lhs.dtype}, got {rhs.dtype}")
    return lhs, rhs
