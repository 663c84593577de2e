"""One flat custom operator and one autograd rule, so that torch.compile sees one node and never the tiles inside.

An operator takes no dataclass. Its schema is read off `Pairs`: one argument for each of its tensors, then the upstream gradients
where they are known beforehand, then one string for everything else (`Call`). A list of tensors would do without a schema of its
own, but PyTorch then walks over all arguments several times a call, a tenth of a step of 64 rows.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends import Gradients, Lines, Need, Want, statistics_dtype
from .backends.settings import debug
from .backends.terms import without_tiny
from .derivatives import eager, refuse_double_backward
from .pairs import Pairs

INPUTS = tuple(field.name for field in dataclasses.fields(Pairs))
REQUIRED = tuple(field.name for field in dataclasses.fields(Pairs) if field.default is dataclasses.MISSING)
UPSTREAM = tuple(f"g_{name}" for name in Lines._fields)
INPUT_SCHEMA = ", ".join(f"Tensor{'' if name in REQUIRED else '?'} {name}" for name in INPUTS)
UPSTREAM_SCHEMA = ", ".join(f"Tensor? {name}" for name in UPSTREAM)


class Call(NamedTuple):
    """What the operator is told besides its tensors."""

    want: Want
    need: Need
    backend: str | None

    def text(self) -> str:
        return "".join("01"[flag] for flag in (*self.want, *self.need)) + (self.backend or "")


@lru_cache(maxsize=256)
def call_of(text: str) -> Call:
    wants, flags = len(Want._fields), len(Want._fields) + len(Need._fields)
    on = [flag == "1" for flag in text[:flags]]
    return Call(Want(*on[:wants]), Need(*on[wants:]), text[flags:] or None)


def statistics(
    pairs: Pairs, want: Want, backend: str | None, known_upstream: Lines | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, col, positive) of a loss, differentiable; a direction that is not wanted is an empty tensor.

    `known_upstream`: the gradients with respect to the statistics up to one common factor, from a caller who knows them before
    the statistics exist. Where that saves work (`Backend.one_pass`) the forward forms the gradients of the inputs as well, from
    the same logits. The backward multiplies them by the factor in place; a factor of 1 rounds nothing. It takes nothing else
    from the actual upstream gradients, so these must be as announced. `GCL_KERNELS_DEBUG=1` checks that.
    """
    need = Need(*(torch.is_grad_enabled() and x.requires_grad for x in pairs.differentiable))
    known = known_upstream if any(need) else None
    given = arguments(pairs, known, Call(want, need, backend))
    return (_Eager.apply(*given) if eager(*pairs.differentiable) else _forward(*given))[:3]


def arguments(pairs: Pairs, known_upstream: Lines | None, call: Call) -> tuple[Tensor | str | None, ...]:
    """The forward operator's, `unpacked`'s inverse."""
    known = (None,) * len(UPSTREAM) if known_upstream is None else known_upstream
    upstream = (None if g is None else g.detach() for g in known)
    return *(getattr(pairs, name) for name in INPUTS), *upstream, call.text()


def in_one_pass(pairs: Pairs, upstream: Lines, want: Want, backend: str) -> bool:
    if upstream.positive is None:
        return False
    return backends.BACKENDS[backend].one_pass(pairs.n, pairs.m, want, pairs.lhs.device, pairs.lhs.dtype)


def unpacked(given: tuple) -> tuple[Pairs, Lines, Call]:
    """The operators' arguments, up to and with the string."""
    k = len(INPUTS)
    return Pairs(*given[:k]), Lines(*given[k : k + len(UPSTREAM)]), call_of(given[k + len(UPSTREAM)])


def _run_forward(*given):
    """(row, col, positive, dlhs, drhs, dscale); what is not made is empty."""
    pairs, upstream, call = unpacked(given)
    name = backends.choose(call.backend, pairs.lhs.device, pairs.lhs.dtype)
    module, gradients = backends.load(name), Gradients(None, None, None)
    one_pass = in_one_pass(pairs, upstream, call.want, name)
    if one_pass:
        lines, gradients = module.forward_with_gradient(pairs, upstream, call.need, joined=call.want.joined)
    else:
        lines = module.forward(pairs, call.want)
    if pairs.limited and (one_pass or name != "triton"):  # Triton's forward finishes its lines without
        lines = Lines(*(None if v is None else without_tiny(v, pairs) for v in lines))
    kind = statistics_dtype(pairs.lhs.device)
    row, col, positive = (pairs.lhs.new_empty(0, dtype=kind) if v is None else v for v in lines)
    return row, col, positive, *filled(gradients, pairs)


_forward = torch.library.custom_op(
    "gcl_kernels::pairwise_logsumexp",
    _run_forward,
    mutates_args=(),
    schema=f"({INPUT_SCHEMA}, {UPSTREAM_SCHEMA}, str call) -> ({', '.join(['Tensor'] * 6)})",
)


@_forward.register_fake
def _(*given):
    pairs, upstream, call = unpacked(given)
    lhs, kind = pairs.lhs, statistics_dtype(pairs.lhs.device)
    name = backends.choose(call.backend, lhs.device, lhs.dtype)
    made = call.need if in_one_pass(pairs, upstream, call.want, name) else Need(False, False, False)
    return (
        lhs.new_empty(pairs.n if call.want.row else 0, dtype=kind),
        lhs.new_empty(pairs.m if call.want.col else 0, dtype=kind),
        lhs.new_empty((pairs.n, pairs.positives), dtype=kind),
        *empty_gradients(pairs, made),
    )


def _run_backward(*given):
    pairs, upstream, call = unpacked(given)
    row, col, positive = given[-3:]
    lines = Lines(row if call.want.row else None, col if call.want.col else None, positive)
    module = backends.load(backends.choose(call.backend, pairs.lhs.device, pairs.lhs.dtype))
    return filled(module.backward(pairs, lines, upstream, call.need, joined=call.want.joined), pairs)


_backward = torch.library.custom_op(
    "gcl_kernels::pairwise_logsumexp_backward",
    _run_backward,
    mutates_args=(),
    schema=f"({INPUT_SCHEMA}, {UPSTREAM_SCHEMA}, str call, Tensor row, Tensor col, Tensor positive)"
    " -> (Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(*given):
    pairs, _, call = unpacked(given)
    return empty_gradients(pairs, call.need)


def statistics_gradient(
    pairs: Pairs, lines: Lines, upstream: Lines, want: Want, need: Need, backend: str | None
) -> tuple[Tensor | None, ...]:
    """By the operator, which refuses a second derivative; None for what is not needed."""
    empty = pairs.lhs.new_empty(0, dtype=statistics_dtype(pairs.lhs.device))
    made = (empty if x is None else x for x in lines)
    given = arguments(pairs, upstream, Call(want, need, backend))
    return tuple(g if needed else None for g, needed in zip(_backward(*given, *made), need, strict=True))


def filled(gradients: Gradients, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns no None: empty tensors instead."""
    lhs, rhs, scale = (x.new_empty(0) if g is None else g for g, x in zip(gradients, pairs.differentiable, strict=True))
    return lhs, rhs, scale


def empty_gradients(pairs: Pairs, need: Need) -> tuple[Tensor, Tensor, Tensor]:
    lhs, rhs, scale = (
        x.new_empty(x.shape if needed else 0) for x, needed in zip(pairs.differentiable, need, strict=True)
    )
    return lhs, rhs, scale


def _setup_context(ctx, inputs, output):
    ctx.call = inputs[-1]
    *lines, dlhs, drhs, dscale = output
    ctx.save_for_backward(*inputs[:-1], *lines)
    ctx.made = any(g.numel() for g in (dlhs, drhs, dscale))
    # detached, since the outputs themselves would hold this ctx, and it them
    ctx.gradients = [g.detach() for g in (dlhs, drhs, dscale)] if ctx.made else None
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g_row, g_col, g_positive, *through_the_gradients):
    if any(g is not None and g.numel() for g in through_the_gradients):
        _refuse_double_backward(ctx)
    if g_row is None and g_col is None and g_positive is None:  # as gradcheck asks: no gradient in, none out
        return (None,) * (len(INPUTS) + len(UPSTREAM) + 1)
    *inputs, known_row, known_col, known_positive, row, col, positive = ctx.saved_tensors
    call = call_of(ctx.call)
    needs = dict(zip(INPUTS, ctx.needs_input_grad, strict=False))
    g_row, g_col = (g if wanted else None for g, wanted in zip((g_row, g_col), call.want[:2], strict=True))
    if ctx.made:
        # The stored gradients are returned without a copy, so they can be used once. A second backward (retain_graph) makes
        # them again, bit for bit. With create_graph they are made again as well, because only those raise the error about a
        # double backward.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():
            gradients = _forward(*inputs, known_row, known_col, known_positive, ctx.call)[3:]
        factor = _common_factor((g_row, known_row), (g_col, known_col))
        gradients = [g.mul_(factor.to(g.dtype)) for g in gradients]
    else:
        need = Need(needs["lhs"], needs["rhs"], needs["logit_scale"])
        text = call._replace(need=need).text()
        given = (*inputs, g_row, g_col, g_positive, text, row, col, positive)
        # the operator also refuses a second derivative
        direct = not torch.is_grad_enabled() and eager(row, *inputs[:3])
        gradients = _run_backward(*given) if direct else _backward(*given)
    of = dict(zip(("lhs", "rhs", "logit_scale"), gradients, strict=True))
    return *(of[name] if name in of and needs[name] else None for name in INPUTS), *[None] * (len(UPSTREAM) + 1)


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which takes the host as long as the rest of a small step."""

    @staticmethod
    def forward(ctx, *given):
        output = _run_forward(*given)
        _setup_context(ctx, given, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        return _differentiate(ctx, *gradients)


def _common_factor(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """k of actual = k * known, of the first pair that has both; no number is read on the host."""
    factor = None
    for actual, known in pairs:
        if actual is None or known is None:
            continue
        if factor is None:
            # relative to the largest, whose square is 1: the squares of small numbers underflow, those of large ones overflow
            largest = known.abs().max()
            largest = torch.where(largest > 0, largest, 1.0)
            direction = known / largest
            factor = (actual / largest * direction).sum() / (direction * direction).sum().clamp(min=0.5)
        if debug() and not torch.allclose(actual, factor * known, equal_nan=True):
            raise RuntimeError("known_upstream: expected gradients proportional to those known beforehand, got others")
    assert factor is not None
    return factor


_refuse_double_backward = refuse_double_backward(
    "pairwise_logsumexp", "(gcl_kernels.reference.pairwise_logsumexp can be differentiated any number of times)"
)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_refuse_double_backward, setup_context=lambda ctx, inputs, output: None)
