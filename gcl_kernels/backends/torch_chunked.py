"""The primitive in plain PyTorch, tile by tile, on any device.

A tile is the logits of (rows of a chunk) x (columns of a block), in base 2: ``s2 = s * log2(e)``, the factor folded into
lhs, because exp2 is the faster exponential. One tile is alive at a time, and a second one of its size for factors; only
``forward_with_gradient`` keeps more, within the workspace budget.

Both passes need the softmax of a tile by rows and by columns, and take both from ONE exponential a logit,
``e_ij = exp2(s2_ij - r_i)`` with a reference r_i per row: sums over j give rows, sums over i weighted by exp2(r_i) give columns,
and ``G_ij = e_ij * (a_i + u_i v_j)``. That is exact unless the references of some lines lie so far apart that a factor under-
or overflows; a tile where they do (extreme scales, lines with nothing visible, non-finite inputs) takes the two-exponential
form. Finding out reads a number on the host, so every device but the CPU takes the two-exponential form always and never
synchronises.

Positives are kept out of the tiles' sums and join their lines in float64: beside a well-trained row's positive, 1, float32
would round its negatives away, and they are its loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from . import statistics_dtype, workspace_bytes

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

# The widest spread, in powers of two, over which one exponential serves rows and columns. float32 reaches down to 2^-126:
# what a factor of 2^-100 flushes to zero is below 2^-26 of the line's sum, less than the sum's own rounding.
SAFE_SPREAD = 100.0
# A row's reference is the maximum of its first tile. By how much its sum in a later tile may exceed it, in powers of two:
# what a row's factor below 2^-126 flushes to zero is then nothing beside a column's 1 (``Shared``), 2^-46 at most.
SAFE_EXCESS = 30.0
# Rows whose first tile's maxima are within this of 0 need no reference: two passes over a tile less. Their sums may then reach
# PLAIN_SUM, beside whose inverse a row's flushed factor is 2^-66, less than the float64 of the statistics.
PLAIN = 24.0
PLAIN_SUM = 60.0


# A 1024 x 1024 float32 tile (4 MiB) and its operands stay in a CPU's last-level cache while matrix products of that size still
# run at the machine's full rate. Accelerators want few launches: chunks as large as the workspace budget allows.
CPU_TILE = 1024
# Columns of memory between a tile's rows: rows a power of two of bytes apart would share few sets of the caches, and products
# that read the tile transposed would run 4% slower.
GAP = 16
# A tile is multiplied by its factors so many rows at a time: those are read while they are in the nearer caches.
FACTOR_ROWS = 512


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
    row2, col2, positive2, _ = statistics_pass(p, want_row, want_col, keep=0)
    return row2.mul_(LN2), col2.mul_(LN2), positive2.mul_(LN2)


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
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``backends``: G is formed tile by tile and multiplied by rhs and by lhs."""
    p = Problem.of(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, tile)
    upstream = g_row, g_col, g_positive
    return gradient_pass(p, row, col, positive, upstream, (need_lhs, need_rhs, need_scale), logit_scale, dtype=dtype)


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
    """Forward and gradients where the upstream gradients are known beforehand: 6 N M D instead of 8 where no logit is made twice.

    One direction: a tile holds whole lines, so that their logsumexp is known before the tile is left. Both: the exponentials
    of as many tiles as the workspace budget holds wait for the second pass; the others are made again.
    """
    need = need_lhs, need_rhs, need_scale
    if g_row is not None and g_col is not None:
        p = Problem.of(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, tile)
        gradients_bytes = need_lhs * lhs.nbytes + need_rhs * rhs.nbytes
        row2, col2, positive2, kept = statistics_pass(p, True, True, keep=p.tiles_to_keep(gradients_bytes))
        row, col, positive = row2.mul_(LN2), col2.mul_(LN2), positive2.mul_(LN2)
        gradients = gradient_pass(p, row, col, positive, (g_row, g_col, g_positive), need, logit_scale, kept)
        return row, col, positive, *gradients
    if tile is None:
        n, m, compute = lhs.shape[0], rhs.shape[0], compute_dtype(lhs)
        by_row = g_row is not None
        tile = (lines_at_once(m, lhs.device, compute), m) if by_row else (n, lines_at_once(n, lhs.device, compute))
    p = Problem.of(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, tile)
    g, norm = p.normalized(g_row, g_col, g_positive)
    dim, line, g_line = (1, p.empty_lines(p.n), g[0]) if g[0] is not None else (0, p.empty_lines(p.m), g[1])
    assert g_line is not None
    positive = p.new_positive()
    gradients = Gradients.of(p, *need)
    for rows in p.chunks():
        x = p.scaled_lhs(rows)
        for cols in p.blocks():
            s2 = p.negatives(x, rows, cols, positive)
            lines = rows if dim == 1 else cols
            line[lines] = softmax_(s2, dim, p.positives_of(positive, dim, lines), g_line[lines])
            row, col = (line, None) if dim == 1 else (None, line)
            entry = positive_entries(labels, row, col, positive.to(p.statistics) * LN2, *g).to(p.compute)
            p.write_positives(s2, rows, cols, entry)
            gradients.add(s2, rows, cols)
    row, col = (line, line.new_empty(0)) if dim == 1 else (line.new_empty(0), line)
    return row, col, positive.to(p.statistics, copy=True).mul_(LN2), *gradients.finish(logit_scale, norm)


@dataclass
class Kept:
    """What a statistics pass leaves for the gradients: e = exp2(s2 - reference) of some tiles, 0 at positives."""

    reference: Tensor  # (N,)
    tiles: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # by first row and column


def statistics_pass(p: Problem, want_row: bool, want_col: bool, keep: int) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """(row, col, positive) in base 2 and the statistics' dtype, and the exponentials of the first ``keep`` tiles."""
    row, col = p.empty_lines(p.n if want_row else 0), p.empty_lines(p.m if want_col else 0)
    positive = p.new_positive()
    kept = Kept(p.lhs.new_zeros(p.n, dtype=p.compute))
    for rows in p.chunks():
        x = p.scaled_lhs(rows)
        reference = None
        for cols in p.blocks():
            held = p.new_tile(rows, cols) if len(kept.tiles) < keep else None
            s2 = p.negatives(x, rows, cols, positive, held)
            if want_row and want_col and p.on_cpu:
                if cols.start == 0:
                    reference = row_reference(s2)
                    if reference is not None:
                        kept.reference[rows] = reference
                parts = shared_logsumexp2_(s2, reference)
                if parts is not None:
                    add_logsumexp2(row, rows, parts[0], first=cols.start == 0)
                    add_logsumexp2(col, cols, parts[1], first=rows.start == 0)
                    if held is not None:
                        kept.tiles[rows.start, cols.start] = held
                    continue
                s2 = p.negatives(x, rows, cols, positive)  # the attempt overwrote it
            if want_row:
                tile = p.buffer(1, rows, cols).copy_(s2) if want_col else s2
                add_logsumexp2(row, rows, logsumexp2_(tile, 1), first=cols.start == 0)
            if want_col:
                add_logsumexp2(col, cols, logsumexp2_(s2, 0), first=rows.start == 0)
    if want_row:
        row = torch.logaddexp2(row, p.positives_of(positive, 1, slice(0, p.n)))
    if want_col:
        col = torch.logaddexp2(col, p.positives_of(positive, 0, slice(0, p.m)))
    return row, col, positive.to(p.statistics, copy=True), kept


def gradient_pass(
    p: Problem,
    row: Tensor,
    col: Tensor,
    positive: Tensor,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    need: tuple[bool, bool, bool],
    logit_scale: Tensor,
    kept: Kept | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    g, norm = p.normalized(*upstream)
    softmaxes = Softmaxes.of(p, row, col, g[0], g[1])
    # A tile that was not kept may exceed the kept ones' references: it is read against its rows' logsumexp, as ever.
    shared = None if kept is None else Shared.of(kept.reference, softmaxes.row, softmaxes.col)
    entry = positive_entries(p.labels, row, col, positive, *g).to(p.compute)
    gradients = Gradients.of(p, *need)
    for rows in p.chunks():
        x = None
        for cols in p.blocks():
            e = None if kept is None else kept.tiles.pop((rows.start, cols.start), None)
            if e is not None and shared is not None:
                gradient = shared.gradient_tile_(p, e, rows, cols)
            else:
                x = p.scaled_lhs(rows) if x is None else x
                gradient = softmaxes.gradient_tile(p, p.logits(x, rows, cols), rows, cols)
            p.write_positives(gradient, rows, cols, entry)
            gradients.add(gradient, rows, cols)
    return gradients.finish(logit_scale, norm, dtype)


def row_reference(s2: Tensor) -> Tensor | None:
    """What the rows of a chunk are read against, the maxima of its first tile; None for 0, where that will do."""
    top = s2.amax(dim=1)
    low, high = top.aminmax()
    if float(low) >= -PLAIN and float(high) <= PLAIN:  # so written for NaN
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
        highest, col_sum = 0.0, e.sum(dim=0)
    else:
        highest = reference.max()
        col_sum = torch.mv(e.t(), torch.exp2(reference - highest))
    low, high = row_sum.aminmax()
    low, high, col_low = float(low), float(high), float(col_sum.min())
    # A column loses what its exponentials, or their common factors, flush to zero below 2^-126.
    limit, largest = (PLAIN_SUM, 1.0) if reference is None else (SAFE_EXCESS, max(high, 1.0))
    if not (low >= 2.0**-SAFE_SPREAD and high <= 2.0**limit and col_low >= largest * 2.0**-SAFE_SPREAD):  # so for NaN
        return None
    row = row_sum.to(kind).log2_()
    return row if reference is None else row.add_(reference), col_sum.to(kind).log2_().add_(highest)


def add_logsumexp2(total: Tensor, lines: slice, part: Tensor, first: bool) -> None:
    total[lines] = part if first else torch.logaddexp2(total[lines], part)


def logsumexp2_(s2: Tensor, dim: int) -> Tensor:
    """Base-2 logsumexp along one dimension; overwrites the tile. -inf where all are; infinities and NaN pass through."""
    top, total = exponentials_(s2, dim)
    return top + total.log2()


def softmax_(s2: Tensor, dim: int, positives: Tensor, g: Tensor) -> Tensor:
    """Turns whole lines of negatives' logits into g * softmax in place; returns their logsumexp (natural), positives included."""
    top, total = exponentials_(s2, dim)
    lse2 = torch.logaddexp2(top + total.log2(), positives)
    gain = g * torch.exp2(top - lse2.masked_fill(lse2 == -math.inf, 0.0))
    s2.mul_(gain.to(s2.dtype).unsqueeze(dim))
    return lse2 * LN2


def exponentials_(s2: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Turns logits into exp2(s2 - top) in place; (top, total) along ``dim``, top 0 where every logit is -inf."""
    top = s2.amax(dim=dim, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    total = s2.sub_(top).exp2_().sum(dim=dim)
    return top.squeeze(dim), total.to(statistics_dtype(s2.device))


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

    def finish(
        self, logit_scale: Tensor, norm: Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        p, kind = self.p, self.p.statistics
        dscale = logit_scale.new_zeros((), dtype=kind)
        if self.need_scale:
            product, side = (self.dlhs, p.lhs) if self.dlhs is not None else (self.drhs, p.rhs)
            assert product is not None
            for rows in slices(len(side), p.tile[0]):
                dscale += (product[rows] * side[rows]).sum(dim=1).sum(dtype=kind)
        if norm is not None:
            logit_scale, dscale = logit_scale * norm.to(logit_scale), dscale * norm
        dtype = p.lhs.dtype if dtype is None else dtype
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
        buffers = tuple(lhs.new_empty(tile_size(*tile), dtype=compute) for _ in range(2))
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

    def tiles_to_keep(self, gradients_bytes: int) -> int:
        """How many tiles fit the workspace budget beside the two in use, and the memory that the gradients will need: they are
        first written tile by tile, as the kept ones go."""
        size = self.buffers[0].numel() * self.compute.itemsize
        return max((workspace_bytes() + gradients_bytes) // size - 2, 1) if self.on_cpu else 0

    def chunks(self) -> Iterator[slice]:
        return slices(self.n, self.tile[0])

    def blocks(self) -> Iterator[slice]:
        return slices(self.m, self.tile[1])

    def buffer(self, index: int, rows: slice, cols: slice) -> Tensor:
        return view_of_tile(self.buffers[index], rows, cols)

    def new_tile(self, rows: slice, cols: slice) -> Tensor:
        size = tile_size(rows.stop - rows.start, cols.stop - cols.start)
        return view_of_tile(self.lhs.new_empty(size, dtype=self.compute), rows, cols)

    def scaled_lhs(self, rows: slice) -> Tensor:
        """lhs * scale * log2(e), or lhs itself where the product would have to be rounded to half precision."""
        x = self.lhs[rows].to(self.operand)
        return (x * self.scale2[0]).addcmul_(x, self.scale2[1]) if self.operand == self.compute else x

    def logits(self, x: Tensor, rows: slice, cols: slice, out: Tensor | None = None) -> Tensor:
        """(R, C) base-2 logits of a chunk's scaled lhs, hidden pairs -inf (labelled ones too: callers give positives a value);
        in ``out``, else in the first buffer."""
        s2 = self.product(x, rows, cols, out)
        self.hide_false_negatives_(s2, rows, cols)
        return s2

    def negatives(self, x: Tensor, rows: slice, cols: slice, positive: Tensor, out: Tensor | None = None) -> Tensor:
        """``logits`` with -inf at positives, whose logits go to ``positive``."""
        s2 = self.product(x, rows, cols, out)
        self.read_positives(s2, rows, cols, positive)
        self.hide_false_negatives_(s2, rows, cols)
        self.write_positives(s2, rows, cols, None)
        return s2

    def product(self, x: Tensor, rows: slice, cols: slice, out: Tensor | None) -> Tensor:
        s2 = self.buffer(0, rows, cols) if out is None else out
        y = self.rhs[cols].t()
        if self.operand == self.compute:
            return torch.mm(x, y, out=s2)
        return s2.copy_(torch.mm(x, y, out_dtype=self.compute)).mul_(self.scale2[0])

    def hide_false_negatives_(self, s2: Tensor, rows: slice, cols: slice) -> None:
        if self.lhs_ids is None or self.rhs_ids is None:
            return
        hidden = self.lhs_ids[rows, None, 0] == self.rhs_ids[None, cols, 0]
        for k in range(1, self.lhs_ids.shape[1]):
            hidden |= self.lhs_ids[rows, None, k] == self.rhs_ids[None, cols, k]
        s2.masked_fill_(hidden, -math.inf)

    def new_positive(self) -> Tensor:
        return self.lhs.new_zeros((self.n, 1) if self.labels is None else self.labels.shape, dtype=self.compute)

    def empty_lines(self, length: int) -> Tensor:
        return self.lhs.new_full((length,), -math.inf, dtype=self.statistics)

    def positives_of(self, positive: Tensor, dim: int, lines: slice) -> Tensor:
        """Base-2 logsumexp of the positives in each of these rows (dim 1) or columns (dim 0)."""
        if dim == 1:
            labels = None if self.labels is None else self.labels[lines]
            return positives_by_row(labels, positive[lines].to(self.statistics))
        return positives_by_column(self.labels, positive.to(self.statistics), self.m)[lines]

    def read_positives(self, s2: Tensor, rows: slice, cols: slice, positive: Tensor) -> None:
        """positive[i, p] = s2[i, t_ip] for the labels inside this tile."""
        if self.labels is None:
            span, diagonal = self.diagonal_of(s2, rows, cols)
            if diagonal is not None:
                positive[span, 0] = diagonal
            return
        inside, index = self.labels_in(rows, cols)
        if inside is not None:
            positive[rows] = torch.where(inside, s2.gather(1, index), positive[rows])

    def write_positives(self, target: Tensor, rows: slice, cols: slice, entry: Tensor | None) -> None:
        """target[i, t_ip] = entry[i, p] (-inf for None) for the labels inside this tile, without a host sync."""
        if self.labels is None:
            span, diagonal = self.diagonal_of(target, rows, cols)
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


@dataclass
class Line:
    """One direction's softmax as the gradient uses it: g exp(s - lse) = gain * exp2(s2 - reference).

    ``reference`` is the float32 nearest to the base-2 lse: near it s2 - reference is exact. What float32 cannot hold of the
    lse goes into the gain.
    """

    reference: Tensor  # 0 where nothing is visible: every pair of that line is hidden anyway
    g: Tensor
    lse2: Tensor

    @classmethod
    def of(cls, lse: Tensor, g: Tensor, compute: torch.dtype) -> Line:
        lse2 = lse * LOG2E
        lse2 = lse2.masked_fill_(lse2 == -math.inf, 0.0)
        return cls(lse2.to(compute), g, lse2)

    @cached_property
    def gain(self) -> Tensor:
        return (self.g * torch.exp2(self.reference - self.lse2)).to(self.reference)


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
        if not high - low <= SAFE_SPREAD:  # so written for NaN
            return None
        exact = reference.to(kind)  # float32 would round the exponents
        gain = (row.g * torch.exp2(exact - row.lse2)).to(compute)
        if not bool(reference.any()):
            return cls(None, gain, None, (col.g * torch.exp2(-col.lse2)).to(compute))
        middle = (high + low) / 2
        left, right = torch.exp2(exact - middle), col.g * torch.exp2(middle - col.lse2)
        return cls(reference, gain, left.to(compute), right.to(compute))

    def gradient_tile_(self, p: Problem, e: Tensor, rows: slice, cols: slice) -> Tensor:
        right = self.right[cols]
        for strip in slices(len(e), FACTOR_ROWS):
            part = slice(rows.start + strip.start, rows.start + strip.stop)
            gain, factor = self.gain[part, None], p.buffer(1, part, cols)
            if self.left is None:
                torch.add(gain, right, out=factor)
            else:
                torch.mul(self.left[part, None], right, out=factor).add_(gain)
            e[strip].mul_(factor)
        return e


@dataclass
class Softmaxes:
    """Both directions' softmaxes, those of them that have a gradient, ready to be read by tile."""

    row: Line | None
    col: Line | None
    one_exponential: bool  # allowed: finding out whether it is exact reads a number

    @classmethod
    def of(cls, p: Problem, row: Tensor, col: Tensor, g_row: Tensor | None, g_col: Tensor | None) -> Softmaxes:
        r = None if g_row is None else Line.of(row, g_row, p.compute)
        c = None if g_col is None else Line.of(col, g_col, p.compute)
        return cls(r, c, p.on_cpu)

    @cached_property
    def shared(self) -> Shared | None:
        """By the rows' logsumexp, which bounds their logits: no exponential is above 1; by 0 where those are near it."""
        if not self.one_exponential or self.row is None:
            return None
        reference = self.row.reference
        if bool((reference.abs() <= PLAIN).all()):
            reference = torch.zeros_like(reference)
        return Shared.of(reference, self.row, self.col)

    def gradient_tile(self, p: Problem, s2: Tensor, rows: slice, cols: slice) -> Tensor:
        """G without its positives, in the place of the logits: g_row_i exp(s_ij - row_i) + g_col_j exp(s_ij - col_j)."""
        if self.shared is not None:
            reference = None if self.shared.reference is None else self.shared.reference[rows]
            return self.shared.gradient_tile_(p, exp2_against_(s2, reference), rows, cols)
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


def distinct_positives(labels: Tensor | None, positive: Tensor) -> Tensor:
    """positive (N, P) with -inf for label -1, and for a column its row labels twice, all but once."""
    if labels is None:
        return positive
    out = labels < 0
    for q in range(1, labels.shape[1]):
        out[:, q] |= (labels[:, :q] == labels[:, q : q + 1]).any(dim=1)
    return positive.masked_fill(out, -math.inf)


def positives_by_row(labels: Tensor | None, positive: Tensor) -> Tensor:
    """(N,) base-2 logsumexp of each row's positives (N, P); -inf where there is none."""
    visible = distinct_positives(labels, positive)
    return visible[:, 0] if visible.shape[1] == 1 else logsumexp2_(visible.clone(), 1)


def positives_by_column(labels: Tensor | None, positive: Tensor, m: int) -> Tensor:
    """(M,) base-2 logsumexp of each column's positives; -inf where there is none."""
    visible = distinct_positives(labels, positive)
    top = visible.new_full((m,), -math.inf)
    if labels is None:
        top[: len(visible)] = visible[:, 0]
        return top
    column, visible = labels.clamp(min=0).flatten().long(), visible.flatten()
    top.scatter_reduce_(0, column, visible, "amax")
    reference = top.masked_fill(top == -math.inf, 0.0)
    parts = torch.exp2(visible - reference[column])
    if top.device.type == "cpu":
        total = torch.zeros_like(top).index_add_(0, column, parts)
    else:
        # Elsewhere additions come in any order: integers, 2^-40 to the unit, add up to the same bits all the same. None
        # stands for a NaN, but then top is one.
        parts = (parts * 2.0**40).nan_to_num(0, 0, 0).to(torch.int64)
        total = torch.zeros_like(top, dtype=torch.int64).index_add_(0, column, parts).to(top.dtype) * 2.0**-40
    return top + total.log2()


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, accumulated in total's dtype; the first product replaces whatever total held."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    else:
        product = torch.mm(a, b, out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)


def tile_size(rows: int, cols: int) -> int:
    return rows * (cols + GAP)


def view_of_tile(memory: Tensor, rows: slice, cols: slice) -> Tensor:
    r, c = rows.stop - rows.start, cols.stop - cols.start
    return memory[: tile_size(r, c)].view(r, c + GAP)[:, :c]


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
    # a tile, its factors and the temporaries of one exponential
    return max(16, workspace_bytes() // (4 * length * compute.itemsize) // 16 * 16)
