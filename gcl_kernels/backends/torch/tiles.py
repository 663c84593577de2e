"""Tiles of logits: how the N x M plane is cut, how a tile is made, and where its positives are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...pairs import Pairs
from ..base2 import high_and_low
from ..chunks import slices
from ..contract import statistics_dtype
from ..cpu import bfloat16_products
from ..positives import positives_by_column, positives_by_row
from ..products import TERMS, by_onednn, onednn_product, product
from ..settings import current, may_read_on_host, workspace_bytes
from ..terms import scale2
from .modify import modify_, modify_positives_, prepared

# A 1024 x 1024 float32 tile (4 MiB) and its operands stay in a CPU's last-level cache while matrix products of that size still
# run at the machine's full rate. Accelerators want few launches: chunks as large as the workspace budget allows.
CPU_TILE = 1024
# Columns of memory between a tile's rows: rows a power of two of bytes apart would share few sets of the caches, and products
# that read the tile transposed would run 4% slower.
GAP = 16


@dataclass
class Plane:
    """The inputs in the dtypes that tiles are made in, and how the N x M plane is cut into tiles."""

    pairs: Pairs  # lhs as given, rhs in the operand dtype, what `modify_` reads prepared for it
    scale2: tuple[Tensor, Tensor]  # logit_scale * log2(e), high + low part: one float32 would bias every logit
    compute: torch.dtype  # of tiles and accumulators
    logit_operand: torch.dtype  # of what the logits' products read
    operand: torch.dtype  # of what G's products read
    tile: tuple[int, int]
    onednn: bool  # whether products allocate their results
    buffers: list[Tensor | None] = field(
        default_factory=lambda: [None, None]
    )  # flat, one tile each, once they are used
    chunk: tuple[int, Tensor] | None = field(default=None)  # first row and `scaled_lhs` of the chunk in use

    @classmethod
    def of(cls, pairs: Pairs, tile: tuple[int, int]) -> Plane:
        lhs, rhs = pairs.lhs, pairs.rhs
        compute = compute_dtype(lhs.dtype)
        # Half-precision products only where the device has them at full rate with float32 results, and on CPU tensors that
        # take a device's path. Operands are widened elsewhere, which is exact (and on most CPUs faster).
        as_on_device = lhs.device.type == "cpu" and not may_read_on_host(lhs.device)
        logit_operand = operand = lhs.dtype if lhs.device.type == "cuda" or as_on_device else compute
        # A CPU rounds what it multiplies in bfloat16 to bfloat16. A part of a gradient bears that, a logit does not.
        if lhs.device.type == "cpu" and lhs.dtype == torch.bfloat16 and bfloat16_products() == "native":
            operand = torch.bfloat16
        if 1 not in rhs.stride():
            rhs = rhs.contiguous()  # once, instead of once a product
        tile = min(tile[0], pairs.n), min(tile[1], pairs.m)
        scale = high_and_low(scale2(pairs), compute)
        pairs = replace(pairs, rhs=rhs.to(operand), **prepared(pairs, compute))
        onednn = logit_operand == compute and by_onednn(lhs.new_empty(0, dtype=compute))
        return cls(pairs, scale, compute, logit_operand, operand, tile, onednn)

    @property
    def statistics(self) -> torch.dtype:
        return statistics_dtype(self.pairs.lhs.device)

    @property
    def reads(self) -> bool:
        """Whether numbers may be read on the host."""
        return may_read_on_host(self.pairs.lhs.device)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of every tile, row by row."""
        for rows in slices(self.pairs.n, self.tile[0]):
            for cols in slices(self.pairs.m, self.tile[1]):
                yield rows, cols
            self.chunk = None  # what is allocated before it is needed again takes its place

    # ---- memory

    def buffer(self, index: int, rows: slice, cols: slice) -> Tensor:
        memory = self.buffers[index]
        if memory is None:
            memory = self.buffers[index] = self.pairs.lhs.new_empty(tile_numel(*self.tile), dtype=self.compute)
        return view_of_tile(memory, rows, cols)

    def new_tile(self, rows: slice, cols: slice) -> Tensor:
        numel = tile_numel(rows.stop - rows.start, cols.stop - cols.start)
        return view_of_tile(self.pairs.lhs.new_empty(numel, dtype=self.compute), rows, cols)

    def new_positive(self) -> Tensor:
        return self.pairs.lhs.new_zeros((self.pairs.n, self.pairs.positives), dtype=self.compute)

    def empty_lines(self, length: int) -> Tensor:
        return self.pairs.lhs.new_full((length,), -math.inf, dtype=self.statistics)

    # ---- logits

    def logits(self, rows: slice, cols: slice) -> Tensor:
        """(R, C) base-2 logits, hidden pairs -inf (labelled ones too); in the first buffer or in new memory."""
        s2 = self.unmodified_logits(rows, cols, False)
        modify_(s2, self.pairs, rows, cols)
        return s2

    def negatives(self, rows: slice, cols: slice, positive: Tensor, keep: bool = False) -> Tensor:
        """`logits` with -inf at positives, whose logits go to `positive`. `keep`: in new memory."""
        s2 = self.unmodified_logits(rows, cols, keep)
        self.read_positives(s2, rows, cols, positive)
        modify_(s2, self.pairs, rows, cols)
        self.write_positives(s2, rows, cols, None)
        return s2

    def unmodified_logits(self, rows: slice, cols: slice, keep: bool) -> Tensor:
        x, y = self.scaled_lhs(rows), self.pairs.rhs[cols].to(self.logit_operand).t()
        if self.onednn:
            # the rounding of half precision is far above what one accumulator loses
            return onednn_product(x, y, TERMS if self.pairs.lhs.dtype == self.compute else None)
        s2 = product(x, y, out=self.new_tile(rows, cols) if keep else self.buffer(0, rows, cols))
        return s2 if self.logit_operand == self.compute else s2.mul_(self.scale2[0])

    def scaled_lhs(self, rows: slice) -> Tensor:
        """lhs * scale * log2(e), or lhs itself where the product would have to be rounded to half precision."""
        if self.chunk is None or self.chunk[0] != rows.start:
            self.chunk = None  # free before the next is made
            x = self.pairs.lhs[rows].to(self.logit_operand)
            if self.logit_operand == self.compute:
                x = (x * self.scale2[0]).addcmul_(x, self.scale2[1])
            self.chunk = rows.start, x
        return self.chunk[1]

    # ---- positives

    def positives_of(self, positive: Tensor, dim: int, lines: slice) -> Tensor:
        """Base-2 logsumexp of the positives in each of these rows (dim 1) or columns (dim 0)."""
        labels = self.pairs.labels
        if dim == 1:
            return positives_by_row(None if labels is None else labels[lines], positive[lines].to(self.statistics))
        return positives_by_column(labels, positive.to(self.statistics), self.pairs.m)[lines]

    def read_positives(self, s2: Tensor, rows: slice, cols: slice, positive: Tensor) -> None:
        """positive[i, p] = s2[i, t_ip] for the labels inside this tile, with what is added to logits."""
        if self.pairs.labels is None:
            span, diagonal = diagonal_of(s2, rows, cols)
            if diagonal is not None:
                positive[span, 0] = diagonal
                modify_positives_(
                    positive[span, 0], self.pairs, lambda: torch.arange(span.start, span.stop, device=s2.device)
                )
            return
        inside, index = self.labels_in(rows, cols)
        if inside is not None:
            here = modify_positives_(s2.gather(1, index), self.pairs, lambda: index + cols.start)
            positive[rows] = torch.where(inside, here, positive[rows])

    def write_positives(self, target: Tensor, rows: slice, cols: slice, entry: Tensor | None) -> None:
        """target[i, t_ip] = entry[i, p] (-inf for None) for the labels inside this tile, without a host sync."""
        if self.pairs.labels is None:
            span, diagonal = diagonal_of(target, rows, cols)
            if diagonal is not None:
                diagonal.fill_(-math.inf) if entry is None else diagonal.copy_(entry[span, 0])
            return
        inside, index = self.labels_in(rows, cols)
        if inside is None:
            return
        values = torch.full_like(index, -math.inf, dtype=target.dtype) if entry is None else entry[rows]
        # A label outside the tile must still write somewhere: it repeats its row's first label inside, or, where there is
        # none, rewrites what it finds.
        first = inside.int().argmax(dim=1, keepdim=True)
        index = torch.where(inside, index, index.gather(1, first))
        values = torch.where(inside, values, values.gather(1, first))
        values = torch.where(inside.any(dim=1, keepdim=True), values, target.gather(1, index))
        target.scatter_(1, index, values)

    def labels_in(self, rows: slice, cols: slice) -> tuple[Tensor | None, Tensor]:
        """Which labels (R, P) lie in this tile and their column within it (clamped); None where the host sees none."""
        assert self.pairs.labels is not None
        index = self.pairs.labels[rows] - cols.start
        width = cols.stop - cols.start
        inside = (index >= 0) & (index < width)  # label -1 never is: the shift keeps it negative
        if self.reads and not bool(inside.any()):
            return None, index
        return inside, index.clamp(0, width - 1)


def diagonal_of(tile: Tensor, rows: slice, cols: slice) -> tuple[slice, Tensor | None]:
    """The rows i whose column i lies in this tile, and a view of those entries; None where there is none."""
    span = slice(max(rows.start, cols.start), min(rows.stop, cols.stop))
    if span.start >= span.stop:
        return span, None
    return span, tile[span.start - rows.start :, span.start - cols.start :].diagonal()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of tiles and accumulators."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_numel(rows: int, cols: int) -> int:
    return rows * (cols + GAP)


def view_of_tile(memory: Tensor, rows: slice, cols: slice) -> Tensor:
    r, c = rows.stop - rows.start, cols.stop - cols.start
    return memory[: tile_numel(r, c)].view(r, c + GAP)[:, :c]


def square_tile(n: int, m: int, device: torch.device, compute: torch.dtype) -> tuple[int, int]:
    """(rows, columns) of a tile where both directions are wanted."""
    given = current().tile
    if given is not None:
        return given
    return (CPU_TILE, CPU_TILE) if device.type == "cpu" else (lines_at_once(m, device, compute), m)


def tile_of_whole_lines(n: int, m: int, by_row: bool, device: torch.device, compute: torch.dtype) -> tuple[int, int]:
    given = current().tile
    if by_row:
        return given[0] if given else lines_at_once(m, device, compute), m
    return n, given[1] if given else lines_at_once(n, device, compute)


def lines_at_once(length: int, device: torch.device, compute: torch.dtype) -> int:
    """How many whole rows (columns) of `length` logits a tile may hold."""
    if device.type == "cpu":
        return max(16, min(CPU_TILE, 8 * CPU_TILE**2 // length))  # at most 32 MiB of float32
    # a tile, its factors and the temporaries of one exponential
    return max(16, workspace_bytes() // (4 * length * compute.itemsize) // 16 * 16)


def tiles_to_store(tile: tuple[int, int], gradients_bytes: int, compute: torch.dtype = torch.float32) -> int:
    """How many tiles of exponentials fit the workspace budget and the memory that the gradients will need.

    The two tiles in use count. The gradients are first written tile by tile, as the stored ones go.
    """
    return max((workspace_bytes() + gradients_bytes) // (tile_numel(*tile) * compute.itemsize) - 2, 1)
