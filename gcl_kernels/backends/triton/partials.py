"""(max, sum of exponentials) of lines, base 2: what a tile leaves of its part of a line, and their union over tiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..chunks import cdiv
from .run import run

# 32 lines are one 128-byte line of a partial; 32 tiles of them keep 8 loads a thread in flight.
MERGE_TILES, MERGE_LINES = 32, 32

Parts = tuple[Tensor, Tensor] | tuple[Tensor]  # (tops, totals), or sums that are all relative to the same number


class Statistics:
    """Running (max, sum) of some lines; the sum alone, and no top, where all are relative to the same number."""

    def __init__(self, top: Tensor | None, total: Tensor):
        self.top, self.total = top, total

    @classmethod
    def of(cls, like: Tensor, lines: int, tops: bool = True) -> Statistics:
        top = like.new_full((lines,), -math.inf, dtype=torch.float32) if tops else None
        return cls(top, like.new_zeros((lines,), dtype=torch.float64))

    def __getitem__(self, lines: slice) -> Statistics:
        return Statistics(None if self.top is None else self.top[lines], self.total[lines])

    @property
    def parts(self) -> Parts:
        """As those of one tile."""
        return (self.total,) if self.top is None else (self.top, self.total)

    def merge(self, parts: Parts, tiles: int, skip: Tensor | None = None) -> None:
        """parts: `empty_parts`, or sums without tops, filled for these lines by so many tiles, tile by tile. `skip`: as
        `merge_partials` takes it."""
        lines = len(self.total)
        run(
            "merge_partials",
            cdiv(lines, MERGE_LINES),
            p_part_top=None if self.top is None else parts[0],
            p_part_total=parts[-1],
            p_top=self.top,
            p_total=self.total,
            p_skip=skip,
            n_lines=lines,
            n_tiles=tiles,
            BLOCK_TILES=MERGE_TILES,
            BLOCK_LINES=MERGE_LINES,
            num_warps=4,
        )

    def logsumexp2(self) -> Tensor:
        assert self.top is not None
        return self.total.log2().add_(self.top)


def empty_parts(like: Tensor, tiles: int, lines: int) -> tuple[Tensor, Tensor]:
    """Tops and totals of each line in each tile, for an epilogue to fill."""
    tops, totals = (like.new_empty(tiles * lines, dtype=torch.float32) for _ in range(2))
    return tops, totals
