"""The loss of MultipleNegativesRankingLoss over `pairwise_logsumexp`: no N x N matrix in any of its directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import distributed
from ...false_negatives import FalseNegatives
from ...losses import gcl_loss
from ...lse import pairwise_logsumexp
from ...pairs import autocast_like_matmul
from ...types import Backend


class TextIds(NamedTuple):
    """An id >= 0 of each text; equal texts have equal ids."""

    queries: Tensor  # (N,)
    docs: list[Tensor]  # of each column of documents (N,)

    @property
    def positives(self) -> Tensor:
        return self.docs[0]

    @property
    def documents(self) -> Tensor:
        return torch.cat(self.docs)

    @property
    def queries_of_documents(self) -> Tensor:
        """-1 for a mined negative: it is none of an equal query's positives."""
        none = torch.full_like(self.queries, -1)
        return torch.cat([self.queries, *[none] * (len(self.docs) - 1)])

    def of_rows_and_documents(self) -> tuple[list[Tensor], list[Tensor]]:
        """Row i hides the documents that equal its positive or its query, and the positives of an equal query."""
        rows = [self.positives, self.queries, self.queries]
        return rows, [self.documents, self.queries_of_documents, self.documents]

    def of_rows_and_queries(self) -> tuple[list[Tensor], list[Tensor]]:
        """Row i hides the queries that equal its own or its positive, and those of an equal positive."""
        rows = [self.queries, self.positives, self.positives]
        return rows, [self.queries, self.positives, self.queries]


def _ids(rows: list[Tensor], columns: list[Tensor]) -> dict[str, Any]:
    return {"lhs_ids": torch.stack(rows, dim=1), "rhs_ids": torch.stack(columns, dim=1)} if rows else {}


@dataclass(frozen=True)
class Ranking:
    """MultipleNegativesRankingLoss's options, checked by it, and those of this package."""

    directions: frozenset[str]
    partition_mode: str
    hardness_mode: str | None  # None also where the strength is 0
    hardness_strength: float
    false_negatives: FalseNegatives
    backend: Backend | None = None

    def loss(
        self,
        queries: Tensor,
        docs: list[Tensor],
        scale: Tensor | float,
        *,
        weights: Tensor | None = None,
        ids: TextIds | None = None,
        group: Any = None,
    ) -> Tensor:
        """0-d, float32 at least: the mean of `w_i (log Z_i - s_ii)`; over a group this rank's share, as in `gcl_loss`.

        Args:
            queries: (N, D), used as given.
            docs: (N, D) each: positives, then columns of mined negatives.
            scale: 1 / temperature.
            weights: (N,), of the rows.
            ids: of texts that are no negatives of their equals.
            group: the process group whose ranks' documents and queries are negatives, too.
        """
        both = self.directions == {"query_to_doc", "doc_to_query"} and self.partition_mode == "per_direction"
        if self.hardness_mode is None and (both or self.directions == {"query_to_doc"}):
            return gcl_loss(
                queries,
                torch.cat(docs),
                scale,
                weights=weights,
                **_ids(*(([], []) if ids is None else ids.of_rows_and_documents())),
                directions="both" if both else "lhs_to_rhs",
                false_negative_margin=self.false_negatives.margin,
                false_negative_ratio=self.false_negatives.ratio,
                process_group=group,
                backend=self.backend,
            )
        rows = self._rows(queries, docs, scale, ids, group)
        rows = rows if weights is None else rows * weights
        share = 1.0
        if group is not None:
            counts = distributed.total(torch.tensor([len(rows)], device=rows.device, dtype=rows.dtype), group)
            share = group.size() * len(rows) / counts[0]
        return (rows.mean() * share).to(torch.promote_types(queries.dtype, torch.float32))

    def _rows(
        self, queries: Tensor, docs: list[Tensor], scale: Tensor | float, ids: TextIds | None, group: Any
    ) -> Tensor:
        """(N,) `log Z_i - s_ii`."""
        queries, documents = autocast_like_matmul(queries, torch.cat(docs))
        docs = list(documents.split(len(queries)))
        first = 0 if group is None else distributed.first_column(queries, group)
        own = torch.arange(len(queries), device=queries.device) + first
        similarity = _dots(queries, docs[0])
        options: dict[str, Any] = {"process_group": group, "backend": self.backend, "directions": "lhs_to_rhs"}
        by_row: dict[str, Any] = {}
        limited: dict[str, Any] = {}
        if self.false_negatives != FalseNegatives():
            limit = self.false_negatives.limit(similarity.detach())
            by_row = {"lhs_limit": limit}
            of_mined = limit.new_full((len(documents) - len(limit),), math.inf)
            limited = {"lhs_limit": limit, "rhs_limit": torch.cat([limit, of_mined])}
        rows, columns = ([], []) if ids is None else ids.of_rows_and_documents()
        hides = limited | _ids(rows, columns)
        terms = []
        if self.hardness_mode is None:
            if "doc_to_query" in self.directions:
                options["directions"] = "both"
            out = pairwise_logsumexp(queries, documents, scale, **options, **hides)
            options["directions"] = "lhs_to_rhs"
            positive = out.positive
            terms.append(out.row)
            if "doc_to_query" in self.directions:
                terms.append(out.col[: len(queries)])
        else:
            positive = scale * similarity
            terms.append(self._hard(queries, docs, scale, positive, hides, options, ids))
            if "doc_to_query" in self.directions:
                of_positives = {name: x[: len(queries)] for name, x in hides.items()}
                columns_only: dict[str, Any] = options | of_positives | {"directions": "rhs_to_lhs"}
                terms.append(pairwise_logsumexp(queries, docs[0], scale, **columns_only).col)
        unlabelled: dict[str, Any] = options | by_row | {"labels": torch.full_like(own, -1)}
        if "query_to_query" in self.directions:
            equal = ([], []) if ids is None else ids.of_rows_and_queries()
            hidden = _ids([own, *equal[0]], [own, *equal[1]])
            terms.append(pairwise_logsumexp(queries, queries, scale, **unlabelled, **hidden).row)
        if "doc_to_doc" in self.directions:
            hidden = _ids([own, *rows], [own.repeat(len(docs)), *columns])
            terms.append(pairwise_logsumexp(docs[0], documents, scale, **unlabelled, **hidden).row)
        stacked = torch.stack(terms)
        return (stacked.logsumexp(dim=0) if self.partition_mode == "joint" else stacked.mean(dim=0)) - positive

    def _hard(
        self,
        queries: Tensor,
        docs: list[Tensor],
        scale: Tensor | float,
        positive: Tensor,
        hides: dict[str, Any],
        options: dict[str, Any],
        ids: TextIds | None,
    ) -> Tensor:
        """(N,) logsumexp over documents, to whose logits `strength * similarity` is added, without a gradient."""
        harder = scale + self.hardness_strength
        # The gradient of scale alone goes to the embeddings, and that of the harder logits to the scale.
        share = scale / harder
        share = share.detach() if isinstance(share, Tensor) else share
        lhs, rhs = (_with_gradient_times(share, x) for x in (queries, torch.cat(docs)))
        options = options | hides | {"positives": "apart"}
        if self.hardness_mode == "all_negatives":
            return torch.logaddexp(positive, pairwise_logsumexp(lhs, rhs, harder, **options).row)
        group = options["process_group"]
        first = 0 if group is None else distributed.first_column(rhs, group)
        labels = torch.arange(first, first + len(rhs), device=rhs.device).reshape(len(docs), -1).T.contiguous()
        if self.hardness_mode == "in_batch_negatives":
            others = pairwise_logsumexp(lhs, rhs, harder, labels=labels, **options).row
        else:
            others = pairwise_logsumexp(queries, torch.cat(docs), scale, labels=labels, **options).row
        terms = [positive, others]
        for k, x in enumerate(docs[1:], start=1):
            similarity = _dots(queries, x)
            logits = scale * similarity
            if self.hardness_mode == "hard_negatives":
                logits = logits + self.hardness_strength * similarity.detach()
            if "lhs_limit" in hides:
                logits = logits.masked_fill(similarity > hides["lhs_limit"], -math.inf)
            if ids is not None:
                equal = (ids.docs[k] == ids.positives) | (ids.docs[k] == ids.queries)
                logits = logits.masked_fill(equal, -math.inf)
            terms.append(logits)
        return torch.stack(terms).logsumexp(dim=0)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """(N,) in the dtype of the statistics."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return (x.to(dtype) * y.to(dtype)).sum(dim=1)


def _with_gradient_times(factor: Tensor | float, x: Tensor) -> Tensor:
    return x.detach() + (factor * (x - x.detach())).to(x.dtype)
