"""The sigmoid loss in plain PyTorch: one pass over the tiles gives its sums and its gradients.

Of a tile's logits z the loss is softplus(z) and the gradient is sigmoid(z). Both come from one exponential u = exp(z) where none
of the tile overflows: log1p(u) and u / (1 + u) are exact to a rounding however small they are. Finding out reads a number on the
host, so every device but the CPU takes two exponentials always and never synchronises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...pairs import Pairs
from ..base2 import LN2
from ..pointwise import PointwiseGradients, PointwiseNeed, PointwiseUpstream, bias2_of
from ..pointwise_products import Products
from ..products import add_product, add_rounded_product
from .passes import plane_of
from .tiles import Plane

# The largest base-2 logit of a tile that takes one exponential: u has many powers of two left in float32.
PLAIN = 60.0
# Above it softplus(z) is z to any rounding: e^-40 / 40 is 1e-19.
LINEAR = 40.0


def softplus(
    pairs: Pairs,
    bias: Tensor,
    upstream: PointwiseUpstream | None,
    need: PointwiseNeed,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, PointwiseGradients]:
    """See `backends.pointwise`."""
    plane = plane_of(pairs)
    bias2, positive = bias2_of(bias, plane.compute), plane.new_positive()
    row = pairs.lhs.new_zeros(pairs.n, dtype=plane.statistics)
    sigmoids = torch.zeros_like(row)
    products = None
    if upstream is not None and any(need[:3]):
        products = products_of(plane, upstream, need)
    for rows, cols in plane.tiles():
        z2 = plane.negatives(rows, cols, positive).add_(bias2)
        row[rows] += sums_and_sigmoids_(z2, plane, rows, cols)
        if upstream is not None and need.bias:
            sigmoids[rows] += z2.sum(dim=1)
        if products is not None:
            s = z2 if products.lift is None else z2.mul_(products.lift)
            products.add(s.to(plane.operand), rows, cols)
            del s
        del z2  # free before the next is made
    positive = positive.to(plane.statistics, copy=True).mul_(LN2)
    gradients = PointwiseGradients()
    if upstream is not None:
        dlhs = drhs = dscale = None
        if products is not None:
            entry = upstream.at_positives(positive, bias, pairs.labels)
            dlhs, drhs, dscale = products.finish(entry, pairs.labels, pairs.logit_scale)
            dlhs, drhs = (None if g is None else g.to(dtype or pairs.lhs.dtype) for g in (dlhs, drhs))
        dbias = (sigmoids * upstream.row.to(row)).sum().to(bias) if need.bias else None
        gradients = PointwiseGradients(dlhs, drhs, dscale, dbias)
    return row, positive, gradients


def products_of(plane: Plane, upstream: PointwiseUpstream, need: PointwiseNeed) -> Products:
    g = upstream.row
    # in every mean all rows have one gradient: the host may see that nothing is to be multiplied by it
    all_alike = plane.reads and bool(g[0] != 0) and bool((g == g[0]).all())
    add = add_product if plane.operand == plane.logit_operand else add_rounded_product
    sides = plane.pairs.lhs, plane.pairs.rhs
    return Products(sides, (plane.operand, plane.compute), upstream, need, add, all_alike)


def sums_and_sigmoids_(z2: Tensor, plane: Plane, rows: slice, cols: slice) -> Tensor:
    """(R,) sums of softplus(z) over a tile of base-2 logits, which become sigmoid(z)."""
    if not plane.reads or not bool(z2.max() <= PLAIN):  # so written for a NaN
        z = z2.mul_(LN2)
        sums = torch.nn.functional.softplus(z, threshold=LINEAR).sum(dim=1)
        z.sigmoid_()
        return sums
    u, other = z2.exp2_(), plane.buffer(1, rows, cols)
    sums = torch.log1p(u, out=other).sum(dim=1)
    u.div_(torch.add(u, 1.0, out=other))
    return sums
