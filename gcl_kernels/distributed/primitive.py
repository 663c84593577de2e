"""The statistics of a loss over the ranks of a process group, differentiable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import Gradients, Lines, Need, Want
from ..pairs import Pairs
from .agreement import Ranks
from .exchange import Shift, bring_home, gather, outside_compiled_graphs


@outside_compiled_graphs
def statistics_of_parts(
    parts: Sequence[Pairs], want: Want, backend: str, ranks: Ranks
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`ops.statistics` of this rank's rows and columns, for each part: (row (N,), col (M,), positive (N, P)), N and M its own.

    Labels count the columns of all ranks' rhs in rank order. None: row i's positive is this rank's column i. Parts have one rhs,
    which travels once, as does its gradient; so does whatever else is one tensor.
    """
    tensors, layout = laid_out(parts, ranks)
    lines = _Statistics.apply(layout, want, backend, ranks, *tensors)
    return [lines[3 * k : 3 * k + 3] for k in range(len(parts))]  # pyright: ignore


Layout = list[dict[str, int]]  # of each part, which of some tensors each of its fields is


def laid_out(parts: Sequence[Pairs], ranks: Ranks) -> tuple[list[Tensor], Layout]:
    """`distinct` of the parts, default labels spelled out."""
    return distinct([labelled(pairs, ranks) for pairs in parts])


def labelled(pairs: Pairs, ranks: Ranks) -> Pairs:
    """With the default labels made explicit: row i's positive is this rank's column i."""
    if pairs.labels is not None:
        return pairs
    labels = ranks.first_column + torch.arange(pairs.n, device=pairs.lhs.device)[:, None]
    return replace(pairs, labels=labels)


def distinct(parts: Sequence[Pairs]) -> tuple[list[Tensor], Layout]:
    """The parts' tensors, once each; one that is lhs and rhs is there as both, since each has a gradient."""
    places: dict[tuple[str, int], int] = {}
    tensors, layout = [], []
    for pairs in parts:
        for name, x in pairs.tensors():
            if (name, id(x)) not in places:
                places[name, id(x)] = len(tensors)
                tensors.append(x)
        layout.append({name: places[name, id(x)] for name, x in pairs.tensors()})
    return tensors, layout


def parts_of(layout: Layout, tensors: Sequence[Tensor]) -> list[Pairs]:
    return [Pairs(**{name: tensors[at] for name, at in fields.items()}) for fields in layout]


def dtypes_of(layout: Layout, parts: Sequence[Pairs]) -> dict[int, torch.dtype]:
    """Of the tensors that are differentiable, by their places."""
    return {
        fields[name]: getattr(pairs, name).dtype
        for fields, pairs in zip(layout, parts, strict=True)
        for name in ("lhs", "rhs", "logit_scale")
    }


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layout, want, backend, ranks, *tensors):
        parts = gathered(parts_of(layout, tensors), ranks)
        outputs = [x for lines in lines_of(parts, want, backend, ranks) for x in lines]
        saved, ctx.saved = distinct(parts)
        ctx.layout, ctx.want, ctx.backend, ctx.ranks = layout, want, backend, ranks
        ctx.save_for_backward(*saved, *outputs)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        tensors = ctx.saved_tensors
        parts = parts_of(ctx.saved, tensors)
        needs = ctx.needs_input_grad[4:]
        need = [Need(*(needs[fields[name]] for name in ("lhs", "rhs", "logit_scale"))) for fields in ctx.layout]
        lines = in_threes(tensors[-len(upstream) :])
        gradients = gradients_of(parts, lines, in_threes(upstream), ctx.want, need, ctx.backend, ctx.ranks)
        result: list[Tensor | None] = [None] * len(needs)
        for fields, of_part in zip(ctx.layout, gradients, strict=True):
            for name, g in zip(("lhs", "rhs", "logit_scale"), of_part, strict=True):
                result[fields[name]] = plus(result[fields[name]], g)
        kinds = dtypes_of(ctx.layout, parts)
        return *[None] * 4, *(None if g is None else g.to(kinds[at]) for at, g in enumerate(result))


def lines_of(parts: Sequence[Pairs], want: Want, backend: str, ranks: Ranks) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(row, col, positive) of `gathered` parts; empty where not wanted."""
    forward, x = backends.load(backend).forward, parts[0].lhs
    kind = backends.statistics_dtype(x.device)
    rows = [x.new_full((pairs.n if want.row else 0,), -math.inf, dtype=kind) for pairs in parts]
    over_rows = x.new_empty((ranks.m if want.col else 0, len(parts)), dtype=kind)  # col of this rank's rows alone
    positives = [x.new_zeros((pairs.n, pairs.positives), dtype=kind) for pairs in parts]
    with torch.autocast(x.device.type, enabled=False):
        for _, cols, block in blocks(parts, ranks):
            for k, pairs in enumerate(block):
                r, c, p = forward(pairs, want)
                rows[k] = torch.logaddexp(rows[k], r) if want.row else rows[k]
                if want.col:
                    over_rows[cols, k] = c
                positives[k] += p  # 0 where the label lies in another block
    if want.col:
        everybodys = bring_home(over_rows, ranks.cols, ranks.group, ranks.rank, "the exchange of col")
        over_rows = everybodys.logsumexp(dim=0)
    cols_of_parts = [col.contiguous() for col in over_rows.unbind(1)]
    return list(zip(rows, cols_of_parts, positives, strict=True))


def gradients_of(
    parts: Sequence[Pairs],
    lines: Sequence[Sequence[Any]],
    upstream: Sequence[Sequence[Any]],
    want: Want,
    need: Sequence[Need],
    backend: str,
    ranks: Ranks,
) -> list[Gradients]:
    """Of this rank's rows and columns, for each of the `gathered` parts, from its own lines and their gradients.

    In float32 at least, to be rounded once they are added up. That of rhs is of all parts and stands with the first.
    """
    if want.col:
        # Whether this rank's loss uses its col or not, the others' rows need to know.
        mine = [
            torch.stack([col, torch.zeros_like(col) if g_col is None else g_col.to(col)], dim=1)
            for (_, col, _), (_, g_col, _) in zip(lines, upstream, strict=True)
        ]
        what = "the all-gather of col and its gradient"
        everybodys = gather(torch.stack(mine, dim=1), ranks.cols, ranks.group, what)  # (M, parts, 2)

    def within_block(part: int, cols: slice) -> tuple[Lines, Lines]:
        (row, _, positive), (g_row, _, g_positive) = lines[part], upstream[part]
        row, g_row = (row, g_row) if want.row else (None, None)
        col, g_col = (v.contiguous() for v in everybodys[cols, part].unbind(1)) if want.col else (None, None)
        return Lines(row, col, positive), Lines(g_row, g_col, g_positive)

    x = parts[0].lhs
    wide = torch.promote_types(x.dtype, torch.float32)
    backward = backends.load(backend).backward
    dlhs: list[Tensor | None] = [None] * len(parts)
    dscales = [torch.zeros((), dtype=lines[0][2].dtype, device=x.device) for _ in parts]
    drhs = None
    homebound: Shift | None = None
    for owner, cols, block in blocks(parts, ranks):
        of_block = None
        for k, pairs in enumerate(block):
            part = backward(pairs, *within_block(k, cols), need[k], joined=want.joined, dtype=wide)
            dlhs[k] = plus(dlhs[k], part.lhs)
            of_block = plus(of_block, part.rhs)
            if part.scale is not None:
                dscales[k] += part.scale
        if of_block is not None and owner is None:
            parts_of_rhs = bring_home(of_block, ranks.cols, ranks.group, ranks.rank, "the exchange of gradients of rhs")
            drhs = parts_of_rhs.sum(dim=0)
        elif of_block is not None and owner is not None:
            drhs = of_block if homebound is None else of_block.add_(homebound.wait())
            homebound = Shift(drhs, ranks.cols[owner - 1], ranks, "the ring of gradients of rhs")
    if homebound is not None:
        drhs = homebound.wait()
    return [
        Gradients(dlhs[k], drhs if k == 0 else None, dscales[k] if need[k].scale else None) for k in range(len(parts))
    ]


def in_threes(x: Sequence[Any]) -> list[Sequence[Any]]:
    return [x[k : k + 3] for k in range(0, len(x), 3)]


def plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total.add_(part)


def gathered(parts: Sequence[Pairs], ranks: Ranks) -> list[Pairs]:
    """With every rank's values of what belongs to columns; rhs itself only where it is not passed around a ring."""
    everybodys: dict[int, Tensor] = {}
    results = []
    for pairs in parts:
        of_columns = pairs.of_columns() if ranks.transport == "ring" else {**pairs.of_columns(), "rhs": pairs.rhs}
        for name, x in of_columns.items():
            if id(x) not in everybodys:
                everybodys[id(x)] = gather(x, ranks.cols, ranks.group, f"the all-gather of {name}")
        results.append(replace(pairs, **{name: everybodys[id(x)] for name, x in of_columns.items()}))
    return results


def blocks(parts: Sequence[Pairs], ranks: Ranks) -> Iterator[tuple[int | None, slice, list[Pairs]]]:
    """(whose columns, None for everybody's; where they stand among all; each part's rows on this rank against them).

    Parts have one rhs, which is the first's.
    """
    if ranks.transport == "all_gather":
        yield None, slice(0, ranks.m), list(parts)
        return
    for owner, cols, rhs in around_the_ring(parts[0].rhs, ranks):
        yield owner, cols, [within(pairs, rhs, cols) for pairs in parts]


def within(pairs: Pairs, rhs: Tensor, cols: slice) -> Pairs:
    """The rows against the columns `cols` alone, whose embeddings are `rhs`."""
    of_columns = {name: x[cols] for name, x in pairs.of_columns().items()}
    labels = None if pairs.labels is None else labels_within(pairs.labels, cols)
    return replace(pairs, rhs=rhs, labels=labels, **of_columns)


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
