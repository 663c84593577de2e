"""What sigmoids become of: the two products of G, shared by both backends.

What turns the sigmoids S into G is one factor a row, the upstream gradient g, never multiplied in. A sigmoid of 1 is then
1 in half precision too. With G = diag(g) S + positives,

    dlhs = scale (diag(g) S rhs + positives)        drhs = scale (S^T diag(g) lhs + positives)

Positives are added to both products in their accumulators' dtype, O(N P D).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .chunks import slices
from .contract import statistics_dtype
from .pointwise import PointwiseNeed, PointwiseUpstream
from .positives import add_positives

# float16 holds 65,504: with sigmoids stored so much larger, those of 2^-29, of logits near -20, are still normal numbers.
FLOAT16_LIFT = 2.0**15


class Products:
    """S rhs and S^T (g lhs) as tiles of sigmoids add to them; None for what is not needed."""

    def __init__(
        self,
        sides: tuple[Tensor, Tensor],
        dtypes: tuple[torch.dtype, torch.dtype],
        upstream: PointwiseUpstream,
        need: PointwiseNeed,
        add: Callable[..., None],
        all_alike: bool,
    ) -> None:
        """`dtypes`: of what is multiplied and of accumulators. `all_alike`: all rows have one gradient, which is not 0."""
        (lhs, rhs), (self.operand, compute) = sides, dtypes
        # <G, lhs rhs^T> = <G rhs, lhs> = <G^T lhs, rhs>: the scale's gradient costs O((N + M) D) once either product is there.
        with_lhs = need.lhs or (need.scale and not need.rhs)
        self.sides, self.need, self.add_product = sides, need, add
        self.lhs = lhs.new_empty(lhs.shape, dtype=compute) if with_lhs else None
        self.rhs = rhs.new_empty(rhs.shape, dtype=compute) if need.rhs else None
        g = upstream.row.to(statistics_dtype(lhs.device))
        norm = g[0] if all_alike else g.abs().max()
        self.norm = torch.where(norm == 0, 1.0, norm)
        self.gain = None if all_alike else (g / self.norm).to(compute)[:, None]  # at most 1
        self.lift = FLOAT16_LIFT if self.operand == torch.float16 else None

    def add(self, s: Tensor, rows: slice, cols: slice) -> None:
        """A tile of sigmoids, times the lift where there is one, in the operands' dtype."""
        lhs, rhs = self.sides
        if self.lhs is not None:
            self.add_product(self.lhs[rows], s, rhs[cols], first=cols.start == 0)
        if self.rhs is not None:
            x = lhs[rows] if self.gain is None else lhs[rows] * self.gain[rows]
            self.add_product(self.rhs[cols], s.t(), x.to(self.operand), first=rows.start == 0)

    def finish(
        self, entry: Tensor, labels: Tensor | None, logit_scale: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dlhs, drhs, dscale) with the positives', whose gradients are `entry` (N, P); the first two in accumulators' dtype."""
        factor = self.norm if self.lift is None else self.norm / self.lift
        if self.lhs is not None:
            factor_of_rows = factor if self.gain is None else self.gain * factor
            self.lhs *= factor_of_rows.to(self.lhs.dtype)
        if self.rhs is not None:
            self.rhs *= factor.to(self.rhs.dtype)
        add_positives(entry, labels, self.sides, (self.lhs, self.rhs))
        dscale = None
        if self.need.scale:
            product, side = (self.lhs, self.sides[0]) if self.lhs is not None else (self.rhs, self.sides[1])
            assert product is not None
            parts = [(product[k] * side[k]).sum(dim=1).sum(dtype=entry.dtype) for k in slices(len(side), 4096)]
            dscale = torch.stack(parts).sum().to(logit_scale)
        dlhs, drhs = (
            g.mul_(logit_scale) if g is not None and needed else None
            for g, needed in ((self.lhs, self.need.lhs), (self.rhs, self.need.rhs))
        )
        return dlhs, drhs, dscale
