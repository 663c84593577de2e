"""The sigmoid loss's sums over the ranks of a process group, differentiable.

Its gradient needs no statistics, so where the upstream gradients are known beforehand one round does both passes: a rank's rows
meet every rank's columns once, 6 N M D / world, and a ring passes rhs around once instead of twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.pointwise import PointwiseGradients, PointwiseNeed, PointwiseUpstream
from ..pairs import Pairs
from .agreement import Ranks
from .exchange import Shift, bring_home, gather, outside_compiled_graphs
from .primitive import Layout, blocks, distinct, dtypes_of, gathered, laid_out, parts_of, plus

Known = tuple[Tensor, Tensor | None]  # `known_row` and `weights` of `pointwise_ops.softplus`


@outside_compiled_graphs
def softplus_of_parts(
    parts: Sequence[Pairs], bias: Tensor, backend: str, known: Sequence[Known] | None, ranks: Ranks
) -> list[tuple[Tensor, Tensor]]:
    """`pointwise_ops.softplus` of this rank's rows, for each part: (row (N,), positive (N, P)).

    Labels and what travels once: as in `primitive.statistics_of_parts`. What is `known` is right up to one factor that is alike
    for all parts and ranks. Whether the factor is, the ranks tell each other in the backward, which reads it on the host; where
    it is not they make the gradients again.
    """
    tensors, layout = laid_out(parts, ranks)
    upstream = None
    if known is not None and torch.is_grad_enabled():
        upstream = [PointwiseUpstream(row.detach(), weights, True) for row, weights in known]
    results = _Softplus.apply(layout, backend, ranks, upstream, bias, *tensors)
    return [results[2 * k : 2 * k + 2] for k in range(len(parts))]  # pyright: ignore


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layout, backend, ranks, known, bias, *tensors):
        parts = gathered(parts_of(layout, tensors), ranks)
        need = needed(layout, ctx.needs_input_grad)
        known = known if any(any(of_part) for of_part in need) else None
        with torch.autocast(bias.device.type, enabled=False):
            lines, gradients = one_round(parts, bias, known, need, backend, ranks)
        ctx.layout, ctx.backend, ctx.ranks, ctx.known = layout, backend, ranks, known
        ctx.gradients = None if known is None else gradients
        saved, ctx.saved = distinct(parts)
        ctx.save_for_backward(*saved, bias)
        ctx.set_materialize_grads(False)
        return tuple(x for of_part in lines for x in of_part)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        *tensors, bias = ctx.saved_tensors
        parts, ranks = parts_of(ctx.saved, tensors), ctx.ranks
        need = needed(ctx.layout, ctx.needs_input_grad)
        rows = [
            torch.zeros(pairs.n, dtype=torch.float64, device=bias.device) if g is None else g
            for pairs, g in zip(parts, upstream[::2], strict=True)
        ]
        made, ctx.gradients = ctx.gradients, None  # used once
        given = [PointwiseUpstream(*of_part) for of_part in zip(rows, upstream[1::2], strict=True)]
        gradients = gradients_of(lambda: (parts, bias), given, ctx.known, made, need, ctx.backend, ranks)
        result: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 5)
        dbias = None
        for fields, part in zip(ctx.layout, gradients, strict=True):
            of = {"lhs": part.lhs, "rhs": part.rhs, "logit_scale": part.scale}
            for name, g in of.items():
                result[fields[name]] = plus(result[fields[name]], g)
            dbias = plus(dbias, part.bias)
        kinds = dtypes_of(ctx.layout, parts)
        return (
            *[None] * 4,
            None if dbias is None else dbias.to(bias.dtype),
            *(None if g is None else g.to(kinds[at]) for at, g in enumerate(result)),
        )


def gradients_of(
    gathered_parts: Callable[[], tuple[Sequence[Pairs], Tensor]],
    upstream: Sequence[PointwiseUpstream],
    known: Sequence[PointwiseUpstream] | None,
    made: Sequence[PointwiseGradients] | None,
    need: Sequence[PointwiseNeed],
    backend: str,
    ranks: Ranks,
) -> Sequence[PointwiseGradients]:
    """`made` for `known` times the factor where there is one, else made again."""
    factor = None
    if known is not None:
        rows = torch.cat([given.row for given in upstream])
        factor = common_factor(rows, torch.cat([given.row for given in known]), ranks)
    if factor is None or made is None:
        _, made = one_round(*gathered_parts(), upstream if factor is None else known, need, backend, ranks)
    if factor is None:
        return made
    return [PointwiseGradients(*(None if g is None else g * factor.to(g.dtype) for g in of_part)) for of_part in made]


def needed(layout: Layout, needs: Sequence[bool]) -> list[PointwiseNeed]:
    of = needs[5:]
    return [
        PointwiseNeed(of[fields["lhs"]], of[fields["rhs"]], of[fields["logit_scale"]], needs[4]) for fields in layout
    ]


def one_round(
    parts: Sequence[Pairs],
    bias: Tensor,
    upstream: Sequence[PointwiseUpstream] | None,
    need: Sequence[PointwiseNeed],
    backend: str,
    ranks: Ranks,
) -> tuple[list[tuple[Tensor, Tensor]], list[PointwiseGradients]]:
    """This rank's rows against every rank's columns: (row, positive) and gradients of its own rows and columns, for each part.

    Gradients of lhs and rhs are in float32 (float64 for float64 inputs), to be rounded once. That of rhs is of all parts and
    stands with the first.
    """
    function = backends.load(backend).softplus
    wide = torch.promote_types(parts[0].lhs.dtype, torch.float32)
    lines: list[tuple[Any, Any]] = [(None, None)] * len(parts)
    sums: list[PointwiseGradients] = [PointwiseGradients(None, None, None, None)] * len(parts)
    drhs = None
    homebound: Shift | None = None
    for owner, _, block in blocks(parts, ranks):
        of_block = None
        for k, pairs in enumerate(block):
            r, p, part = function(pairs, bias, None if upstream is None else upstream[k], need[k], dtype=wide)
            lines[k] = plus(lines[k][0], r), plus(lines[k][1], p)  # p is 0 where the label lies in another block
            of_block = plus(of_block, part.rhs)
            rest = zip(sums[k]._replace(rhs=None), part._replace(rhs=None), strict=True)
            sums[k] = PointwiseGradients(*(plus(total, g) for total, g in rest))
        if of_block is not None and owner is None:
            everybodys = bring_home(of_block, ranks.cols, ranks.group, ranks.rank, "the exchange of gradients of rhs")
            drhs = everybodys.sum(dim=0)
        elif of_block is not None and owner is not None:
            drhs = of_block if homebound is None else of_block.add_(homebound.wait())
            homebound = Shift(drhs, ranks.cols[owner - 1], ranks, "the ring of gradients of rhs")
    if homebound is not None:
        drhs = homebound.wait()
    sums[0] = sums[0]._replace(rhs=drhs)
    return lines, sums


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
