"""Drawn problems: shapes, options and a seed, from which torch makes the numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..parts import Part

# around the edges of 16-, 64- and 128-wide tiles
EDGE_SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129)
EDGE_DIMS = (1, 2, 7, 8, 16, 17, 33, 64, 100)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tensors of one problem.

    Attributes:
        lhs: (N, D), a leaf that requires a gradient.
        rhs: (M, D), likewise.
        logit_scale: 0-d, likewise.
        options: the keyword arguments of `pairwise_logsumexp`.
    """

    lhs: Tensor
    rhs: Tensor
    logit_scale: Tensor
    options: dict[str, Tensor]

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lhs, self.rhs, self.logit_scale


@dataclasses.dataclass(frozen=True)
class Problem:
    """A drawn problem: everything that decides its tensors. `build` makes them.

    Attributes:
        n: rows of lhs.
        m: rows of rhs.
        d: width of both.
        positives: P of labels (N, P); 0: labels (N,); None: the default diagonal.
        id_channels: K of ids (N, K); 0: no ids.
        distinct_ids: how many ids there are.
        logit_scale: 1 / temperature.
        geometry: `"random"` unit vectors; `"paired"`: positives at a cosine near 0.9, as in a trained model; `"clustered"`: many
            near ties; `"wide"`: not normalised, logits up to about 200 in size.
        strided: True: rows apart in a larger buffer, with NaN between them.
        seed: of all numbers.
        limits: True: with `lhs_limit` and `rhs_limit`.
        bias: True: with `rhs_bias`.
    """

    n: int
    m: int
    d: int
    positives: int | None
    id_channels: int
    distinct_ids: int
    logit_scale: float
    geometry: str
    strided: bool
    seed: int
    limits: bool = False
    bias: bool = False

    def generator(self) -> torch.Generator:
        """A new one, of the problem's seed."""
        return torch.Generator().manual_seed(self.seed)

    def build(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Batch:
        """Fresh leaf tensors on `device` that require gradients.

        Values are rounded to `dtype` once, so every dtype above it agrees.
        """
        g = self.generator()
        lhs, rhs = (torch.randn(k, self.d, generator=g, dtype=torch.float64) for k in (self.n, self.m))
        if self.geometry == "clustered":
            centres = torch.randn(3, self.d, generator=g, dtype=torch.float64)
            lhs, rhs = (centres[torch.arange(len(x)) % 3] + 0.1 * x for x in (lhs, rhs))
        if self.geometry == "paired":
            k = min(self.n, self.m)
            rhs[:k] = lhs[:k] / lhs[:k].norm(dim=1, keepdim=True) + 0.5 * rhs[:k] / math.sqrt(self.d)
        if self.geometry == "wide":
            lhs, rhs = (3.0 * x / self.d**0.25 for x in (lhs, rhs))
        else:
            lhs, rhs = (x / x.norm(dim=1, keepdim=True) for x in (lhs, rhs))
        options = {}
        if self.positives is not None:
            shape = (self.n, self.positives) if self.positives else (self.n,)
            options["labels"] = torch.randint(-1, self.m, shape, generator=g)
        if self.id_channels:
            options["lhs_ids"], options["rhs_ids"] = (
                torch.randint(-3, self.distinct_ids, (k, self.id_channels), generator=g) for k in (self.n, self.m)
            )
        lhs, rhs = lhs.to(dtype), rhs.to(dtype)
        if self.limits:
            similarity = lhs.double() @ rhs.double().T
            options["lhs_limit"], options["rhs_limit"] = limits(similarity, dtype), limits(similarity.T, dtype)
        if self.bias:
            options["rhs_bias"] = 3 * torch.randn(self.m, generator=g)
        scale = torch.tensor(self.logit_scale, dtype=torch.promote_types(dtype, torch.float32))
        lhs, rhs = (self._lay_out(x).to(device).requires_grad_() for x in (lhs, rhs))
        return Batch(lhs, rhs, scale.to(device).requires_grad_(), {k: v.to(device) for k, v in options.items()})

    def _lay_out(self, x: Tensor) -> Tensor:
        """The same numbers, rows apart and reversed in memory order where the problem is strided."""
        if not self.strided:
            return x
        apart = torch.full((x.shape[1] + 1, 2 * x.shape[0]), math.nan, dtype=x.dtype)
        view = apart.t()[::2, : x.shape[1]]
        view.copy_(x)
        return view.detach()


def limits(similarity: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) a limit a row in the middle of the widest gap of the upper half of its similarities, so that no rounding of `dtype`
    decides who is above it; +inf where there is no such gap. A one-column row is below or above its limit by turns.
    """
    ordered = similarity.sort(dim=1).values
    if similarity.shape[1] == 1:
        return (
            similarity[:, 0]
            + torch.tensor([1.0, -1.0], dtype=similarity.dtype).repeat(len(similarity))[: len(similarity)]
        )
    upper = ordered[:, similarity.shape[1] // 2 - 1 :]
    gap, k = upper.diff(dim=1).max(dim=1)
    middle = upper.gather(1, k[:, None])[:, 0] + gap / 2
    clear = gap > 16 * torch.finfo(dtype).eps * similarity.abs().amax(dim=1)
    return torch.where(clear, middle, math.inf)


@dataclasses.dataclass(frozen=True)
class FieldProblem:
    """A drawn call of `aggregate_fields`. `build` makes its tensors.

    Some rows have a field that is the zero vector, one has fields that cancel, and where there is a mask some have no field.

    Attributes:
        n: rows.
        d: width of each field.
        n_fields: how many fields.
        masked: True: with a mask.
        normalize_fields: as in `aggregate_fields`.
        normalize: as in `aggregate_fields`.
        layout: `"rows"` contiguous, `"apart"` rows apart in a larger buffer, `"transposed"` a column-major buffer; what lies
            between and around the numbers is NaN.
        seed: of all numbers.
    """

    n: int
    d: int
    n_fields: int
    masked: bool
    normalize_fields: bool
    normalize: bool
    layout: str
    seed: int

    def build(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> tuple[list[Tensor], dict[str, Any]]:
        """(fields, keyword arguments): fresh leaf tensors (N, D) of `dtype` on `device` that require gradients; weights, mask and
        both switches."""
        g = torch.Generator().manual_seed(self.seed)
        values = torch.randn(self.n_fields, self.n, self.d, generator=g, dtype=torch.float64)
        values *= torch.rand(self.n_fields, self.n, 1, generator=g, dtype=torch.float64).mul(6).sub(3).exp()
        values[0, torch.rand(self.n, generator=g) < 0.2] = 0.0
        weights = torch.rand(self.n_fields, generator=g, dtype=torch.float64) + 0.01
        mask = torch.rand(self.n, self.n_fields, generator=g) > 0.4 if self.masked else None
        if self.n_fields == 2:
            weights[:] = 0.5
            values[1, self.n // 2] = -values[0, self.n // 2]
        fields = [self._lay_out(x.to(dtype)).to(device).requires_grad_() for x in values]
        options = {
            "weights": weights.tolist(),
            "mask": None if mask is None else mask.to(device),
            "normalize_fields": self.normalize_fields,
            "normalize": self.normalize,
        }
        return fields, options

    def _lay_out(self, x: Tensor) -> Tensor:
        if self.layout == "rows":
            return x
        n, d = x.shape
        if self.layout == "apart":  # rows that start on 16 numbers, as the parts of a wider matrix often do
            view = torch.full((n + 2, (d // 16 + 2) * 16), math.nan, dtype=x.dtype)[1 : n + 1, 16 : 16 + d]
        else:
            view = torch.full((d + 1, 2 * n), math.nan, dtype=x.dtype).t()[::2, :d]
        view.copy_(x)
        return view.detach()


@dataclasses.dataclass(frozen=True)
class PartsProblem:
    """A drawn call of `multi_part_loss`. `build` makes its tensors.

    Attributes:
        rows: N of each part.
        m: documents.
        d: width.
        kinds: of each part, as letters: weights, labels (N,), L: labels (N, 2), ids, fields, present (what absent rows hold is
            NaN).
        fields: whether documents are fields with gaps.
        seed: of all numbers.
    """

    rows: tuple[int, ...]
    m: int
    d: int
    kinds: tuple[str, ...]
    fields: bool
    seed: int

    def build(
        self, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> tuple[dict[str, Part], Any, dict[str, Any]]:
        """(parts, rhs, keyword arguments); embeddings are fresh leaf tensors of `dtype` on `device` that require gradients."""
        g = torch.Generator().manual_seed(self.seed)

        def embeddings(n: int, absent: Tensor | None = None) -> Tensor:
            x = torch.randn(n, self.d, generator=g, dtype=torch.float64)
            x = x / x.norm(dim=1, keepdim=True)
            x = x if absent is None else x.masked_fill(absent[:, None], math.nan)
            return x.to(dtype).to(device).requires_grad_()

        parts = {}
        for k, (n, kind) in enumerate(zip(self.rows, self.kinds, strict=True)):
            given: dict[str, Any] = {"share": (1.0, 0.25, 3.0)[k % 3]}
            shape = (n, 2) if "L" in kind else (n,)
            if "l" in kind.lower():
                given["labels"] = torch.randint(-1, self.m, shape, generator=g)
            if "w" in kind:
                given["weights"] = 5 * torch.rand(shape, generator=g, dtype=torch.float64).to(
                    torch.promote_types(dtype, torch.float32)
                )
            if "i" in kind:
                given["lhs_ids"], given["rhs_ids"] = (torch.randint(-2, 5, (x,), generator=g) for x in (n, self.m))
            if "p" in kind:
                given["present"] = torch.rand(n, generator=g) > 0.3
            absent = ~given["present"] if "p" in kind else None
            given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
            if "f" in kind:
                lhs: Any = {"text": embeddings(n, absent), "tags": embeddings(n, absent)}
                given["lhs_field_mask"] = (torch.rand(n, 2, generator=g) > 0.3).to(device)
            else:
                lhs = embeddings(n, absent)
            parts[f"part{k}"] = Part(lhs, **given)
        if not self.fields:
            return parts, embeddings(self.m), {}
        mask = (torch.rand(self.m, 2, generator=g) > 0.3).to(device)
        rhs = {"image": embeddings(self.m), "title": embeddings(self.m)}
        return parts, rhs, {"rhs_field_mask": mask, "rhs_field_weights": {"image": 0.9, "title": 0.1}}
