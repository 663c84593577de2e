"""Both passes of one direction in one, where the upstream gradients are known beforehand: 6 N M D instead of 8.

No tile is made twice. A chunk holds whole lines (rows, or columns for the other direction), and of each tile e_ij =
exp2(s2_ij - r_i) is stored, rounded once, as G is in the backward. What turns e into G is one factor a line, known when the line
is complete, and it is never multiplied in: with G = diag(gain) E + positives,

    dlhs = scale (gain E rhs + positives)        drhs = scale (E^T (gain lhs) + positives)

so that the plane is written once and read twice, 6 bytes a logit of 2 bytes, exactly as in the backward. Storing float32
logits and turning them into G later would move 14 bytes a logit. At D = 768 the 8 more take 2.7 ps at 3 TB/s, and making the tile
again takes 2.2 ps at 700 TFLOP/s.

The reference r_i must be known beforehand: `HEADROOM` below the largest logit that the norms allow. In bfloat16 and float32,
which have the same range, e then keeps its digits for any line whose own largest negative is within 2 HEADROOM of that bound,
110 nats. A chunk with a line that is not is made again against the lines' logsumexp, by a launch that a number on the device
turns off otherwise. float16 has no such range. Positives are added to the gradients in float32, O(N P D).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...pairs import Pairs
from ..base2 import LN2, LOG2E
from ..chunks import LINE, cdiv, round_up, slices, whole_lines
from ..contract import Gradients, Lines, Need
from ..positives import add_positives, distinct_positives, positive_entries, positives_by_column, positives_by_row
from ..products import add_product, inner_product
from ..terms import bias2
from ..upstream import normalized
from .operands import Operands, padded
from .partials import Statistics, empty_parts
from .run import run, storable

# A stored exponential may be as large as 2^80. A sum over a million columns (2^100) still fits float32 and bfloat16, and so does
# an embedding's entry multiplied by the inverse, 2^-80.
HEADROOM = 80.0


def forward_with_gradient(pairs: Pairs, upstream: Lines, need: Need, *, joined: bool = True) -> tuple[Lines, Gradients]:
    """See `backends.contract`; for one direction."""
    x = Operands.of(pairs)
    by_row = upstream.row is not None
    own, other = (x.lhs, x.rhs) if by_row else (x.rhs, x.lhs)
    need_own, need_other = (need.lhs, need.rhs) if by_row else (need.rhs, need.lhs)
    g, norm = normalized(upstream, pairs.lhs.dtype)
    g_line = g.row if by_row else g.col
    assert g_line is not None
    tile = x.tile(stored=True)
    stored = storable(x.lhs)
    chunk = whole_lines(len(own), len(other), tile.rows if by_row else tile.cols, stored.itemsize)
    workspace = x.lhs.new_empty((chunk if by_row else x.n, round_up(x.m if by_row else chunk, LINE)), dtype=stored)
    with_own = need_own or (need.scale and not need_other)
    d_own = torch.zeros_like(own, dtype=torch.float32) if with_own else None
    d_other = torch.zeros_like(other, dtype=torch.float32) if need_other else None

    line2 = own.new_empty(len(own), dtype=torch.float64)
    positive = x.lhs.new_zeros((x.n, x.positives), dtype=torch.float32)
    norms = [torch.linalg.vector_norm(v, dim=1, dtype=torch.float32) for v in (own, other)]
    reference = LOG2E * x.scale[0].abs() * norms[0] * norms[1].max() - HEADROOM
    bias = bias2(pairs, torch.float32)
    if bias is not None:  # -inf hides a column, whose reference stays finite
        reference += (bias.max() if by_row else bias).nan_to_num(neginf=0.0)
    for lines in slices(len(own), chunk):
        rows, cols = (lines, slice(0, x.m)) if by_row else (slice(0, x.n), lines)
        e = workspace[: rows.stop - rows.start, : cols.stop - cols.start]
        negatives2, used = store_exponentials(x, (rows, cols), by_row, e, positive, reference[lines])
        positive2 = positive.to(torch.float64)
        if not joined:
            line2[lines] = negatives2
        elif by_row:
            labels = None if pairs.labels is None else pairs.labels[lines]
            line2[lines] = torch.logaddexp2(negatives2, positives_by_row(labels, positive2[lines]))
        else:
            line2[lines] = torch.logaddexp2(negatives2, positives_by_column(pairs.labels, positive2, x.m)[lines])
        gain = g_line[lines] * torch.exp2(used.to(torch.float64) - line2[lines])
        gain = torch.where(negatives2 == -math.inf, 0.0, gain).to(torch.float32)[:, None]
        e = e.to(x.lhs.dtype) if by_row else e.to(x.lhs.dtype).t()
        if d_own is not None:
            add_product(d_own[lines], e, other)
            d_own[lines] *= gain
        if d_other is not None:
            add_product(d_other, e.t(), (own[lines] * gain).to(own.dtype))

    line, positive = line2.mul_(LN2), positive.to(torch.float64).mul_(LN2)
    statistics = Lines(line, None, positive) if by_row else Lines(None, line, positive)
    d_lhs, d_rhs = (d_own, d_other) if by_row else (d_other, d_own)
    entry = positive_entries(pairs.labels, statistics, g, joined)
    entry.masked_fill_(distinct_positives(pairs.labels, positive) == -math.inf, 0.0)
    add_positives(entry, pairs.labels, (x.lhs, x.rhs), (d_lhs, d_rhs))
    dscale = None
    if need.scale:
        product, side = (d_lhs, x.lhs) if d_lhs is not None else (d_rhs, x.rhs)
        assert product is not None
        dscale = inner_product(product, side)
        dscale = (dscale if norm is None else dscale * norm).to(pairs.logit_scale)
    outer = pairs.logit_scale if norm is None else pairs.logit_scale * norm.to(pairs.logit_scale)

    def finished(gradient: Tensor | None, needed: bool) -> Tensor | None:
        if gradient is None or not needed:
            return None
        return gradient.mul_(outer)[:, : x.d].to(x.lhs.dtype, memory_format=torch.contiguous_format)

    return statistics, Gradients(finished(d_lhs, need.lhs), finished(d_rhs, need.rhs), dscale)


def store_exponentials(
    x: Operands, chunk: tuple[slice, slice], by_row: bool, e: Tensor, positive: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills `e` with a chunk's exponentials. Returns (base-2 logsumexp of each line's negatives, references in use)."""
    tile = x.tile(stored=True)
    row_tiles, col_tiles = cdiv(e.shape[0], tile.rows), cdiv(e.shape[1], tile.cols)
    lines, across = (e.shape[0], col_tiles) if by_row else (e.shape[1], row_tiles)
    parts = empty_parts(reference, across, lines)

    def fill(reference: Tensor, skip: Tensor) -> Tensor:
        run(
            "forward_tile",
            row_tiles * col_tiles,
            **x.arguments(*chunk, tile, e),
            p_positive=positive[chunk[0]],
            out=(*parts, padded(reference, 0)),
            stored=x.block(e, tile.rows, tile.stored_cols),
            p_skip=skip,
            EPILOGUE="rows_stored" if by_row else "columns_stored",
            HALVES=tile.halves,
        )
        statistics = Statistics.of(reference, lines)
        statistics.merge(parts, across)
        return statistics.logsumexp2()

    negatives2 = fill(reference, torch.zeros((), dtype=torch.int32, device=e.device))
    near = (negatives2 >= reference - HEADROOM) | (negatives2 == -math.inf)
    all_near = near.all()
    own = negatives2.to(torch.float32).masked_fill(negatives2 == -math.inf, 0.0)
    fill(own, all_near.to(torch.int32))  # leaves the statistics as they are
    return negatives2, torch.where(all_near, reference, own)
