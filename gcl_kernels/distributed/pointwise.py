"""The sigmoid loss's sums over the ranks of a process group, differentiable.

Its gradient needs no statistics, so where the upstream gradients are known beforehand one round does both passes: a rank's rows
meet every rank's columns once, 6 N M D / world, and a ring passes rhs around once instead of twice.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import backends
from ..backends.pointwise import PointwiseGradients, PointwiseNeed, PointwiseUpstream
from ..pairs import Pairs
from .agreement import Ranks
from .exchange import Shift, bring_home, gather, outside_compiled_graphs
from .primitive import blocks, gathered, plus


@outside_compiled_graphs
def softplus(
    pairs: Pairs, bias: Tensor, backend: str, known_row: Tensor | None, weights: Tensor | None, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """`pointwise_ops.softplus` of this rank's rows: (row (N,), positive (N, P)).

    Labels as in `primitive`. `known_row` and `weights` are right up to one factor that is alike on all ranks. Whether
    the factor is, the ranks tell each other in the backward, which reads it on the host; where it is not they make the gradients
    again.
    """
    if pairs.labels is None:
        labels = ranks.first_column + torch.arange(pairs.n, device=pairs.lhs.device)[:, None]
        pairs = replace(pairs, labels=labels)
    named = dict(pairs.tensors())
    known = None if known_row is None else PointwiseUpstream(known_row.detach(), weights, True)
    if not torch.is_grad_enabled():
        known = None
    return _Softplus.apply(tuple(named), backend, ranks, known, bias, *named.values())  # pyright: ignore


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, names, backend, ranks, known, bias, *tensors):
        pairs = gathered([Pairs(**dict(zip(names, tensors, strict=True)))], ranks)[0]
        needs = dict(zip((*("",) * 4, "logit_bias", *names), ctx.needs_input_grad, strict=True))
        need = needed(needs)
        with torch.autocast(pairs.lhs.device.type, enabled=False):
            known = known if any(need) else None
            row, positive, gradients = one_round(pairs, bias, known, need, backend, ranks)
        ctx.names, ctx.backend, ctx.ranks, ctx.known = names, backend, ranks, known
        ctx.gradients = None if known is None else gradients
        ctx.save_for_backward(*(x for _, x in pairs.tensors()), bias)
        ctx.set_materialize_grads(False)
        return row, positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_row, g_positive):  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, bias = ctx.saved_tensors
        pairs, ranks = Pairs(**dict(zip(ctx.names, tensors, strict=True))), ctx.ranks
        need = needed(dict(zip((*("",) * 4, "logit_bias", *ctx.names), ctx.needs_input_grad, strict=True)))
        if g_row is None:
            g_row = torch.zeros(pairs.n, dtype=torch.float64, device=pairs.lhs.device)
        gradients, ctx.gradients = ctx.gradients, None  # used once
        factor = None if ctx.known is None else common_factor(g_row, ctx.known.row, ranks)
        if factor is None:
            _, _, gradients = one_round(pairs, bias, PointwiseUpstream(g_row, g_positive), need, ctx.backend, ranks)
        elif gradients is None:
            _, _, gradients = one_round(pairs, bias, ctx.known, need, ctx.backend, ranks)
        assert gradients is not None
        if factor is not None:
            gradients = PointwiseGradients(*(None if g is None else g * factor.to(g.dtype) for g in gradients))
        of = {"lhs": gradients.lhs, "rhs": gradients.rhs, "logit_scale": gradients.scale}
        of = {name: None if g is None else g.to(getattr(pairs, name).dtype) for name, g in of.items()}
        return (*[None] * 4, gradients.bias, *(of.get(name) for name in ctx.names))


def needed(needs: dict[str, bool]) -> PointwiseNeed:
    return PointwiseNeed(needs["lhs"], needs["rhs"], needs["logit_scale"], needs["logit_bias"])


def one_round(
    pairs: Pairs, bias: Tensor, upstream: PointwiseUpstream | None, need: PointwiseNeed, backend: str, ranks: Ranks
) -> tuple[Tensor, Tensor, PointwiseGradients]:
    """This rank's rows against every rank's columns: (row, positive, gradients of its own rows and columns).

    Gradients of lhs and rhs are in float32 (float64 for float64 inputs), to be rounded once.
    """
    function = backends.load(backend).softplus
    wide = torch.promote_types(pairs.lhs.dtype, torch.float32)
    row = positive = dlhs = drhs = dscale = dbias = None
    homebound: Shift | None = None
    for owner, _, (block,) in blocks([pairs], ranks):
        r, p, part = function(block, bias, upstream, need, dtype=wide)
        row, positive = plus(row, r), plus(positive, p)  # p is 0 where the label lies in another block
        dlhs, dscale, dbias = plus(dlhs, part.lhs), plus(dscale, part.scale), plus(dbias, part.bias)
        if part.rhs is not None and owner is None:
            parts = bring_home(part.rhs, ranks.cols, ranks.group, ranks.rank, "the exchange of gradients of rhs")
            drhs = parts.sum(dim=0)
        elif part.rhs is not None and owner is not None:
            drhs = part.rhs if homebound is None else part.rhs.add_(homebound.wait())
            homebound = Shift(drhs, ranks.cols[owner - 1], ranks, "the ring of gradients of rhs")
    if homebound is not None:
        drhs = homebound.wait()
    return row, positive, PointwiseGradients(dlhs, drhs, dscale, dbias)  # pyright: ignore


def common_factor(actual: Tensor, known: Tensor, ranks: Ranks) -> Tensor | None:
    """k of actual = k * known where it is one number on all ranks, None where it is not. Every rank decides alike."""
    largest = known.abs().argmax()
    factor = torch.where(known[largest] == 0, 0.0, actual[largest] / known[largest]).double()
    mine = torch.stack([factor, torch.where(known[largest] == 0, 0.0, 1.0).to(factor)])
    everybodys = gather(mine[None], (1,) * ranks.world, ranks.group, "the factors of the upstream gradients").cpu()
    factors = everybodys[everybodys[:, 1] != 0, 0]
    if len(factors) == 0:
        return factor
    return factors[0].to(actual.device) if bool((factors == factors[0]).all()) else None
