"""Cuts the problem into launches: chunks that respect the workspace budget, the tile kernels, the gradient GEMMs.

Nothing here reads a device value on the host. Peak extra memory is O((N + M) D) plus the budget,
`GCL_KERNELS_WORKSPACE_MIB` (default 256).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...pairs import Pairs
from ..base2 import LN2, Line
from ..chunks import LINE, cdiv, chunk_of_gradient, round_up, rows_of_partials, slices
from ..contract import Gradients, Lines, Need, Want
from ..positives import positive_entries, positives_by_column, positives_by_row
from ..products import add_product, inner_product
from ..upstream import normalized
from .config import TileShape
from .operands import Operands, packed, padded
from .partials import Statistics, empty_parts
from .run import run, storable


def forward(pairs: Pairs, want: Want) -> Lines:
    """See `backends.contract`."""
    x = Operands.of(pairs)
    tile = x.tile()
    chunk = rows_of_partials(x.n, x.m, tile.sides, want.row, want.col)
    col_tiles, row_tiles = cdiv(x.m, tile.cols), cdiv(chunk, tile.rows)
    row = Statistics.of(x.lhs, x.n) if want.row else None
    col = Statistics.of(x.lhs, x.m) if want.col else None
    row_parts = empty_parts(x.lhs, col_tiles, chunk) if want.row else None
    col_parts = empty_parts(x.lhs, row_tiles, x.m) if want.col else None
    positive = x.lhs.new_zeros((x.n, x.positives), dtype=torch.float32)
    for rows in slices(x.n, chunk):
        row_tiles = cdiv(rows.stop - rows.start, tile.rows)
        run(
            "forward_tile",
            row_tiles * col_tiles,
            **x.arguments(rows, slice(0, x.m), tile),
            p_positive=positive[rows],
            out=(*(row_parts or ()), *(col_parts or ())),
            stored=None,
            p_skip=None,
            EPILOGUE=epilogue(want, tile),
            HALVES=False,
        )
        if row is not None and row_parts is not None:
            row[rows].merge(row_parts, col_tiles)
        if col is not None and col_parts is not None:
            col.merge(col_parts, row_tiles)
    # the kernel leaves positives out: they join their lines here, in float64
    positive2 = positive.to(torch.float64)
    row2 = col2 = None
    if row is not None:
        row2 = row.logsumexp2()
        if want.joined:
            row2 = torch.logaddexp2(row2, positives_by_row(pairs.labels, positive2))
        row2 = row2.mul_(LN2)
    if col is not None:
        col2 = col.logsumexp2()
        if want.joined:
            col2 = torch.logaddexp2(col2, positives_by_column(pairs.labels, positive2, x.m))
        col2 = col2.mul_(LN2)
    return Lines(row2, col2, positive2.mul_(LN2))


def epilogue(want: Want, tile: TileShape) -> str:
    if want.both:
        return "both_by_one_exponential" if tile.one_exponential else "both_by_two"
    return "rows" if want.row else "columns"


def backward(
    pairs: Pairs,
    statistics: Lines,
    upstream: Lines,
    need: Need,
    *,
    joined: bool = True,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """See `backends.contract`. One chunk of G at a time: dlhs = scale G rhs, drhs = scale G^T lhs, dscale = <G, lhs rhs^T>."""
    x = Operands.of(pairs)
    tile = x.tile(backward=True)
    g, norm = normalized(upstream, pairs.lhs.dtype)
    by_row = None if g.row is None or statistics.row is None else Line.of(statistics.row, g.row, torch.float32)
    by_col = None if g.col is None or statistics.col is None else Line.of(statistics.col, g.col, torch.float32)
    row_line, col_line, middle = packed(by_row, by_col)
    # p - 1 is taken in float64
    entry = padded(positive_entries(pairs.labels, statistics, g, joined).to(torch.float32), 0)

    # <G, lhs rhs^T> = <G rhs, lhs> = <G^T lhs, rhs>: the scale's gradient costs O((N + M) D) once either product is there.
    with_lhs = need.lhs or (need.scale and not need.rhs)
    outer = pairs.logit_scale if norm is None else pairs.logit_scale * norm.to(pairs.logit_scale)
    dtype = pairs.lhs.dtype if dtype is None else dtype
    dlhs = pairs.lhs.new_empty(pairs.lhs.shape, dtype=dtype) if need.lhs else None
    drhs = x.rhs.new_zeros(x.rhs.shape, dtype=torch.float32) if need.rhs else None
    dscale = pairs.logit_scale.new_zeros((), dtype=torch.float64)
    stored = storable(x.lhs)
    chunk = chunk_of_gradient(x.n, x.m, tile.sides, stored.itemsize)
    # every row of G starts on a line of 128 bytes
    workspace = x.lhs.new_empty((chunk[0], round_up(chunk[1], LINE)), dtype=stored)
    for rows in slices(x.n, chunk[0]):
        lhs = x.lhs[rows]
        product = torch.zeros_like(lhs, dtype=torch.float32) if with_lhs else None
        for cols in slices(x.m, chunk[1]):
            gradient = workspace[: rows.stop - rows.start, : cols.stop - cols.start]
            run(
                "backward_tile",
                cdiv(gradient.shape[0], tile.rows) * cdiv(gradient.shape[1], tile.cols),
                **x.arguments(rows, cols, tile, gradient),
                p_entry=entry[rows.start :],
                lines=(from_line(row_line, rows.start), from_line(col_line, cols.start), middle),
                gradient=x.block(gradient, tile.rows, tile.stored_cols),
                FITS="one_exponential_is_exact" if middle is not None and tile.one_exponential else None,
                GRADIENT="clamped_gradient" if x.limited else "gradient",
                HALVES=tile.halves,
            )
            gradient = gradient.to(x.lhs.dtype)
            if product is not None:
                add_product(product, gradient, x.rhs[cols])
            if drhs is not None:
                add_product(drhs[cols], gradient.t(), lhs)
        if product is not None:
            if need.scale:
                dscale += inner_product(product, lhs)
            if dlhs is not None:
                dlhs[rows] = product.mul_(outer)[:, : x.d]
    if need.scale and not with_lhs and drhs is not None:
        for cols in slices(x.m, chunk[1]):
            dscale += inner_product(drhs[cols], x.rhs[cols])
    if norm is not None:
        dscale *= norm
    if drhs is not None:
        drhs = drhs.mul_(outer)[:, : x.d].to(dtype, memory_format=torch.contiguous_format)
    return Gradients(dlhs, drhs, dscale.to(pairs.logit_scale) if need.scale else None)


def from_line(line: Tensor | None, start: int) -> tuple[Tensor, int] | None:
    """A chunk's part of `packed`, with the stride between its vectors, as `softmax` takes it."""
    return None if line is None else (line[:, start:], line.stride(0))
