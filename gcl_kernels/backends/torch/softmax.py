"""The softmax loss of a tile: what it adds to the rows' and columns' logsumexp, and its part of the gradient G.

Both passes need the softmax of a tile by rows and by columns. They take both from ONE exponential a logit,
`e_ij = exp2(s2_ij - r_i)` with a reference r_i per row: sums over j give rows, sums over i weighted by exp2(r_i) give columns,
and `G_ij = e_ij * (a_i + u_i v_j)`. That is exact unless the references of some lines lie so far apart that a factor under-
or overflows. A tile where they do (extreme scales, lines with nothing visible, non-finite inputs) takes two exponentials.
Finding out reads a number on the host, so every device but the CPU takes two exponentials always and never synchronises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..base2 import LN2, SAFE_SPREAD, Line, exponentials_, logsumexp2_
from ..chunks import slices
from ..contract import Lines, Want, statistics_dtype
from .tiles import Plane

# A row's reference is the maximum of its first tile. A later tile may exceed it by at most 2^30. Beyond that a row's factor
# (`Shared`) could underflow, below 2^-126; within it, what underflow drops is at most 2^-46 of the column's sum.
SAFE_EXCESS = 30.0
# Rows whose first tile's maxima are within 2^24 of 1 use reference 0, which saves two passes over a tile. Their sums may reach
# 2^60 (PLAIN_SUM). The error from underflow is then at most 2^-66, below float64 rounding.
PLAIN = 24.0
PLAIN_SUM = 60.0
# A tile is multiplied by its factors so many rows at a time: those are read while they are in the nearer caches.
FACTOR_ROWS = 512


# ---- forward


@dataclass
class Stored:
    """What the statistics leave for the gradients: e = exp2(s2 - reference) of the first tiles, 0 at positives."""

    reference: Tensor  # (N,)
    capacity: int = 0  # tiles
    tiles: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by first row and column

    @property
    def room(self) -> bool:
        """Whether one more may be stored."""
        return len(self.tiles) < self.capacity


class LogSumExps:
    """Row and column logsumexp of negatives, in base 2, as tiles add to them."""

    def __init__(self, plane: Plane, want: Want, stored_tiles: int = 0):
        self.row = plane.empty_lines(plane.pairs.n) if want.row else None
        self.col = plane.empty_lines(plane.pairs.m) if want.col else None
        self.plane = plane
        self.one_exponential = want.both and plane.reads
        self.reference: Tensor | None = None  # of the chunk's rows; None: 0
        self.stored = Stored(plane.pairs.lhs.new_zeros(plane.pairs.n, dtype=plane.compute), stored_tiles)

    def take_shared(self, s2: Tensor, rows: slice, cols: slice) -> bool:
        """Adds a tile by one exponential a logit; s2 becomes exp2(s2 - reference). False, and nothing added, if inexact."""
        if cols.start == 0:
            self.reference = row_reference(s2)
            if self.reference is not None:
                self.stored.reference[rows] = self.reference
        parts = shared_logsumexp2_(s2, self.reference)
        if parts is None:
            return False
        self.add(rows, cols, *parts)
        return True

    def take(self, s2: Tensor, rows: slice, cols: slice) -> None:
        """Adds a tile, each line from its own maximum; overwrites it."""
        row = col = None
        if self.row is not None:
            tile = s2 if self.col is None else self.plane.buffer(1, rows, cols).copy_(s2)
            row = logsumexp2_(tile, 1)
        if self.col is not None:
            col = logsumexp2_(s2, 0)
        self.add(rows, cols, row, col)

    def add(self, rows: slice, cols: slice, row: Tensor | None, col: Tensor | None) -> None:
        if self.row is not None and row is not None:
            self.row[rows] = row if cols.start == 0 else torch.logaddexp2(self.row[rows], row)
        if self.col is not None and col is not None:
            self.col[cols] = col if rows.start == 0 else torch.logaddexp2(self.col[cols], col)

    def finish(self, positive: Tensor, joined: bool) -> Lines:
        """With the positives' logits (N, P), which join their lines here if they do; in natural-log units."""
        plane, row, col = self.plane, self.row, self.col
        if row is not None:
            if joined:
                row = torch.logaddexp2(row, plane.positives_of(positive, 1, slice(0, plane.pairs.n)))
            row = row.mul_(LN2)
        if col is not None:
            if joined:
                col = torch.logaddexp2(col, plane.positives_of(positive, 0, slice(0, plane.pairs.m)))
            col = col.mul_(LN2)
        return Lines(row, col, positive.to(plane.statistics, copy=True).mul_(LN2))


def row_reference(s2: Tensor) -> Tensor | None:
    """What the rows of a chunk are read against, the maxima of its first tile; None for 0, where that will do."""
    top = s2.amax(dim=1)
    lowest, highest = top.aminmax()
    if float(lowest) >= -PLAIN and float(highest) <= PLAIN:  # False for NaN
        return None
    return top.masked_fill_(top == -math.inf, 0.0)


def exp2_against_(s2: Tensor, reference: Tensor | None) -> Tensor:
    return s2.exp2_() if reference is None else s2.sub_(reference[:, None]).exp2_()


def shared_logsumexp2_(s2: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Base-2 logsumexp of a tile by rows and by columns from one exponential a logit; s2 becomes exp2(s2 - reference_i).

    None where that would be inexact.
    """
    kind = statistics_dtype(s2.device)
    e = exp2_against_(s2, reference)
    row_sum = e.sum(dim=1)
    if reference is None:
        top, col_sum = 0.0, e.sum(dim=0)
    else:
        top = reference.max()
        col_sum = torch.mv(e.t(), torch.exp2(reference - top))
    lowest_row, highest_row = (float(v) for v in row_sum.aminmax())
    lowest_col = float(col_sum.min())
    # A column loses what its exponentials, or their common factors, flush to zero below 2^-126.
    limit, largest = (PLAIN_SUM, 1.0) if reference is None else (SAFE_EXCESS, max(highest_row, 1.0))
    smallest = 2.0**-SAFE_SPREAD
    if not (lowest_row >= smallest and highest_row <= 2.0**limit and lowest_col >= largest * smallest):  # True for NaN
        return None
    row = row_sum.to(kind).log2_()
    return row if reference is None else row.add_(reference), col_sum.to(kind).log2_().add_(top)


# ---- backward


@dataclass
class Shared:
    """Both directions' softmaxes from one exponential, e_ij = exp2(s2_ij - reference_i):

    g_row_i exp(s_ij - row_i) + g_col_j exp(s_ij - col_j) = e_ij * (gain_i + left_i right_j).
    """

    reference: Tensor | None  # (N,); None: 0, and left is 1
    gain: Tensor  # (N,) g_row_i exp2(reference_i - row2_i)
    left: Tensor | None  # (N,) exp2(reference_i - middle)
    right: Tensor  # (M,) g_col_j exp2(middle - col2_j)

    @classmethod
    def of(cls, reference: Tensor, row: Line | None, col: Line | None) -> Shared | None:
        """None where one direction has no gradient, or where a factor would leave float32's range."""
        if row is None or col is None:
            return None
        kind, compute = row.lse2.dtype, reference.dtype
        high, low = float(reference.max()), float(col.reference.min())
        if not high - low <= SAFE_SPREAD:  # True for NaN
            return None
        exact = reference.to(kind)  # float32 would round the exponents
        gain = (row.g * torch.exp2(exact - row.lse2)).to(compute)
        if not bool(reference.any()):
            return cls(None, gain, None, (col.g * torch.exp2(-col.lse2)).to(compute))
        middle = (high + low) / 2
        left, right = torch.exp2(exact - middle), col.g * torch.exp2(middle - col.lse2)
        return cls(reference, gain, left.to(compute), right.to(compute))

    def gradient_tile_(self, plane: Plane, e: Tensor, rows: slice, cols: slice) -> Tensor:
        right = self.right[cols]
        for strip in slices(len(e), FACTOR_ROWS):
            part = slice(rows.start + strip.start, rows.start + strip.stop)
            gain, factor = self.gain[part, None], plane.buffer(1, part, cols)
            if self.left is None:
                torch.add(gain, right, out=factor)
            else:
                torch.mul(self.left[part, None], right, out=factor).add_(gain)
            e[strip].mul_(factor)
        return e


@dataclass
class Softmaxes:
    """Both directions' softmaxes, those of them that have a gradient, ready to be read by tile."""

    plane: Plane
    row: Line | None
    col: Line | None

    @classmethod
    def of(cls, plane: Plane, statistics: Lines, upstream: Lines) -> Softmaxes:
        def line(lse: Tensor | None, g: Tensor | None) -> Line | None:
            return None if lse is None or g is None else Line.of(lse, g, plane.compute)

        return cls(plane, line(statistics.row, upstream.row), line(statistics.col, upstream.col))

    @cached_property
    def shared(self) -> Shared | None:
        """By the rows' logsumexp, which bounds their logits: no exponential is above 1; by 0 where those are near it."""
        if not self.plane.reads or self.row is None:
            return None
        reference = self.row.reference
        if bool((reference.abs() <= PLAIN).all()):
            reference = torch.zeros_like(reference)
        return Shared.of(reference, self.row, self.col)

    def gradient_tile_(self, s2: Tensor, rows: slice, cols: slice) -> Tensor:
        """G without its positives, in the place of the logits: g_row_i exp(s_ij - row_i) + g_col_j exp(s_ij - col_j)."""
        if self.plane.pairs.limited:
            self.clamp_(s2, rows, cols)
        if self.shared is not None:
            reference = None if self.shared.reference is None else self.shared.reference[rows]
            return self.shared.gradient_tile_(self.plane, exp2_against_(s2, reference), rows, cols)
        by_row = None
        if self.row is not None:
            target = s2 if self.col is None else self.plane.buffer(1, rows, cols)
            by_row = torch.sub(s2, self.row.reference[rows, None], out=target).exp2_().mul_(self.row.gain[rows, None])
        if self.col is None:
            return s2.zero_() if by_row is None else by_row
        by_col = s2.sub_(self.col.reference[cols]).exp2_().mul_(self.col.gain[cols])
        return by_col if by_row is None else by_col.add_(by_row)

    def clamp_(self, s2: Tensor, rows: slice, cols: slice) -> None:
        """No softmax above 2: a pair that a limit hid from its lines may be seen here, within one rounding.

        Above 2, since a pair that is alone in its line may exceed the line's logsumexp by a rounding.
        """
        if self.row is not None:
            torch.minimum(s2, self.row.reference[rows, None] + 1, out=s2)
        if self.col is not None:
            torch.minimum(s2, self.col.reference[cols] + 1, out=s2)


def softmax_(s2: Tensor, dim: int, positives: Tensor | None, g: Tensor) -> Tensor:
    """Turns whole lines of negatives' logits into g * softmax in place; returns their logsumexp (natural), positives included."""
    top, total = exponentials_(s2, dim)
    lse2 = top + total.log2()
    if positives is not None:
        lse2 = torch.logaddexp2(lse2, positives)
    # top <= lse2, but where nothing is visible besides a positive: 0 times any finite gain is the gradient there
    gain = g * torch.exp2((top - lse2.masked_fill(lse2 == -math.inf, 0.0)).clamp_(max=0.0))
    s2.mul_(gain.to(s2.dtype).unsqueeze(dim))
    return lse2 * LN2
