"""Cuts the problem into launches: chunks that respect the workspace budget, the tile kernels, the gradient GEMMs.

Nothing here reads a device value on the host. Peak extra memory is O((N + M) D) plus the budget,
`GCL_KERNELS_WORKSPACE_MIB` (default 256).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...pairs import Pairs
from ..base2 import LN2, SMALLEST_SCALE
from ..chunks import LINE, cdiv, chunk_of_gradient, round_up, rows_of_partials, slices
from ..contract import Gradients, Lines, Need, Want
from ..positives import positive_entries, positives_by_column, positives_by_row
from ..products import add_product, inner_product, product
from ..terms import without_tiny
from ..upstream import normalized
from . import lines, strips
from .config import TileShape
from .operands import Operands, padded
from .partials import Statistics, empty_parts
from .run import run, storable


def forward(pairs: Pairs, want: Want) -> Lines:
    """See `backends.contract`."""
    x = Operands.of(pairs)
    # where labels may be -1, not every entry is written, nor read where a row has one
    new = x.lhs.new_empty if x.positives == 1 else x.lhs.new_zeros
    positive = new((x.n, x.positives), dtype=torch.float32)
    if strips.pay(x, want):
        made, exact = strips.forward(x, positive, want.joined)
        return forward_by_tiles(pairs, x, want, positive, skip=exact, into=made)
    return forward_by_tiles(pairs, x, want, positive)


def forward_by_tiles(
    pairs: Pairs,
    x: Operands,
    want: Want,
    positive: Tensor,
    *,
    skip: Tensor | None = None,
    into: Lines | None = None,
) -> Lines:
    """Each tile from its own maximum. `skip`: 0-d int32, nothing is done unless 0, and `into` stays as it is."""
    tile = x.tile()
    chunk = rows_of_partials(x.n, x.m, tile.sides, want.row, want.col)
    col_tiles, row_tiles = cdiv(x.m, tile.cols), cdiv(chunk, tile.rows)
    several = chunk < x.n
    row = Statistics.of(x.lhs, x.n) if want.row and several else None
    col = Statistics.of(x.lhs, x.m) if want.col and several else None
    row_parts = empty_parts(x.lhs, col_tiles, chunk) if want.row else None
    col_parts = empty_parts(x.lhs, row_tiles, x.m) if want.col else None
    for rows in slices(x.n, chunk):
        row_tiles = cdiv(rows.stop - rows.start, tile.rows)
        programs = row_tiles * col_tiles
        if skip is not None and x.config.strips is not None:
            programs = min(programs, x.config.strips.resident)
        run(
            "forward_tile",
            programs,
            **x.arguments(rows, slice(0, x.m), tile),
            p_positive=positive[rows],
            out=(*(row_parts or ()), *(col_parts or ())),
            stored=None,
            p_skip=skip,
            EPILOGUE=epilogue(want, tile),
            HALVES=False,
        )
        if row is not None and row_parts is not None:
            row[rows].merge(row_parts, col_tiles, skip)
        if col is not None and col_parts is not None:
            col.merge(col_parts, row_tiles, skip)
    if row is not None:
        row_parts, col_tiles = row.parts, 1
    if col is not None:
        col_parts, row_tiles = col.parts, 1
    # the kernel leaves positives out: they join their lines here, in float64
    joined, given = (None, None), None
    if x.positives == 1:
        joined = (positive, positive) if want.joined else joined
    else:
        positive2 = positive.to(torch.float64)
        if want.joined:
            by_row = positives_by_row(pairs.labels, positive2) if want.row else None
            joined = by_row, positives_by_column(pairs.labels, positive2, x.m) if want.col else None
        given = positive2.mul_(LN2)
        given = without_tiny(given, pairs) if x.limited else given
    return lines.finish(
        (row_parts, col_parts),
        (col_tiles, row_tiles),
        joined,
        positive,
        x.m,
        given=given,
        labels=pairs.labels if x.positives == 1 else None,
        zero=pairs.logit_scale if x.limited else None,
        skip=skip,
        into=into,
    )


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
    # float16 has no range for the scale and a mean's 1 / N: its G is of size 1, and what is left follows the products
    folded = pairs.logit_scale if pairs.lhs.dtype != torch.float16 else None
    g, norm = (upstream, None) if folded is not None else normalized(upstream, pairs.lhs.dtype)
    row_line, col_line, entry = lines.pack(
        statistics,
        g,
        pairs.labels,
        m=x.m,
        joined=joined,
        scale=folded,
        nonzero=need.scale,
        entries=x.positives == 1,
        sides=tile.sides,
    )
    shared = tile.one_exponential and row_line is not None and col_line is not None
    if entry is None:
        entry = positive_entries(pairs.labels, statistics, g, joined)  # p - 1 is taken in float64
        entry = padded((entry if folded is None else entry * nonzero(folded)).to(torch.float32), 0)

    stored = storable(x.lhs)
    chunk = chunk_of_gradient(x.n, x.m, tile.sides, stored.itemsize)
    # every row of G starts on a line of 128 bytes
    workspace = x.lhs.new_empty((chunk[0], round_up(chunk[1], LINE)), dtype=stored)

    def gradient_of(rows: slice, cols: slice) -> Tensor:
        gradient = workspace[: rows.stop - rows.start, : cols.stop - cols.start]
        run(
            "backward_tile",
            cdiv(gradient.shape[0], tile.rows) * cdiv(gradient.shape[1], tile.cols),
            **x.arguments(rows, cols, tile, gradient),
            p_entry=entry[rows.start :],
            lines=(from_line(row_line, rows.start), from_line(col_line, cols.start)),
            gradient=x.block(gradient, tile.rows, tile.stored_cols),
            FITS="one_exponential_is_exact" if shared else None,
            GRADIENT="clamped_gradient" if x.limited else "gradient",
            HALVES=tile.halves,
        )
        return gradient.to(x.lhs.dtype)

    dtype = pairs.lhs.dtype if dtype is None else dtype
    if folded is not None and chunk == (x.n, x.m):
        return products_of_whole(x, gradient_of(slice(0, x.n), slice(0, x.m)), folded, need, dtype)
    return products_of_chunks(x, gradient_of, chunk, pairs.logit_scale, norm, need, dtype)


def products_of_whole(x: Operands, gradient: Tensor, folded: Tensor, need: Need, dtype: torch.dtype) -> Gradients:
    """Of a G that is there at once and has the scale in it: the products are the gradients, rounded once."""

    def multiplied(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b) if a.dtype == dtype else product(a, b, b.new_empty((len(a), b.shape[1]), dtype=dtype))

    # <G, lhs rhs^T> = <G rhs, lhs> = <G^T lhs, rhs>: the scale's gradient costs O((N + M) D) once either product is there.
    dlhs = multiplied(gradient, x.rhs) if need.lhs or (need.scale and not need.rhs) else None
    drhs = multiplied(gradient.t(), x.lhs) if need.rhs else None
    dscale = None
    if need.scale:
        made, side, other = (dlhs, x.lhs, drhs) if dlhs is not None else (drhs, x.rhs, None)
        assert made is not None
        dscale = lines.scale_gradient(made, side, other, folded)
    # D without what pads it
    dlhs, drhs = (None if v is None else v[:, : x.d].contiguous() for v in (dlhs, drhs))
    return Gradients(dlhs if need.lhs else None, drhs, dscale)


def products_of_chunks(
    x: Operands,
    gradient_of: Callable[[slice, slice], Tensor],
    chunk: tuple[int, int],
    scale: Tensor,
    norm: Tensor | None,
    need: Need,
    dtype: torch.dtype,
) -> Gradients:
    """Of G a chunk at a time, added up in float32. `norm`: G has been divided by it and lacks the scale, or None."""
    outer = (scale != 0).to(torch.float32) if norm is None else scale * norm.to(scale)
    with_lhs = need.lhs or (need.scale and not need.rhs)
    dlhs = x.lhs.new_empty((x.n, x.d), dtype=dtype) if need.lhs else None
    drhs = x.rhs.new_empty(x.rhs.shape, dtype=torch.float32) if need.rhs else None
    dscale = scale.new_zeros((), dtype=torch.float64)
    for rows in slices(x.n, chunk[0]):
        lhs = x.lhs[rows]
        total = torch.empty_like(lhs, dtype=torch.float32) if with_lhs else None
        for cols in slices(x.m, chunk[1]):
            gradient = gradient_of(rows, cols)
            if total is not None:
                add_product(total, gradient, x.rhs[cols], first=cols.start == 0)
            if drhs is not None:
                add_product(drhs[cols], gradient.t(), lhs, first=rows.start == 0)
        if total is not None:
            if need.scale:
                dscale += inner_product(total, lhs)
            if dlhs is not None:
                dlhs[rows] = total.mul_(outer)[:, : x.d]
    if need.scale and not with_lhs and drhs is not None:
        for cols in slices(x.m, chunk[1]):
            dscale += inner_product(drhs[cols], x.rhs[cols])
    if need.scale:
        dscale = dscale / nonzero(scale) if norm is None else dscale * norm
    if drhs is not None:
        drhs = drhs.mul_(outer)[:, : x.d].to(dtype, memory_format=torch.contiguous_format)
    return Gradients(dlhs, drhs, dscale.to(scale) if need.scale else None)


def nonzero(scale: Tensor) -> Tensor:
    """What stands for the scale where it is part of G, as in `line_kernels.fold_of`."""
    scale = scale.to(torch.float64)
    return torch.where(scale.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scale)


def from_line(line: Tensor | None, start: int) -> tuple[Tensor, int] | None:
    """A chunk's part of `lines.pack`'s, with the stride between its vectors, as `softmax` takes it."""
    return None if line is None else (line[:, start:], line.stride(0))
