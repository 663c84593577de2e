"""The passes over all tiles: statistics, gradients, and both at once. `contract` says what each is given and returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...pairs import Pairs
from ..base2 import LN2
from ..chunks import slices
from ..contract import Gradients, Lines, Need, Want
from ..positives import positive_entries
from ..products import add_product, add_rounded_product
from ..upstream import normalized
from .softmax import LogSumExps, Shared, Softmaxes, Stored, softmax_
from .tiles import Plane, compute_dtype, square_tile, tile_of_whole_lines, tiles_to_store


def forward(pairs: Pairs, want: Want) -> Lines:
    return statistics_pass(plane_of(pairs), want)[0]


def backward(
    pairs: Pairs,
    statistics: Lines,
    upstream: Lines,
    need: Need,
    *,
    joined: bool = True,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """G is formed tile by tile and multiplied by rhs and by lhs."""
    return gradient_pass(plane_of(pairs), statistics, upstream, need, joined=joined, dtype=dtype)


def forward_with_gradient(pairs: Pairs, upstream: Lines, need: Need, *, joined: bool = True) -> tuple[Lines, Gradients]:
    """One direction: a tile holds whole lines, so that their logsumexp is known before the tile is left.

    Both directions: the exponentials of as many tiles as the workspace budget holds are stored for the second pass. The others
    are made again.
    """
    if upstream.row is None or upstream.col is None:
        return one_direction_pass(pairs, upstream, need, joined)
    plane = plane_of(pairs)
    gradients_bytes = need.lhs * pairs.lhs.nbytes + need.rhs * pairs.rhs.nbytes
    room = tiles_to_store(plane.tile, gradients_bytes, plane.compute) if plane.reads else 0
    statistics, stored = statistics_pass(plane, Want(True, True, joined), room)
    return statistics, gradient_pass(plane, statistics, upstream, need, stored, joined=joined)


def plane_of(pairs: Pairs) -> Plane:
    return Plane.of(pairs, square_tile(pairs.n, pairs.m, pairs.lhs.device, compute_dtype(pairs.lhs.dtype)))


def statistics_pass(plane: Plane, want: Want, stored_tiles: int = 0) -> tuple[Lines, Stored]:
    """The statistics, and the exponentials of the first `stored_tiles` tiles."""
    sums, positive = LogSumExps(plane, want, stored_tiles), plane.new_positive()
    for rows, cols in plane.tiles():
        room = sums.stored.room
        s2 = plane.negatives(rows, cols, positive, keep=room)
        if not sums.one_exponential:
            sums.take(s2, rows, cols)
        elif not sums.take_shared(s2, rows, cols):
            del s2  # the attempt overwrote it
            s2 = plane.negatives(rows, cols, positive)
            sums.take(s2, rows, cols)
        elif room:
            sums.stored.tiles[rows.start, cols.start] = s2
        del s2  # free before the next is made
    return sums.finish(positive, want.joined), sums.stored


def gradient_pass(
    plane: Plane,
    statistics: Lines,
    upstream: Lines,
    need: Need,
    stored: Stored | None = None,
    *,
    joined: bool,
    dtype: torch.dtype | None = None,
) -> Gradients:
    upstream, norm = normalized(upstream, plane.operand)
    softmaxes = Softmaxes.of(plane, statistics, upstream)
    # A tile that was not stored may exceed the stored ones' references: it is read against its rows' logsumexp.
    shared = None if stored is None else Shared.of(stored.reference, softmaxes.row, softmaxes.col)
    entry = positive_entries(plane.pairs.labels, statistics, upstream, joined).to(plane.compute)
    totals = Totals.of(plane, need)
    for rows, cols in plane.tiles():
        e = None if stored is None else stored.tiles.pop((rows.start, cols.start), None)
        if e is not None and shared is not None:
            gradient = shared.gradient_tile_(plane, e, rows, cols)
        else:
            gradient = softmaxes.gradient_tile_(plane.logits(rows, cols), rows, cols)
        plane.write_positives(gradient, rows, cols, entry)
        totals.add(gradient, rows, cols)
        del e, gradient  # free before the next is made
    return totals.finish(norm, dtype)


def one_direction_pass(pairs: Pairs, upstream: Lines, need: Need, joined: bool) -> tuple[Lines, Gradients]:
    by_row = upstream.row is not None
    device, compute = pairs.lhs.device, compute_dtype(pairs.lhs.dtype)
    plane = Plane.of(pairs, tile_of_whole_lines(pairs.n, pairs.m, by_row, device, compute))
    upstream, norm = normalized(upstream, plane.operand)
    g_line = upstream.row if by_row else upstream.col
    assert g_line is not None
    dim, line = int(by_row), plane.empty_lines(pairs.n if by_row else pairs.m)
    positive, totals = plane.new_positive(), Totals.of(plane, need)
    for rows, cols in plane.tiles():
        s2 = plane.negatives(rows, cols, positive)
        lines = rows if by_row else cols
        of_positives = plane.positives_of(positive, dim, lines) if joined else None
        line[lines] = softmax_(s2, dim, of_positives, g_line[lines])
        so_far = Lines(line if by_row else None, None if by_row else line, positive.to(plane.statistics) * LN2)
        plane.write_positives(s2, rows, cols, positive_entries(pairs.labels, so_far, upstream, joined).to(compute))
        totals.add(s2, rows, cols)
        del s2  # free before the next is made
    statistics = Lines(
        line if by_row else None, None if by_row else line, positive.to(plane.statistics, copy=True).mul_(LN2)
    )
    return statistics, totals.finish(norm)


@dataclass
class Totals:
    """What tiles of G add up to: dlhs = scale G rhs, drhs = scale G^T lhs, dscale = <G, lhs rhs^T>."""

    plane: Plane
    need: Need
    lhs: Tensor | None  # accumulators in the compute dtype, without the scale
    rhs: Tensor | None

    @classmethod
    def of(cls, plane: Plane, need: Need) -> Totals:
        # <G, lhs rhs^T> = <G rhs, lhs> = <G^T lhs, rhs>: dscale costs O((N + M) D) once either product is there.
        with_lhs = need.lhs or (need.scale and not need.rhs)
        lhs, rhs = plane.pairs.lhs, plane.pairs.rhs
        return cls(
            plane,
            need,
            lhs.new_empty(lhs.shape, dtype=plane.compute) if with_lhs else None,
            rhs.new_empty(rhs.shape, dtype=plane.compute) if need.rhs else None,
        )

    def add(self, gradient: Tensor, rows: slice, cols: slice) -> None:
        plane, pairs = self.plane, self.plane.pairs
        add = add_product if plane.operand == plane.logit_operand else add_rounded_product
        gradient = gradient.to(plane.operand)
        if self.lhs is not None:
            add(self.lhs[rows], gradient, pairs.rhs[cols], first=cols.start == 0)
        if self.rhs is not None:
            add(self.rhs[cols], gradient.t(), pairs.lhs[rows].to(plane.operand), first=rows.start == 0)

    def finish(self, norm: Tensor | None, dtype: torch.dtype | None = None) -> Gradients:
        pairs, kind = self.plane.pairs, self.plane.statistics
        scale, dtype = pairs.logit_scale, pairs.lhs.dtype if dtype is None else dtype
        factor = scale if norm is None else scale * norm.to(scale)
        dscale = None
        if self.need.scale:
            product, side = (self.lhs, pairs.lhs) if self.lhs is not None else (self.rhs, pairs.rhs)
            assert product is not None
            parts = slices(len(side), self.plane.tile[0])
            dscale = torch.stack([(product[rows] * side[rows]).sum(dim=1).sum(dtype=kind) for rows in parts]).sum()
            dscale = (dscale if norm is None else dscale * norm).to(scale)
        return Gradients(
            self.lhs.mul_(factor).to(dtype) if self.lhs is not None and self.need.lhs else None,
            self.rhs.mul_(factor).to(dtype) if self.rhs is not None else None,
            dscale,
        )
