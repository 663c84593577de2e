"""The whole plain loss of a small batch on a CPU, with its gradients, where the N x M plane is one tile.

`softmax_step` and `sigmoid_step` do what the passes over tiles do, once and with nothing to keep between them: some thirty
operators where the passes take three hundred. Positives are of default labels, row i's is column i.

Both read every exponential against one reference of the whole plane. That is exact while all sums lie within float32's range,
which they find out on the host. They return None where it is not, and the passes, which have a reference for each line, do the
work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...pairs import Pairs
from ..base2 import LOG2E, SAFE_SPREAD
from ..chunks import slices
from ..contract import statistics_dtype
from ..cpu import bfloat16_products
from ..pointwise import PointwiseGradients, PointwiseNeed
from ..products import TERMS, by_onednn, onednn_product
from ..settings import current, may_read_on_host, workspace_bytes
from ..terms import bias2
from .modify import equal_ids, prepared
from .softmax import FACTOR_ROWS
from .tiles import CPU_TILE, compute_dtype

# No exponential is above 2^60: all are shifted where the largest logit is above.
LARGEST = 60.0
# The least sum of a line's exponentials: what each of them flushes to zero below 2^-126 is then below 2^-26 of it.
SMALLEST_SUM = 2.0**-SAFE_SPREAD
# Scales, weights and biases between these leave every factor within float32's range.
LEAST, MOST = 2.0**-20, 2.0**20
# Up to so many logits torch.mm makes sooner than oneDNN, which is called once for each part of a sum.
FEW_LOGITS = 96 * 96
# From so many exponentials on, fewer logarithms are worth more operators.
MANY = 2**15
# Sums of softplus up to this one tell that no exponential in them is above 2^LARGEST.
SMALL_SUM = 40.0


def fits(pairs: Pairs) -> bool:
    """Whether `softmax_step` and `sigmoid_step` may be tried."""
    lhs, n, m = pairs.lhs, pairs.n, pairs.m
    return (
        lhs.device.type == "cpu"
        and may_read_on_host(lhs.device)
        and pairs.labels is None
        and not pairs.limited
        and n <= CPU_TILE
        and m <= CPU_TILE
        and lhs.dtype != torch.float16
        and current().tile is None
        and 4 * n * m <= 8 * workspace_bytes()
    )


def softmax_step(
    pairs: Pairs, weights: Tensor | None, mean: bool, need: PointwiseNeed
) -> tuple[Tensor, PointwiseGradients] | None:
    """sum_i w_i ((row_i + col_i) / 2 - positive_i), or its mean over rows; 0-d in the statistics' dtype, and its gradients."""
    scale = float(pairs.logit_scale)
    if not LEAST <= abs(scale) <= MOST or not moderate(weights):
        return None
    n, m, kind = pairs.n, pairs.m, statistics_dtype(pairs.lhs.device)
    plane = WholePlane.of(pairs, need)
    s2 = plane.logits(scale)
    diagonal = s2.diagonal()
    positive = diagonal.to(kind, copy=True)
    if plane.hidden is not None:
        s2.masked_fill_(plane.hidden, -torch.inf)
        diagonal.copy_(positive)
    largest = float(s2.amax(dim=1).amax())
    if not abs(largest) <= MOST:  # so written for a NaN
        return None
    if largest > LARGEST:
        s2.sub_(largest - LARGEST)
        positive.sub_(largest - LARGEST)
    e = s2.exp2_()
    diagonal.zero_()
    row, col = e.sum(dim=1), e.sum(dim=0)
    sums = torch.stack((row, col[:n]))  # of negatives, of the lines that have a positive
    if not float(sums.min()) >= SMALLEST_SUM:
        return None
    p = positive.exp2_()
    odds = sums.to(kind, copy=True).div_(p)
    losses, half = odds.log1p(), 0.5 / n if mean else 0.5
    w = None if weights is None else weights.to(kind)
    loss = (losses.sum() if w is None else torch.mv(losses, w).sum()).mul_(half)
    if not any(need):
        return loss, PointwiseGradients()
    # G_ij = e_ij (gain_i + gain_j), and at positives minus what all of the line's negatives have together
    gain = half * scale if w is None else w * (half * scale)
    total = odds + 1
    entry = odds.div_(total).sum(dim=0).mul_(gain).neg_()
    gains = (total.mul_(p).reciprocal_().mul_(gain)).to(e.dtype)
    by_row, by_col = gains[0, :, None], gains[1]
    if m > n:
        by_col = torch.cat((by_col, by_col.new_zeros(m - n)))
    for rows in slices(n, FACTOR_ROWS):
        e[rows].mul_(by_row[rows] + by_col)
    diagonal.copy_(entry)
    return loss, plane.gradients(e, scale)


def sigmoid_step(
    pairs: Pairs, bias: Tensor | float, mean: bool, need: PointwiseNeed
) -> tuple[Tensor, PointwiseGradients] | None:
    """sum_i (softplus(-z_ii) + sum_j softplus(z_ij)), j over the visible negatives, or its mean over rows; its gradients."""
    scale, offset = float(pairs.logit_scale), float(bias)
    if not LEAST <= abs(scale) <= MOST or not abs(offset) <= MOST:
        return None
    kind = statistics_dtype(pairs.lhs.device)
    plane = WholePlane.of(pairs, need)
    z2 = plane.logits(scale)
    if offset:
        z2.add_(offset * LOG2E)
    diagonal = z2.diagonal()
    diagonal.neg_()  # a positive is a pair like the others, with the sign of its logit turned
    if plane.hidden is not None:
        z2.masked_fill_(plane.hidden.fill_diagonal_(False), -torch.inf)
    u = z2.exp2_()
    sums = log1p_sums(u)
    if sums is None:
        return None
    share = 1 / pairs.n if mean else 1.0
    loss = sums.sum(dtype=kind).mul_(share)
    if not any(need):
        return loss, PointwiseGradients()
    # u / (1 + u) times a factor, by which both terms of the denominator are divided
    factor = share * scale
    for rows in slices(pairs.n, FACTOR_ROWS):
        u[rows].div_(torch.mul(u[rows], 1 / factor).add_(1 / factor))
    dbias = None
    if need.bias:
        of_positives = diagonal.sum(dtype=kind)
        dbias = u.sum(dim=1).sum(dtype=kind).sub_(of_positives, alpha=2).div_(scale).to(pairs.logit_scale)
    diagonal.neg_()
    return loss, plane.gradients(u, scale)._replace(bias=dbias)


def log1p_sums(u: Tensor) -> Tensor | None:
    """(N,) sums of log(1 + u) over rows of exponentials; None where one of those is above 2^LARGEST.

    Logarithms are what takes longest: up to three times two halves of a row become one, 1 + v = (1 + u) (1 + u'), which is exact
    to a rounding since nothing cancels in v = u + u' + u u'.
    """
    v = u
    for _ in range(3 if u.numel() >= MANY else 0):
        half = v.shape[1] // 2
        if v.shape[1] > 2 * half:
            break
        left, right = v[:, :half], v[:, half:]
        v = torch.addcmul(left, left, right).add_(right)
    sums = (v.log1p() if v is u else v.log1p_()).sum(dim=1)
    if float(sums.max()) <= SMALL_SUM:
        return sums
    if not float(u.amax(dim=1).amax()) <= 2.0**LARGEST:  # so written for a NaN
        return None
    return u.log1p().sum(dim=1)  # products of several may have overflowed


def moderate(weights: Tensor | None) -> bool:
    """Whether no factor made of them leaves float32's range."""
    return weights is None or LEAST <= float(weights.max()) <= MOST


@dataclass
class WholePlane:
    """Products of the sides over the whole plane, and of its gradient with them."""

    pairs: Pairs
    need: PointwiseNeed
    lhs: Tensor  # in the dtype of the plane
    rhs: Tensor
    similarities: Tensor | None  # (N, M) lhs rhs^T, while they are needed
    hidden: Tensor | None  # (N, M) bool: equal ids, of labelled pairs too
    native: bool  # whether G is multiplied in bfloat16

    @classmethod
    def of(cls, pairs: Pairs, need: PointwiseNeed) -> WholePlane:
        compute = compute_dtype(pairs.lhs.dtype)
        lhs, rhs = pairs.lhs.to(compute), pairs.rhs.to(compute)
        few = pairs.n * pairs.m <= FEW_LOGITS
        if not by_onednn(lhs) or (few and lhs is pairs.lhs):
            similarities = torch.mm(lhs, rhs.t())
        else:  # the rounding of half precision is far above what one accumulator loses
            similarities = onednn_product(lhs, rhs.t(), TERMS if lhs is pairs.lhs else None)
        hidden = None
        if pairs.lhs_ids is not None:
            ids = prepared(pairs, compute)
            hidden = equal_ids(ids["lhs_ids"], ids["rhs_ids"])
        native = pairs.lhs.dtype == torch.bfloat16 and bfloat16_products() == "native"
        return cls(pairs, need, lhs, rhs, similarities, hidden, native)

    def logits(self, scale: float) -> Tensor:
        """(N, M) in base 2."""
        s = self.similarities
        assert s is not None
        pairs, need = self.pairs, self.need
        # dscale is <G, lhs rhs^T>, or <G rhs, lhs> where that product is there and smaller
        if need.scale and (pairs.m < pairs.d or not (need.lhs or need.rhs)):
            s2 = s * (scale * LOG2E)
        else:
            s2, self.similarities = s.mul_(scale * LOG2E), None
        of_columns = bias2(pairs, s.dtype)
        return s2 if of_columns is None else s2.add_(of_columns)

    def gradients(self, gradient: Tensor, scale: float) -> PointwiseGradients:
        """Of G, the gradient of the logits, times the scale: dlhs = G rhs, drhs = G^T lhs, dscale = <G, lhs rhs^T> / scale."""
        pairs, need = self.pairs, self.need
        dlhs = drhs = dscale = None
        if self.similarities is not None:
            dscale = self.similarities.mul_(gradient)
            self.similarities = None
        lhs, rhs, dtype = self.lhs, self.rhs, pairs.lhs.dtype
        if self.native:
            lhs, rhs, gradient = pairs.lhs, pairs.rhs, gradient.to(dtype)
        onednn = by_onednn(gradient)
        if need.lhs:
            dlhs = onednn_product(gradient, rhs) if onednn else torch.mm(gradient, rhs)
        if need.rhs:
            # oneDNN makes the transpose of what a transpose is multiplied by
            transposed = gradient.t().contiguous() if onednn else gradient.t()
            drhs = onednn_product(transposed, lhs) if onednn else torch.mm(transposed, lhs)
        if need.scale:
            if dscale is None:
                product, side = (dlhs, self.lhs) if dlhs is not None else (drhs, self.rhs)
                assert product is not None
                dscale = side * product
            kind = statistics_dtype(gradient.device)
            dscale = dscale.sum(dim=1).sum(dtype=kind).div_(scale).to(pairs.logit_scale)
        dlhs, drhs = (g if g is None or g.dtype == dtype else g.to(dtype) for g in (dlhs, drhs))
        return PointwiseGradients(dlhs, drhs, dscale)
