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
from ..contract import Lines, Need
from ..pointwise import PointwiseGradients, PointwiseNeed, PointwiseUpstream, bias2_of
from ..positives import positive_entries
from ..upstream import normalized
from .passes import Totals, plane_of
from .tiles import Plane

# The largest base-2 logit of a tile that takes one exponential: u has many powers of two left in float32.
PLAIN = 60.0
# Above it softplus(z) is z to any rounding: e^-40 / 40 is 1e-19.
LINEAR = 40.0
# What a G in float16 is lifted by, besides `upstream.FLOAT16_LIFT`: a sigmoid of 2^-26 is then still a normal number.
FLOAT16_LIFT = 2.0**4


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
    totals = gain = norm = None
    if upstream is not None and any(need[:3]):
        totals = Totals.of(plane, Need(*need[:3]))
        upstream, norm = relative(upstream, plane)
        gain = None if plane.reads and bool((upstream.row == 1).all()) else upstream.row.to(plane.compute)
    for rows, cols in plane.tiles():
        z2 = plane.negatives(rows, cols, positive).add_(bias2)
        row[rows] += sums_and_sigmoids_(z2, plane, rows, cols)
        if upstream is not None and need.bias:
            sigmoids[rows] += z2.sum(dim=1)
        if totals is not None and upstream is not None:
            if gain is not None:
                z2.mul_(gain[rows, None])
            plane.write_positives(z2, rows, cols, entries(plane, rows, upstream, positive, bias))
            totals.add(z2, rows, cols)
        del z2  # free before the next is made
    gradients = PointwiseGradients()
    if upstream is not None:
        dlhs, drhs, dscale = (None, None, None) if totals is None else totals.finish(norm, dtype)
        dbias = (sigmoids * upstream.row.to(row)).sum() if need.bias else None
        if dbias is not None:
            dbias = (dbias if norm is None else dbias * norm).to(bias)
        gradients = PointwiseGradients(dlhs, drhs, dscale, dbias)
    return row, positive.to(plane.statistics, copy=True).mul_(LN2), gradients


def relative(upstream: PointwiseUpstream, plane: Plane) -> tuple[PointwiseUpstream, Tensor | None]:
    """The upstream gradients divided by a norm, and that norm, None for 1.

    Where all rows have one gradient, as in every mean, they become 1 and G holds the sigmoids as they are.
    """
    lines, norm = normalized(Lines(upstream.row, None, upstream.positive), plane.operand)
    assert lines.row is not None
    more = None
    if plane.operand == torch.float16:
        more = lines.row.new_full((), 1 / FLOAT16_LIFT)
    elif plane.reads and norm is None and bool(lines.row[0] > 0) and bool((lines.row == lines.row[0]).all()):
        more = lines.row[0].clone()
    if more is not None:
        lines = Lines(*(None if g is None else g / more for g in lines))
        norm = more if norm is None else norm * more
    assert lines.row is not None
    return upstream._replace(row=lines.row, positive=lines.positive), norm


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


def entries(plane: Plane, rows: slice, upstream: PointwiseUpstream, positive: Tensor, bias: Tensor) -> Tensor:
    """(N, P) G at the labels of a chunk of rows; the other rows' are not there."""
    labels = None if plane.pairs.labels is None else plane.pairs.labels[rows]
    here = positive[rows].to(plane.statistics) * LN2
    of_rows = upstream._replace(positive=None if upstream.positive is None else upstream.positive[rows])
    g = of_rows.at_positives(here, bias, labels)
    entry = torch.empty_like(positive)
    entry[rows] = positive_entries(labels, Lines(None, None, here), Lines(None, None, g), False).to(positive)
    return entry
