"""The sigmoid loss's one pass, cut into launches: a tile kernel that stores the sigmoids, beside two library products.

Nothing here reads a device value on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...pairs import Pairs
from ..base2 import LN2
from ..chunks import LINE, cdiv, chunk_of_gradient, round_up, rows_of_partials, slices
from ..pointwise import PART, PointwiseGradients, PointwiseNeed, PointwiseUpstream, bias2_of
from ..pointwise_products import Products
from ..products import add_product
from .operands import Operands
from .run import run, storable


def softplus(
    pairs: Pairs,
    bias: Tensor,
    upstream: PointwiseUpstream | None,
    need: PointwiseNeed,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, PointwiseGradients]:
    """See `backends.pointwise`."""
    x = Operands.of(pairs)
    storing = upstream is not None and any(need[:3])
    summing = upstream is not None and need.bias
    tile, stored = x.tile(), storable(x.lhs)
    workspace = None
    if storing:
        chunk = chunk_of_gradient(x.n, x.m, tile.sides, stored.itemsize)
        # every row starts on a line of 128 bytes
        workspace = x.lhs.new_empty((chunk[0], round_up(chunk[1], LINE)), dtype=stored)
    else:
        chunk = rows_of_partials(x.n, x.m, tile.sides, True, False), x.m
    products = lift = None
    if upstream is not None and storing:
        products = Products((x.lhs, x.rhs), (x.lhs.dtype, torch.float32), upstream, need, add_product, all_alike=False)
        lift = None if products.lift is None else x.scale[0].new_full((), products.lift)
    constants = bias2_of(bias, torch.float32), lift
    row = x.lhs.new_zeros(x.n, dtype=torch.float64)
    sigmoids = torch.zeros_like(row) if summing else None
    positive = x.lhs.new_zeros((x.n, x.positives), dtype=torch.float32)
    for rows in slices(x.n, chunk[0]):
        for cols in slices(x.m, chunk[1]):
            lines, across = rows.stop - rows.start, cdiv(cols.stop - cols.start, tile.cols)
            parts = [x.lhs.new_empty((across, lines), dtype=torch.float32) for _ in range(1 + summing)]
            s = None if workspace is None else workspace[:lines, : cols.stop - cols.start]
            run(
                "forward_tile",
                cdiv(lines, tile.rows) * across,
                **x.arguments(rows, cols, tile, s),
                p_positive=positive[rows],
                out=(parts[0], parts[1] if summing else None, *constants),
                stored=None
                if s is None
                else x.block(s, tile.rows, min(PART, tile.cols) if x.config.parts else tile.cols),
                p_skip=None,
                EPILOGUE="softplus_rows",
                HALVES=x.config.parts,
            )
            row[rows] += parts[0].sum(dim=0, dtype=torch.float64)
            if sigmoids is not None:
                sigmoids[rows] += parts[1].sum(dim=0, dtype=torch.float64)
            if products is not None and s is not None:
                products.add(s.to(x.lhs.dtype), rows, cols)
    positive = positive.to(torch.float64).mul_(LN2)
    gradients = PointwiseGradients()
    if upstream is not None:
        dlhs = drhs = dscale = None
        if products is not None:
            entry = upstream.at_positives(positive, bias, pairs.labels)
            dlhs, drhs, dscale = products.finish(entry, pairs.labels, pairs.logit_scale)
            dlhs, drhs = (finished(g, x.d, dtype or x.lhs.dtype) for g in (dlhs, drhs))
        dbias = None if sigmoids is None else (upstream.row.to(sigmoids) * sigmoids).sum().to(bias)
        gradients = PointwiseGradients(dlhs, drhs, dscale, dbias)
    return row, positive, gradients


def finished(gradient: Tensor | None, d: int, dtype: torch.dtype) -> Tensor | None:
    """Without the padding of D."""
    return None if gradient is None else gradient[:, :d].to(dtype, memory_format=torch.contiguous_format)
