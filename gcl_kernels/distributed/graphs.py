"""The exchanges inside a graph of `torch.compile`: custom operators whose bodies communicate, so that no graph breaks.

An operator's body runs when the graph does, not when it is traced: the ranks agree there as eager code does, first in every call.
Sizes of other ranks are then values of the graph, a tensor, and no shape depends on them. A backward operator therefore gathers
the columns again, which eager code keeps from the forward.

Outside of a graph these functions call the eager ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops, pointwise_ops
from ..backends import Gradients, Need, Want, statistics_dtype
from ..backends.pointwise import PointwiseGradients, PointwiseNeed, PointwiseUpstream
from ..pairs import Pairs
from . import agreement, exchange, pointwise, primitive
from .agreement import Ranks

K = len(ops.INPUTS)
SEPARATOR = "\x1f"


def group_named(name: str) -> Any:
    c10d: Any = torch.distributed.distributed_c10d
    return c10d._resolve_process_group(name)


@dataclass(frozen=True)
class GraphRanks:
    """`Ranks` within a graph, where sizes are a tensor."""

    group: Any
    transport: str
    rank: int
    world: int
    sizes: Tensor  # (2, world) int64 on the CPU: rows, columns

    @property
    def name(self) -> str:
        return self.group.group_name

    @property
    def n(self) -> Tensor:
        return self.sizes[0].sum().double()

    @property
    def first_column(self) -> Tensor:
        return self.sizes[1, : self.rank].sum()

    def all_columns(self, x: Tensor, what: str = "a statistic") -> Tensor:
        """As `Ranks.all_columns`; a shape that depends on values, which breaks the graph."""
        return self.known().all_columns(x, what)

    def total(self, x: Tensor) -> Tensor:
        return total(x, self.group)

    @exchange.outside_compiled_graphs
    def known(self) -> Ranks:
        return ranks_of(self.name, self.transport, self.sizes)


def ranks_of(name: str, transport: str, sizes: Tensor) -> Ranks:
    group = group_named(name)
    rows, cols = sizes.tolist()
    transport = transport if len(rows) > 1 else "all_gather"
    return Ranks(group, transport, torch.distributed.get_rank(group), tuple(rows), tuple(cols))


# ---- the agreement


def agree(
    process_group: Any, transport: str, pairs: Pairs, logit_scale: Tensor | float, alike: Mapping[str, Any]
) -> Any:
    """`agreement.agree`: `Ranks`, or `GraphRanks` in a graph."""
    if not torch.compiler.is_compiling():
        return agreement.agree(process_group, transport, pairs, logit_scale, alike)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in pairs.differentiable]
    told = [process_group.group_name, transport, "".join("01"[flag] for flag in needs)]
    for name, value in alike.items():
        told += [name, str(value)]
    sizes = _agree(*(None if x is None else x.detach() for x in inputs_of(pairs)), SEPARATOR.join(told))
    world = torch.distributed.get_world_size(process_group)
    return GraphRanks(process_group, transport, torch.distributed.get_rank(process_group), world, sizes)


def inputs_of(pairs: Pairs) -> tuple[Tensor | None, ...]:
    return tuple(getattr(pairs, name) for name in ops.INPUTS)


def _run_agree(*given):
    pairs = Pairs(*given[:K])
    name, transport, needs, *told = given[K].split(SEPARATOR)
    alike = dict(zip(told[::2], told[1::2], strict=True))
    # Graphs send more in the backward than eager code does: a rank of each kind would wait for the other.
    alike |= {"torch.compile": "a graph", "requires_grad in the graph": needs}
    ranks = agreement.agree(group_named(name), transport, pairs, pairs.logit_scale, alike)
    return torch.tensor([ranks.rows, ranks.cols])


_agree = torch.library.custom_op(
    "gcl_kernels::agree", _run_agree, mutates_args=(), schema=f"({ops.INPUT_SCHEMA}, str call) -> Tensor"
)


@_agree.register_fake
def _(*given):
    world = torch.distributed.get_world_size(group_named(given[K].split(SEPARATOR)[0]))
    return torch.empty(2, world, dtype=torch.int64)


# ---- sums


def total(x: Tensor, group: Any) -> Tensor:
    """`exchange.total`."""
    return _total(x, group.group_name) if torch.compiler.is_compiling() else exchange.total(x, group)


@torch.library.custom_op("gcl_kernels::total", mutates_args=())
def _total(x: Tensor, group: str) -> Tensor:
    return exchange.total(x.detach(), group_named(group))


@_total.register_fake
def _(x, group):
    return torch.empty_like(x)


def _total_context(ctx, inputs, output):
    ctx.group = inputs[1]


_total.register_autograd(lambda ctx, g: (_total(g, ctx.group), None), setup_context=_total_context)


def sum_values(x: Tensor, factor: float, group: Any) -> Tensor:
    """The sum over ranks of x; its gradient, which is alike on all ranks, goes back to each rank's x times `factor`."""
    value = total(x.detach(), group)
    return value + factor * (x - x.detach())


def sum_gradients(x: Tensor, factor: float, group: Any) -> Tensor:
    """x; its gradient is `factor` times the sum over ranks of theirs."""
    if torch.compiler.is_compiling():
        return _sum_gradients(x, float(factor), group.group_name)
    return exchange.sum_gradients(x, factor, group)


@torch.library.custom_op("gcl_kernels::sum_gradients", mutates_args=())
def _sum_gradients(x: Tensor, factor: float, group: str) -> Tensor:
    return x.clone()


@_sum_gradients.register_fake
def _(x, factor, group):
    return torch.empty_like(x)


def _sum_gradients_context(ctx, inputs, output):
    _, ctx.factor, ctx.group = inputs


_sum_gradients.register_autograd(
    lambda ctx, g: (ctx.factor * _total(g, ctx.group), None, None), setup_context=_sum_gradients_context
)


# ---- the softmax's statistics


def statistics_of_parts(
    parts: Sequence[Pairs], want: Want, backend: str, ranks: Ranks | GraphRanks
) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
    """`primitive.statistics_of_parts`; within a graph of one part."""
    if isinstance(ranks, Ranks):
        return primitive.statistics_of_parts(parts, want, backend, ranks)
    (pairs,) = parts
    call = ops.Call(want, Need(False, False, False), backend).text()
    return [_statistics(*inputs_of(pairs), ranks.sizes, call, ranks.name, ranks.transport)]


def _gathered(given: tuple, transport: str, name: str) -> tuple[list[Pairs], Ranks]:
    """The one part."""
    ranks = ranks_of(name, transport, given[K])
    return primitive.gathered([primitive.labelled(Pairs(*given[:K]), ranks)], ranks), ranks


def _run_statistics(*given):
    call, name, transport = given[K + 1 :]
    parts, ranks = _gathered(given, transport, name)
    call = ops.call_of(call)
    return primitive.lines_of(parts, call.want, call.backend, ranks)[0]  # pyright: ignore[reportArgumentType]


CALL_SCHEMA = "str call, str group, str transport"
_statistics = torch.library.custom_op(
    "gcl_kernels::statistics_over_ranks",
    _run_statistics,
    mutates_args=(),
    schema=f"({ops.INPUT_SCHEMA}, Tensor sizes, {CALL_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)


@_statistics.register_fake
def _(*given):
    pairs, want = Pairs(*given[:K]), ops.call_of(given[K + 1]).want
    lhs, kind = pairs.lhs, statistics_dtype(pairs.lhs.device)
    rows, cols = pairs.n if want.row else 0, pairs.m if want.col else 0
    return (
        lhs.new_empty(rows, dtype=kind),
        lhs.new_empty(cols, dtype=kind),
        lhs.new_empty(pairs.n, pairs.positives, dtype=kind),
    )


def _run_statistics_backward(*given):
    call, name, transport, *lines = given[K + 1 :]
    parts, ranks = _gathered(given, transport, name)
    call, pairs = ops.call_of(call), Pairs(*given[:K])
    (made,) = primitive.gradients_of(
        parts,
        [lines[:3]],
        [lines[3:]],
        call.want,
        [call.need],
        call.backend,  # pyright: ignore[reportArgumentType]
        ranks,
    )
    rounded = (None if g is None else g.to(x.dtype) for g, x in zip(made, pairs.differentiable, strict=True))
    return ops.filled(Gradients(*rounded), pairs)


_statistics_backward = torch.library.custom_op(
    "gcl_kernels::statistics_over_ranks_backward",
    _run_statistics_backward,
    mutates_args=(),
    schema=f"({ops.INPUT_SCHEMA}, Tensor sizes, {CALL_SCHEMA}, Tensor row, Tensor col, Tensor positive, {ops.UPSTREAM_SCHEMA})"
    " -> (Tensor, Tensor, Tensor)",
)


@_statistics_backward.register_fake
def _(*given):
    return ops.empty_gradients(Pairs(*given[:K]), ops.call_of(given[K + 1]).need)


def _statistics_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[: K + 1], *output)
    ctx.told = inputs[K + 1 :]
    ctx.set_materialize_grads(False)


def _differentiate_statistics(ctx, *upstream):
    *tensors, row, col, positive = ctx.saved_tensors
    needs = dict(zip(ops.INPUTS, ctx.needs_input_grad, strict=False))
    text, name, transport = ctx.told
    need = Need(needs["lhs"], needs["rhs"], needs["logit_scale"])
    text = ops.call_of(text)._replace(need=need).text()
    gradients = _statistics_backward(*tensors, text, name, transport, row, col, positive, *upstream)
    of = dict(zip(("lhs", "rhs", "logit_scale"), gradients, strict=True))
    return *(of[name] if name in of and needs[name] else None for name in ops.INPUTS), *[None] * 4


_statistics.register_autograd(_differentiate_statistics, setup_context=_statistics_context)


# ---- the sigmoid's sums


def softplus_of_parts(
    parts: Sequence[Pairs],
    bias: Tensor,
    backend: str,
    known: Sequence[pointwise.Known] | None,
    ranks: Ranks | GraphRanks,
) -> Sequence[tuple[Tensor, Tensor]]:
    """`pointwise.softplus_of_parts`; within a graph of one part."""
    if isinstance(ranks, Ranks):
        return pointwise.softplus_of_parts(parts, bias, backend, known, ranks)
    (pairs,) = parts
    need = PointwiseNeed(*(torch.is_grad_enabled() and x.requires_grad for x in (*pairs.differentiable, bias)))
    row, weights = known[0] if known is not None and any(need) else (None, None)
    upstream = (None if g is None else g.detach() for g in (row, weights))
    call = pointwise_ops.Call(need, True, backend).text()
    return [_softplus(*inputs_of(pairs), ranks.sizes, bias, *upstream, call, ranks.name, ranks.transport)[:2]]


POINTWISE_SCHEMA = f"{ops.INPUT_SCHEMA}, Tensor sizes, Tensor logit_bias, Tensor? known_row, Tensor? weights"


def _known(given: tuple) -> tuple[Tensor, list[PointwiseUpstream] | None]:
    bias, known_row, weights = given[K + 1 : K + 4]
    return bias, None if known_row is None else [PointwiseUpstream(known_row, weights, True)]


def _run_softplus(*given):
    text, name, transport = given[K + 4 :]
    call, (bias, known) = pointwise_ops.call_of(text), _known(given)
    parts, ranks = _gathered(given, transport, name)
    (lines,), (made,) = pointwise.one_round(parts, bias, known, [call.need], call.backend, ranks)  # pyright: ignore
    return *lines, *pointwise_ops.filled(made, parts[0], bias)


_softplus = torch.library.custom_op(
    "gcl_kernels::softplus_over_ranks",
    _run_softplus,
    mutates_args=(),
    schema=f"({POINTWISE_SCHEMA}, {CALL_SCHEMA}) -> ({', '.join(['Tensor'] * 6)})",
)


def _empty(given: tuple, need: PointwiseNeed) -> list[Tensor]:
    """Gradients, those of lhs and rhs not yet rounded to the inputs' dtype."""
    pairs, bias = Pairs(*given[:K]), given[K + 1]
    wide = torch.promote_types(pairs.lhs.dtype, torch.float32)
    inputs = (*pairs.differentiable, bias)
    dtypes = (wide, wide, pairs.logit_scale.dtype, bias.dtype)
    return [
        x.new_empty(x.shape if made else 0, dtype=dtype if made else x.dtype)
        for x, made, dtype in zip(inputs, need, dtypes, strict=True)
    ]


@_softplus.register_fake
def _(*given):
    pairs, kind = Pairs(*given[:K]), statistics_dtype(given[0].device)
    call, known = pointwise_ops.call_of(given[K + 4]), given[K + 2] is not None
    need = call.need if known else PointwiseNeed(False, False, False, False)
    row, positive = (pairs.lhs.new_empty(shape, dtype=kind) for shape in ((pairs.n,), (pairs.n, pairs.positives)))
    return row, positive, *_empty(given, need)


def _run_softplus_backward(*given):
    text, name, transport, g_row, g_positive, *made = given[K + 4 :]
    call, (bias, known) = pointwise_ops.call_of(text), _known(given)
    ranks = ranks_of(name, transport, given[K])
    made = None if known is None else [PointwiseGradients(*(g if g.numel() else None for g in made))]
    (gradients,) = pointwise.gradients_of(
        lambda: (_gathered(given, transport, name)[0], bias),
        [PointwiseUpstream(g_row, g_positive)],
        known,
        made,
        [call.need],
        call.backend,  # pyright: ignore[reportArgumentType]
        ranks,
    )
    return pointwise_ops.filled(gradients, Pairs(*given[:K]), bias)


_softplus_backward = torch.library.custom_op(
    "gcl_kernels::softplus_over_ranks_backward",
    _run_softplus_backward,
    mutates_args=(),
    schema=f"({POINTWISE_SCHEMA}, {CALL_SCHEMA}, Tensor g_row, Tensor? g_positive, Tensor dlhs, Tensor drhs, Tensor dscale, "
    "Tensor dbias) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_softplus_backward.register_fake
def _(*given):
    return tuple(_empty(given, pointwise_ops.call_of(given[K + 4]).need))


def _softplus_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[: K + 4], *output[1:])
    ctx.told = inputs[K + 4 :]
    ctx.set_materialize_grads(False)


def _differentiate_softplus(ctx, g_row, g_positive, *_):
    *tensors, positive, dlhs, drhs, dscale, dbias = ctx.saved_tensors
    if g_row is None:
        g_row = torch.zeros_like(positive[:, 0])
    names = (*ops.INPUTS, "sizes", "logit_bias")
    needs = dict(zip(names, ctx.needs_input_grad, strict=False))
    text, name, transport = ctx.told
    need = PointwiseNeed(*(needs[name] for name in pointwise_ops.DIFFERENTIABLE))
    text = pointwise_ops.call_of(text)._replace(need=need).text()
    made = (dlhs, drhs, dscale, dbias)
    gradients = _softplus_backward(*tensors, text, name, transport, g_row, g_positive, *made)
    of = dict(zip(pointwise_ops.DIFFERENTIABLE, gradients, strict=True))
    of = {name: g.to(tensors[names.index(name)].dtype) for name, g in of.items()}
    return *(of[name] if name in of and needs[name] else None for name in names), *[None] * 5


_softplus.register_autograd(_differentiate_softplus, setup_context=_softplus_context)
