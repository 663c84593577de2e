"""The primitive in plain PyTorch, tile by tile, on any device.

A tile is the logits of (rows of a chunk) x (columns of a block), in base 2: ``s2 = s * log2(e)``, the factor folded into
lhs, because exp2 is the faster exponential. One tile is alive at a time, and a second one of its size for factors.

Both passes need the softmax of a tile by rows and by columns, and take both from ONE exponential a logit: with a
reference r_i per row, ``exp(s_ij - c_j) = exp(s_ij - r_i) * exp(r_i - c_j)``, whose last factor is a product of two vectors.
That is exact unless r and c lie so far apart that a factor under- or overflows; a tile where they do (extreme scales,
lines with nothing visible, non-finite inputs) takes the two-exponential form. Finding out reads a number on the host, so
every device but the CPU takes the two-exponential form always and never synchronises.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import ONE_TILE, statistics_dtype

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# The widest spread, in powers of two, over which one exponential serves rows and columns. float32 reaches down to 2^-126:
# what a factor of 2^-100 flushes to zero is below 2^-26 of the line's sum, less than the sum's own rounding.
SAFE_SPREAD = 100.0

# On a CPU a 1024 x 1024 float32 tile (4 MiB) and its operands stay in the last-level cache while matrix products of that size
# still run at the machine's full rate. Accelerators want few launches: chunks as large as the workspace budget allows.
CPU_TILE = ONE_TILE
DEFAULT_WORKSPACE_MIB = 256


def forward(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    want_row: bool,
    want_col: bool,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``backends``. ``tile`` = (rows of a chunk, columns of a block), for tests and benchmarks."""
    p = Problem.of(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, tile)
    row = lhs.new_full((p.n,), -math.inf, dtype=p.statistics)
    col = lhs.new_full((p.m,), -math.inf, dtype=p.statistics)
    positive = lhs.new_zeros((p.n, 1) if labels is None else labels.shape, dtype=p.compute)
    for rows in p.chunks():
        x = p.scaled_lhs(rows)
        for cols in p.blocks():
            s2 = p.logits(x, rows, cols)
            has_positives = p.read_positives(s2, rows, cols, positive)
            if want_row and want_col:
                # One exponential leaves 1e-7 of rounding in a column's logsumexp. Where a trained pair IS the sum that would
                # drown its loss: the few tiles that hold positives take each line's own maximum.
                one = p.on_cpu and not has_positives
                row_part, col_part = one_exponential_logsumexp2(s2) if one else (None, None)
                if row_part is None:
                    s2 = p.logits(x, rows, cols) if one else s2  # the attempt overwrote it
                    row_part = logsumexp2_(p, p.buffer(1, rows, cols).copy_(s2), rows, cols, 1)
                    col_part = logsumexp2_(p, s2, rows, cols, 0)
            else:
                row_part = logsumexp2_(p, s2, rows, cols, 1) if want_row else None
                col_part = logsumexp2_(p, s2, rows, cols, 0) if want_col else None
            if row_part is not None:
                row[rows] = torch.logaddexp2(row[rows], row_part)
            if col_part is not None:
                col[cols] = torch.logaddexp2(col[cols], col_part)
    return (
        row.mul_(LN2) if want_row else row.new_empty(0),
        col.mul_(LN2) if want_col else col.new_empty(0),
        positive.to(row.dtype, copy=True).mul_(LN2),
    )


def backward(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    row: Tensor,
    col: Tensor,
    positive: Tensor,
    g_row: Tensor | None,
    g_col: Tensor | None,
    g_positive: Tensor | None,
    need_lhs: bool,
    need_rhs: bool,
    need_scale: bool,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``backends``: G is formed tile by tile and multiplied by rhs and by lhs."""
    p = Problem.of(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, tile)
    g, norm = p.normalized(g_row, g_col, g_positive)
    softmaxes = Softmaxes.of(p, row, col, *g[:2])
    entry = positive_entries(labels, row, col, positive, *g).to(p.compute)
    gradients = Gradients.of(p, need_lhs, need_rhs, need_scale)
    for rows in p.chunks():
        x = p.scaled_lhs(rows)
        for cols in p.blocks():
            gradient = softmaxes.gradient_tile(p, x, rows, cols)
            p.write_positives(gradient, rows, cols, entry)
            gradients.add(gradient, rows, cols)
    return gradients.finish(logit_scale, norm)


def forward_with_gradient(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    g_row: Tensor | None,
    g_col: Tensor | None,
    g_positive: Tensor,
    need_lhs: bool,
    need_rhs: bool,
    need_scale: bool,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward and gradients in 6 N M D instead of 8, where the upstream gradients are known beforehand.

    A tile holds whole lines (rows for g_row, columns for g_col, everything for both), so that their logsumexp is known
    before the tile is left and its logits need not be made again.
    """
    n, m = lhs.shape[0], rhs.shape[0]
    if tile is None:
        compute = compute_dtype(lhs)
        tile = (
            n if g_col is not None else lines_at_once(m, lhs.device, compute),
            m if g_row is not None else lines_at_once(n, lhs.device, compute),
        )
    p = Problem.of(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, tile)
    g, norm = p.normalized(g_row, g_col, g_positive)
    row, col = (
        lhs.new_full((0 if v is None else k,), -math.inf, dtype=p.statistics) for v, k in ((g_row, n), (g_col, m))
    )
    positive = lhs.new_zeros(g_positive.shape, dtype=p.compute)
    gradients = Gradients.of(p, need_lhs, need_rhs, need_scale)
    for rows in p.chunks():
        x = p.scaled_lhs(rows)
        for cols in p.blocks():
            s2 = p.logits(x, rows, cols)
            p.read_positives(s2, rows, cols, positive)
            by_row = s2
            if g[0] is not None:
                by_row = s2 if g[1] is None else p.buffer(1, rows, cols).copy_(s2)
                row[rows] = softmax_(p, by_row, rows, cols, 1, g[0][rows])
            if g[1] is not None:
                col[cols] = softmax_(p, s2, rows, cols, 0, g[1][cols])
            gradient = s2 if by_row is s2 else s2.add_(by_row)
            entry = positive_entries(labels, row, col, positive.to(p.statistics) * LN2, *g)
            p.write_positives(gradient, rows, cols, entry.to(p.compute))
            gradients.add(gradient, rows, cols)
    return row, col, positive.to(p.statistics, copy=True).mul_(LN2), *gradients.finish(logit_scale, norm)


def softmax_(p: Problem, s2: Tensor, rows: slice, cols: slice, dim: int, g: Tensor) -> Tensor:
    """Turns whole lines of logits into g * softmax in place (positives left 0); returns their logsumexp."""
    top, total = exponentials_(p, s2, rows, cols, dim)
    s2.mul_((g / total.masked_fill(total == 0, 1.0)).to(p.compute).unsqueeze(dim))
    return (top + total.log2()) * LN2


@dataclass
class Gradients:
    """What tiles of G add up to: dlhs = scale G rhs, drhs = scale G^T lhs, dscale = <G, lhs rhs^T>."""

    p: Problem
    dlhs: Tensor | None  # accumulators in the compute dtype, without the scale
    drhs: Tensor | None
    need_lhs: bool
    need_scale: bool

    @classmethod
    def of(cls, p: Problem, need_lhs: bool, need_rhs: bool, need_scale: bool) -> Gradients:
        # <G, lhs rhs^T> = <G rhs, lhs> = <G^T lhs, rhs>: dscale costs O((N + M) D) once either product is there.
        lhs = p.lhs.new_empty(p.lhs.shape, dtype=p.compute) if need_lhs or (need_scale and not need_rhs) else None
        rhs = p.rhs.new_empty(p.rhs.shape, dtype=p.compute) if need_rhs else None
        return cls(p, lhs, rhs, need_lhs, need_scale)

    def add(self, gradient: Tensor, rows: slice, cols: slice) -> None:
        gradient = gradient.to(self.p.operand)
        if self.dlhs is not None:
            add_product(self.dlhs[rows], gradient, self.p.rhs[cols], first=cols.start == 0)
        if self.drhs is not None:
            add_product(self.drhs[cols], gradient.t(), self.p.lhs[rows].to(self.p.operand), first=rows.start == 0)

    def finish(self, logit_scale: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        p, kind = self.p, self.p.statistics
        dscale = logit_scale.new_zeros((), dtype=kind)
        if self.need_scale:
            product, side = (self.dlhs, p.lhs) if self.dlhs is not None else (self.drhs, p.rhs)
            assert product is not None
            for rows in slices(len(side), p.tile[0]):
                dscale += (product[rows] * side[rows]).sum(dim=1).sum(dtype=kind)
        if norm is not None:
            logit_scale, dscale = logit_scale * norm.to(logit_scale), dscale * norm
        dtype = p.lhs.dtype
        return (
            self.dlhs.mul_(logit_scale).to(dtype) if self.need_lhs and self.dlhs is not None else p.lhs.new_empty(0),
            self.drhs.mul_(logit_scale).to(dtype) if self.drhs is not None else p.lhs.new_empty(0),
            dscale.to(logit_scale) if self.need_scale else logit_scale.new_empty(0),
        )


@dataclass
class Problem:
    """The inputs in the dtypes the tiles are made in, and how the N x M plane is cut."""

    lhs: Tensor  # (N, D) as given
    rhs: Tensor  # (M, D) in the operand dtype
    scale2: tuple[Tensor, Tensor]  # logit_scale * log2(e), high + low part: one float32 would bias every logit
    labels: Tensor | None  # (N, P), -1 for none; None: row i's positive is column i
    lhs_ids: Tensor | None  # (N, K); negative ids replaced so that they equal nothing
    rhs_ids: Tensor | None  # (M, K)
    compute: torch.dtype  # of tiles and accumulators
    operand: torch.dtype  # of what a matrix product reads
    tile: tuple[int, int]
    buffers: tuple[Tensor, Tensor]  # flat, one tile each

    @classmethod
    def of(cls, lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, tile) -> Problem:
        compute = compute_dtype(lhs)
        # Half-precision products only where the device has them at full rate with float32 results; widened elsewhere,
        # which is exact (and on most CPUs faster).
        operand = lhs.dtype if lhs.device.type == "cuda" else compute
        n, m = lhs.shape[0], rhs.shape[0]
        if lhs_ids is not None and rhs_ids is not None:
            lhs_ids = lhs_ids.reshape(n, -1).masked_fill(lhs_ids.reshape(n, -1) < 0, -1)
            rhs_ids = rhs_ids.reshape(m, -1).masked_fill(rhs_ids.reshape(m, -1) < 0, -2)
        if 1 not in rhs.stride():
            rhs = rhs.contiguous()  # once, instead of once a product
        tile = default_tile(n, m, lhs.device, compute) if tile is None else tile
        tile = min(tile[0], n), min(tile[1], m)
        buffers = tuple(lhs.new_empty(tile[0] * tile[1], dtype=compute) for _ in range(2))
        exact = logit_scale.to(statistics_dtype(lhs.device)) * LOG2E
        scale2 = exact.to(compute), (exact - exact.to(compute)).to(compute)
        return cls(lhs, rhs.to(operand), scale2, labels, lhs_ids, rhs_ids, compute, operand, tile, buffers)

    @property
    def n(self) -> int:
        return self.lhs.shape[0]

    @property
    def m(self) -> int:
        return self.rhs.shape[0]

    @property
    def on_cpu(self) -> bool:
        return self.lhs.device.type == "cpu"

    @property
    def statistics(self) -> torch.dtype:
        return statistics_dtype(self.lhs.device)

    def normalized(self, *gradients: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
        """Upstream gradients in the statistics' dtype; for half-precision products divided by their largest magnitude,
        which is returned: the 1 / N that a mean leaves in G would be lost there, so it is applied after the product."""
        g = [None if v is None else v.to(self.statistics) for v in gradients]
        if self.operand == self.compute:
            return g, None
        norm = torch.stack([v.abs().max() for v in g if v is not None]).max()
        norm = torch.where(norm > 0, norm, 1.0)
        return [None if v is None else v / norm for v in g], norm

    def chunks(self) -> Iterator[slice]:
        return slices(self.n, self.tile[0])

    def blocks(self) -> Iterator[slice]:
        return slices(self.m, self.tile[1])

    def buffer(self, index: int, rows: slice, cols: slice) -> Tensor:
        shape = rows.stop - rows.start, cols.stop - cols.start
        return self.buffers[index][: shape[0] * shape[1]].view(shape)

    def scaled_lhs(self, rows: slice) -> Tensor:
        """lhs * scale * log2(e), or lhs itself where the product would have to be rounded to half precision."""
        x = self.lhs[rows].to(self.operand)
        return torch.addcmul(x * self.scale2[0], x, self.scale2[1]) if self.operand == self.compute else x

    def logits(self, x: Tensor, rows: slice, cols: slice) -> Tensor:
        """(R, C) base-2 logits of a chunk's scaled lhs, hidden pairs -inf; in the first buffer."""
        s2 = self.buffer(0, rows, cols)
        y = self.rhs[cols].t()
        if self.operand == self.compute:
            torch.mm(x, y, out=s2)
        else:
            s2.copy_(torch.mm(x, y, out_dtype=self.compute)).mul_(self.scale2[0])
        if self.lhs_ids is not None and self.rhs_ids is not None:
            hidden = (self.lhs_ids[rows, None, 0] == self.rhs_ids[None, cols, 0]).contiguous()
            for k in range(1, self.lhs_ids.shape[1]):
                hidden |= self.lhs_ids[rows, None, k] == self.rhs_ids[None, cols, k]
            self.write_positives(hidden, rows, cols, None)
            s2.masked_fill_(hidden, -math.inf)
        return s2

    def read_positives(self, s2: Tensor, rows: slice, cols: slice, positive: Tensor) -> bool:
        """positive[i, p] = s2[i, t_ip] for the labels inside this tile; False where the host knows that there are none."""
        if self.labels is None:
            span, diagonal = self.diagonal_of(s2, rows, cols)
            if diagonal is not None:
                positive[span, 0] = diagonal
            return diagonal is not None
        inside, index = self.labels_in(rows, cols)
        if inside is not None:
            positive[rows] = torch.where(inside, s2.gather(1, index), positive[rows])
        return inside is not None

    def write_positives(self, target: Tensor, rows: slice, cols: slice, entry: Tensor | None) -> None:
        """target[i, t_ip] = entry[i, p] (0 for None) for the labels inside this tile, without a host sync."""
        if self.labels is None:
            span, diagonal = self.diagonal_of(target, rows, cols)
            if diagonal is not None:
                diagonal.copy_(entry[span, 0]) if entry is not None else diagonal.zero_()
            return
        inside, index = self.labels_in(rows, cols)
        if inside is None:
            return
        values = torch.zeros_like(index, dtype=target.dtype) if entry is None else entry[rows]
        # A label outside the tile must still write somewhere: it repeats its row's first label inside, or, where there is
        # none, rewrites what it finds.
        first = inside.int().argmax(dim=1, keepdim=True)
        index = torch.where(inside, index, index.gather(1, first))
        values = torch.where(inside, values, values.gather(1, first))
        values = torch.where(inside.any(dim=1, keepdim=True), values, target.gather(1, index))
        target.scatter_(1, index, values)

    def lift_positives(self, e: Tensor, rows: slice, cols: slice, dim: int) -> Tensor | float:
        """Sum of the tile's positives along ``dim`` in the statistics' dtype; they become 0 in the tile."""
        if self.labels is None:
            span, diagonal = self.diagonal_of(e, rows, cols)
            if diagonal is None:
                return 0.0
            total = e.new_zeros(e.shape[1 - dim], dtype=self.statistics)
            start = span.start - (rows if dim == 1 else cols).start
            total[start : start + len(diagonal)] = diagonal
            diagonal.zero_()
            return total
        inside, index = self.labels_in(rows, cols)
        if inside is None:
            return 0.0
        for q in range(1, index.shape[1]):  # a column labelled twice in a row counts once
            inside[:, q] &= ~(self.labels[rows, :q] == self.labels[rows, q : q + 1]).any(dim=1)
        values = torch.where(inside, e.gather(1, index), 0.0).to(self.statistics)
        self.write_positives(e, rows, cols, None)
        if dim == 1:
            return values.sum(dim=1)
        return values.new_zeros(e.shape[1]).index_put((index,), values, accumulate=True)

    def diagonal_of(self, tile: Tensor, rows: slice, cols: slice) -> tuple[slice, Tensor | None]:
        """The rows i whose column i lies in this tile, and a view of those entries; None where there is none."""
        span = slice(max(rows.start, cols.start), min(rows.stop, cols.stop))
        if span.start >= span.stop:
            return span, None
        return span, tile[span.start - rows.start :, span.start - cols.start :].diagonal()

    def labels_in(self, rows: slice, cols: slice) -> tuple[Tensor | None, Tensor]:
        """Which labels (R, P) lie in this tile and their column within it (clamped); None where the host sees none."""
        assert self.labels is not None
        index = self.labels[rows] - cols.start
        width = cols.stop - cols.start
        inside = (index >= 0) & (index < width)  # label -1 never is: the shift keeps it negative
        if self.on_cpu and not bool(inside.any()):
            return None, index
        return inside, index.clamp(0, width - 1)


class Line(NamedTuple):
    """One direction's softmax as the gradient uses it: g exp(s - lse) = gain * exp2(s2 - reference).

    ``reference`` is the float32 nearest to the base-2 lse: near it s2 - reference is exact. What float32 cannot hold of the
    lse goes into the gain.
    """

    reference: Tensor  # 0 where nothing is visible: every pair of that line is hidden anyway
    gain: Tensor
    g: Tensor
    lse2: Tensor

    @classmethod
    def of(cls, lse: Tensor, g: Tensor, compute: torch.dtype) -> Line:
        lse2 = lse * LOG2E
        lse2 = lse2.masked_fill_(lse2 == -math.inf, 0.0)
        reference = lse2.to(compute)
        return cls(reference, (g * torch.exp2(reference - lse2)).to(compute), g, lse2)


@dataclass
class Softmaxes:
    """Both directions' softmaxes, those of them that have a gradient, ready to be read by tile."""

    row: Line | None
    col: Line | None
    left: Tensor | None  # (N, 2) and (2, M): g_row_i exp(s - row_i) + g_col_j exp(s - col_j)
    right: Tensor | None  # = exp2(s2 - row.reference_i) * (left right)_ij; None where that would be inexact

    @classmethod
    def of(cls, p: Problem, row: Tensor, col: Tensor, g_row: Tensor | None, g_col: Tensor | None) -> Softmaxes:
        r = None if g_row is None else Line.of(row, g_row, p.compute)
        c = None if g_col is None else Line.of(col, g_col, p.compute)
        left = right = None
        if r is not None and c is not None and p.on_cpu:
            high, low = float(r.reference.max()), float(c.reference.min())
            if high - low <= SAFE_SPREAD:  # False for NaN
                middle = (high + low) / 2
                u = torch.exp2(r.reference.to(p.statistics) - middle)  # in float64: float32 would round the exponents
                v = c.g * torch.exp2(middle - c.lse2)
                left = torch.stack([r.gain, u.to(p.compute)], dim=1)
                right = torch.stack([torch.ones_like(c.gain), v.to(p.compute)])
        return cls(r, c, left, right)

    def gradient_tile(self, p: Problem, x: Tensor, rows: slice, cols: slice) -> Tensor:
        """G without its positives: g_row_i exp(s_ij - row_i) + g_col_j exp(s_ij - col_j)."""
        s2 = p.logits(x, rows, cols)
        if self.left is not None and self.right is not None and self.row is not None:
            factor = torch.mm(self.left[rows], self.right[:, cols], out=p.buffer(1, rows, cols))
            return s2.sub_(self.row.reference[rows, None]).exp2_().mul_(factor)
        by_row = None
        if self.row is not None:
            target = s2 if self.col is None else p.buffer(1, rows, cols)
            by_row = torch.sub(s2, self.row.reference[rows, None], out=target).exp2_().mul_(self.row.gain[rows, None])
        if self.col is None:
            return s2.zero_() if by_row is None else by_row
        by_col = s2.sub_(self.col.reference[cols]).exp2_().mul_(self.col.gain[cols])
        return by_col if by_row is None else by_col.add_(by_row)


def positive_entries(
    labels: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    positive: Tensor,
    g_row: Tensor | None,
    g_col: Tensor | None,
    g_positive: Tensor | None,
) -> Tensor:
    """(N, P) entries of G at the labels, in the statistics' dtype: p - 1 is taken here, before anything is rounded."""
    entry = torch.zeros_like(positive)
    if g_row is not None and row is not None:
        entry += g_row[:, None] * torch.exp(positive - row[:, None])
    if g_col is not None and col is not None:
        column = slice(len(positive)) if labels is None else labels.clamp(min=0).flatten()
        entry += (g_col[column] * torch.exp(positive.flatten() - col[column])).view_as(entry)
    if g_positive is None:
        return entry
    if labels is None:
        return entry + g_positive
    for q in range(labels.shape[1]):  # a column labelled twice in a row gets both gradients, in both entries
        entry += torch.where(labels == labels[:, q : q + 1], g_positive[:, q : q + 1], 0.0)
    return entry


def one_exponential_logsumexp2(s2: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Base-2 logsumexp of a tile by rows and by columns; overwrites the tile. (None, None) where it would be inexact."""
    kind = statistics_dtype(s2.device)
    top = s2.amax(dim=1)
    highest = top.max()
    e = s2.sub_(top[:, None]).exp2_()
    row_sum = torch.mv(e, e.new_ones(e.shape[1]))
    col_sum = torch.mv(e.t(), torch.exp2(top.to(kind) - highest).to(e))
    if not (float(row_sum.min()) >= 0.5 and float(col_sum.min()) >= 2.0**-SAFE_SPREAD):  # so written for NaN
        return None, None
    return top + row_sum.to(kind).log2(), highest + col_sum.to(kind).log2()


def logsumexp2_(p: Problem, s2: Tensor, rows: slice, cols: slice, dim: int) -> Tensor:
    """Base-2 logsumexp along one dimension; overwrites the tile. -inf where all are; infinities and NaN pass through."""
    top, total = exponentials_(p, s2, rows, cols, dim)
    return top + total.log2()


def exponentials_(p: Problem, s2: Tensor, rows: slice, cols: slice, dim: int) -> tuple[Tensor, Tensor]:
    """Turns logits into exp2(s2 - top) in place; (top, total) along ``dim``, top 0 where every logit is -inf.

    Positives are added to the total in the statistics' dtype (and left 0 in the tile): beside a well-trained row's
    positive, 1, float32 would round its negatives away, and they are its loss.
    """
    top = s2.amax(dim=dim, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    e = s2.sub_(top).exp2_()
    positives = p.lift_positives(e, rows, cols, dim)
    return top.squeeze(dim), e.sum(dim=dim).to(p.statistics) + positives


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, accumulated in total's dtype; the first product replaces whatever total held."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    else:
        product = torch.mm(a, b, out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)


def slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def default_tile(n: int, m: int, device: torch.device, compute: torch.dtype) -> tuple[int, int]:
    return (CPU_TILE, CPU_TILE) if device.type == "cpu" else (lines_at_once(m, device, compute), m)


def compute_dtype(lhs: Tensor) -> torch.dtype:
    """Of tiles and accumulators."""
    return torch.float64 if lhs.dtype == torch.float64 else torch.float32


def lines_at_once(length: int, device: torch.device, compute: torch.dtype) -> int:
    """How many whole rows (columns) of ``length`` logits a tile may hold."""
    if device.type == "cpu":
        return max(16, min(CPU_TILE, 8 * CPU_TILE**2 // length))  # at most 32 MiB of float32
    mib = int(os.environ.get("GCL_KERNELS_WORKSPACE_MIB", DEFAULT_WORKSPACE_MIB))
    # a tile, its factors and the temporaries of one exponential
    return max(16, mib * 2**20 // (4 * length * compute.itemsize) // 16 * 16)
