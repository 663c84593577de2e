"""The statistics of a loss over the ranks of a process group, differentiable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .. import backends
from ..backends import Gradients, Lines, Need, Want
from ..pairs import Pairs
from .agreement import Ranks
from .exchange import Shift, bring_home, gather, outside_compiled_graphs


@outside_compiled_graphs
def statistics(pairs: Pairs, want: Want, backend: str, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.statistics` of this rank's rows and columns: (row (N,), col (M,), positive (N, P)), N and M its own.

    Labels count the columns of all ranks' rhs in rank order. None: row i's positive is this rank's column i.
    """
    named = dict(labelled(pairs, ranks).tensors())
    return _Statistics.apply(tuple(named), want, backend, ranks, *named.values())  # pyright: ignore


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, names, want, backend, ranks, *tensors):
        pairs = gathered(Pairs(**dict(zip(names, tensors, strict=True))), ranks)
        row, col, positive = lines_of(pairs, want, backend, ranks)
        ctx.names, ctx.want, ctx.backend, ctx.ranks = names, want, backend, ranks
        ctx.save_for_backward(*(x for _, x in pairs.tensors()), row, col, positive)
        ctx.set_materialize_grads(False)
        return row, col, positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_row, g_col, g_positive):  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, row, col, positive = ctx.saved_tensors
        pairs = Pairs(**dict(zip(ctx.names, tensors, strict=True)))
        needs = dict(zip(ctx.names, ctx.needs_input_grad[4:], strict=True))
        need = Need(needs["lhs"], needs["rhs"], needs["logit_scale"])
        lines, upstream = Lines(row, col, positive), Lines(g_row, g_col, g_positive)
        made = gradients_of(pairs, lines, upstream, ctx.want, need, ctx.backend, ctx.ranks)
        gradients = dict(zip(("lhs", "rhs", "logit_scale"), made, strict=True))
        return (*[None] * 4, *(gradients.get(name) for name in ctx.names))


def labelled(pairs: Pairs, ranks: Ranks) -> Pairs:
    """With the default labels made explicit: row i's positive is this rank's column i."""
    if pairs.labels is not None:
        return pairs
    labels = ranks.first_column + torch.arange(pairs.n, device=pairs.lhs.device)[:, None]
    return replace(pairs, labels=labels)


def lines_of(pairs: Pairs, want: Want, backend: str, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """(row, col, positive) of `gathered` pairs; empty where not wanted."""
    forward, lhs = backends.load(backend).forward, pairs.lhs
    kind = backends.statistics_dtype(lhs.device)
    row = lhs.new_full((pairs.n if want.row else 0,), -math.inf, dtype=kind)
    parts = lhs.new_empty((ranks.m if want.col else 0,), dtype=kind)  # of col: over this rank's rows
    positive = lhs.new_zeros((pairs.n, pairs.positives), dtype=kind)
    with torch.autocast(lhs.device.type, enabled=False):
        for _, cols, block in blocks(pairs, ranks):
            r, c, p = forward(block, want)
            row = torch.logaddexp(row, r) if want.row else row
            if want.col:
                parts[cols] = c
            positive += p  # 0 where the label lies in another block
    if not want.col:
        return row, parts, positive
    col = bring_home(parts, ranks.cols, ranks.group, ranks.rank, "the exchange of col").logsumexp(dim=0)
    return row, col, positive


def gradients_of(
    pairs: Pairs, lines: Lines, upstream: Lines, want: Want, need: Need, backend: str, ranks: Ranks
) -> Gradients:
    """Of this rank's rows and columns, from `gathered` pairs and its own lines and their gradients."""
    (row, col, positive), (g_row, g_col, g_positive) = lines, upstream
    assert positive is not None
    backward = backends.load(backend).backward
    g_row, row = (g_row, row) if want.row else (None, None)
    if want.col:
        # Whether this rank's loss uses its col or not, the others' rows need to know.
        assert col is not None
        own = torch.stack([col, torch.zeros_like(col) if g_col is None else g_col.to(col)], dim=1)
        col, g_col = gather(own, ranks.cols, ranks.group, "the all-gather of col and its gradient").unbind(1)

    wide = torch.promote_types(pairs.lhs.dtype, torch.float32)  # of parts, which are rounded once they are added up
    dlhs = drhs = None
    dscale = torch.zeros((), dtype=positive.dtype, device=pairs.lhs.device)
    homebound: Shift | None = None
    for owner, cols, block in blocks(pairs, ranks):
        part = backward(
            block,
            Lines(row, None if col is None or not want.col else col[cols], positive),
            Lines(g_row, None if g_col is None or not want.col else g_col[cols], g_positive),
            need,
            joined=want.joined,
            dtype=wide,
        )
        if part.lhs is not None:
            dlhs = part.lhs if dlhs is None else dlhs.add_(part.lhs)
        if part.scale is not None:
            dscale += part.scale
        if part.rhs is not None and owner is None:
            parts = bring_home(part.rhs, ranks.cols, ranks.group, ranks.rank, "the exchange of gradients of rhs")
            drhs = parts.sum(dim=0)
        elif part.rhs is not None and owner is not None:
            drhs = part.rhs if homebound is None else part.rhs.add_(homebound.wait())
            homebound = Shift(drhs, ranks.cols[owner - 1], ranks, "the ring of gradients of rhs")
    if homebound is not None:
        drhs = homebound.wait()
    return Gradients(
        None if dlhs is None else dlhs.to(pairs.lhs.dtype),
        None if drhs is None else drhs.to(pairs.rhs.dtype),
        dscale.to(pairs.logit_scale) if need.scale else None,
    )


def gathered(pairs: Pairs, ranks: Ranks) -> Pairs:
    """With every rank's values of what belongs to columns; rhs itself only where it is not passed around a ring."""
    of_columns = pairs.of_columns() if ranks.transport == "ring" else {**pairs.of_columns(), "rhs": pairs.rhs}
    everybodys = {
        name: gather(x, ranks.cols, ranks.group, f"the all-gather of {name}") for name, x in of_columns.items()
    }
    return replace(pairs, **everybodys)


def blocks(pairs: Pairs, ranks: Ranks) -> Iterator[tuple[int | None, slice, Pairs]]:
    """(whose columns, None for everybody's; where they stand among all; this rank's rows against them)."""
    if ranks.transport == "all_gather":
        yield None, slice(0, ranks.m), pairs
        return
    for owner, cols, rhs in around_the_ring(pairs.rhs, ranks):
        of_columns = {name: x[cols] for name, x in pairs.of_columns().items()}
        labels = None if pairs.labels is None else labels_within(pairs.labels, cols)
        yield owner, cols, replace(pairs, rhs=rhs, labels=labels, **of_columns)


def around_the_ring(rhs: Tensor, ranks: Ranks) -> Iterator[tuple[int, slice, Tensor]]:
    """Every rank's rhs (whose, its place among the columns, the rows), from this rank's backwards, sent on while it is used."""
    for step in range(ranks.world):
        owner = (ranks.rank - step) % ranks.world
        shift = None
        if step < ranks.world - 1:
            shift = Shift(rhs, ranks.cols[owner - 1], ranks, "the ring of rhs")
        yield owner, ranks.columns(owner), rhs
        if shift is not None:
            rhs = shift.wait()


def labels_within(labels: Tensor, cols: slice) -> Tensor:
    """Labels counted from the block's first column; -1 for those outside."""
    return torch.where((labels >= cols.start) & (labels < cols.stop), labels - cols.start, -1)
