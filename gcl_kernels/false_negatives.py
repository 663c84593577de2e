"""False negatives by similarity: limits that the positives of a batch set, in O(N D)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import distributed
from .distributed import primitive
from .distributed.exchange import bring_home, outside_compiled_graphs
from .pairs import Pairs


@dataclass(frozen=True)
class FalseNegatives:
    """An unlabelled pair is one where its similarity is above `positive + margin` or above `ratio * positive`.

    `positive` is the largest similarity of a positive in its row, and likewise in its column: either hides the pair.
    """

    margin: float | None = None
    ratio: float | None = None

    def hidden_in(self, pairs: Pairs, ranks: distributed.Ranks | None) -> Pairs:
        """With the limits. A row or column without a positive has none."""
        if self.margin is None and self.ratio is None:
            return pairs
        with torch.no_grad():
            apart = pairs.labels is not None and isinstance(ranks, distributed.GraphRanks)
            of_rows, of_cols = (_outside_graph if apart else largest_positives)(pairs, ranks)
            lhs_limit = self.limit(of_rows)
            return replace(
                pairs, lhs_limit=lhs_limit, rhs_limit=lhs_limit if of_cols is of_rows else self.limit(of_cols)
            )

    def limit(self, positive: Tensor) -> Tensor:
        limits = [] if self.margin is None else [positive + self.margin]
        limits += [] if self.ratio is None else [self.ratio * positive]
        limit = limits[0] if len(limits) == 1 else torch.minimum(*limits)
        return limit.masked_fill_(positive == -math.inf, math.inf)


@outside_compiled_graphs
def _outside_graph(pairs: Pairs, ranks: distributed.GraphRanks) -> tuple[Tensor, Tensor]:
    return largest_positives(pairs, ranks.known())


def largest_positives(pairs: Pairs, ranks: distributed.Ranks | None) -> tuple[Tensor, Tensor]:
    """(N,) and (M,) the largest similarity of a positive of each row and of each column; -inf where there is none."""
    kind = pairs.logit_scale.dtype
    if pairs.labels is None:  # over ranks, too: row i's positive is its own rank's column i
        of_rows = (pairs.lhs.to(kind) * pairs.rhs[: pairs.n].to(kind)).sum(dim=1)
        if pairs.n == pairs.m:
            return of_rows, of_rows
        of_cols = pairs.lhs.new_full((pairs.m,), -math.inf, dtype=kind)
        of_cols[: pairs.n] = of_rows
        return of_rows, of_cols
    of_rows = pairs.lhs.new_full((pairs.n,), -math.inf, dtype=kind)
    of_cols = pairs.lhs.new_full((pairs.m,), -math.inf, dtype=kind)
    if ranks is None:
        blocks: Iterator[tuple[object, slice, list[Pairs]]] = iter([(None, slice(0, pairs.m), [pairs])])
    else:
        blocks = primitive.blocks(primitive.gathered([pairs], ranks), ranks)
        of_cols = pairs.lhs.new_full((ranks.m,), -math.inf, dtype=kind)  # over this rank's rows
    for _, cols, (block,) in blocks:
        assert block.labels is not None
        for p in range(block.positives):
            column, labelled = block.labels[:, p].clamp(min=0), block.labels[:, p] >= 0
            similarity = (block.lhs.to(kind) * block.rhs[column].to(kind)).sum(dim=1)
            similarity = torch.where(labelled, similarity, -math.inf)
            of_rows = torch.maximum(of_rows, similarity)
            of_cols[cols].scatter_reduce_(0, column, similarity, "amax")
    if ranks is not None:
        of_cols = bring_home(of_cols, ranks.cols, ranks.group, ranks.rank, "the exchange of limits").amax(dim=0)
    return of_rows, of_cols
