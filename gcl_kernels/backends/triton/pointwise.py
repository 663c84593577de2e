"""The sigmoid loss's one pass, cut into launches: a tile kernel that stores the sigmoids, beside two library products.

What turns a sigmoid into G is its row's upstream gradient g, one factor a row, which is never multiplied in: with
G = diag(g) S + positives,

    dlhs = scale (g S rhs + positives)        drhs = scale (S^T (g lhs) + positives)

Positives are added to both in float32, O(N P D). Nothing here reads a device value on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...pairs import Pairs
from ..base2 import LN2
from ..chunks import LINE, cdiv, chunk_of_gradient, round_up, rows_of_partials, slices
from ..pointwise import PART, PointwiseGradients, PointwiseNeed, PointwiseUpstream, bias2_of
from ..products import add_product, inner_product
from .one_pass import add_positives
from .operands import Operands
from .run import run, storable

# float16 holds 65,504: with sigmoids stored so much larger, those of 2^-29, of logits near -20, are still normal numbers.
FLOAT16_LIFT = 2.0**15


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
    products = Products.of(x, upstream, need)
    lift = x.scale[0].new_full((), FLOAT16_LIFT) if storing and x.lhs.dtype == torch.float16 else None
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
            if s is not None:
                products.add(s.to(x.lhs.dtype), rows, cols)
    positive = positive.to(torch.float64).mul_(LN2)
    gradients = PointwiseGradients()
    if upstream is not None:
        entry = upstream.at_positives(positive, bias, pairs.labels)
        dlhs, drhs, dscale = products.finish(entry, pairs, FLOAT16_LIFT if lift is not None else 1.0, dtype)
        dbias = None if sigmoids is None else (upstream.row.to(sigmoids) * sigmoids).sum().to(bias)
        gradients = PointwiseGradients(dlhs, drhs, dscale, dbias)
    return row, positive, gradients


class Products:
    """S rhs and S^T (g lhs) as chunks of sigmoids add to them, float32; None for what is not needed."""

    def __init__(self, x: Operands, need: PointwiseNeed, gain: Tensor, norm: Tensor) -> None:
        # <G, lhs rhs^T> = <G rhs, lhs> = <G^T lhs, rhs>: the scale's gradient costs O((N + M) D) once either product is there.
        with_lhs = need.lhs or (need.scale and not need.rhs)
        self.x, self.need, self.norm = x, need, norm
        self.gain = gain  # (N, 1), the rows' upstream gradients divided by `norm`, at most 1
        self.lhs = torch.zeros_like(x.lhs, dtype=torch.float32) if with_lhs else None
        self.rhs = torch.zeros_like(x.rhs, dtype=torch.float32) if need.rhs else None

    @classmethod
    def of(cls, x: Operands, upstream: PointwiseUpstream | None, need: PointwiseNeed) -> Products:
        if upstream is None:
            none = x.lhs.new_empty(0)
            return cls(x, PointwiseNeed(False, False, False, False), none, none)
        g = upstream.row.to(torch.float64)
        norm = g.abs().max()
        norm = torch.where(norm > 0, norm, 1.0)
        return cls(x, need, (g / norm).to(torch.float32)[:, None], norm)

    def add(self, s: Tensor, rows: slice, cols: slice) -> None:
        if self.lhs is not None:
            add_product(self.lhs[rows], s, self.x.rhs[cols])
        if self.rhs is not None:
            add_product(self.rhs[cols], s.t(), (self.x.lhs[rows] * self.gain[rows]).to(self.x.lhs.dtype))

    def finish(
        self, entry: Tensor, pairs: Pairs, lift: float, dtype: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of lhs, rhs and the scale, with those of the positives (N, P)."""
        x, factor = self.x, (self.norm / lift).to(torch.float32)
        if self.lhs is not None:
            self.lhs *= self.gain * factor
        if self.rhs is not None:
            self.rhs *= factor
        add_positives(entry, pairs.labels, x, self.lhs, self.rhs)
        dscale = None
        if self.need.scale:
            product, side = (self.lhs, x.lhs) if self.lhs is not None else (self.rhs, x.rhs)
            assert product is not None
            dscale = inner_product(product, side).to(pairs.logit_scale)

        def finished(gradient: Tensor | None, needed: bool) -> Tensor | None:
            if gradient is None or not needed:
                return None
            gradient = gradient.mul_(pairs.logit_scale)[:, : x.d]
            return gradient.to(dtype or x.lhs.dtype, memory_format=torch.contiguous_format)

        return finished(self.lhs, self.need.lhs), finished(self.rhs, self.need.rhs), dscale
