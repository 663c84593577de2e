"""One flat custom operator and one autograd rule, so that torch.compile sees one node and never the tiles inside.

An operator takes no dataclass. `Pairs` goes through as the list of its tensors that are there and a string of their names, and
so do the upstream gradients where they are known beforehand. (A list with None in it, `Tensor?[]`, would have no gradient.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .backends import Gradients, Lines, Need, Want, statistics_dtype
from .backends.settings import debug
from .derivatives import refuse_double_backward
from .pairs import Pairs

UPSTREAM = tuple(f"g_{name}" for name in Lines._fields)


def statistics(
    pairs: Pairs, want: Want, backend: str | None, known_upstream: Lines | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, col, positive) of a loss, differentiable; a direction that is not wanted is an empty tensor.

    `known_upstream`: the gradients with respect to the statistics up to one common factor, by a caller that knows them
    beforehand. Where that saves work (`Backend.one_pass`) gradients are formed beside the statistics, from the same logits. The
    backward hands them on times the factor, in place, and a factor of one rounds nothing. The backward reads nothing but the
    factor, so what was said must hold; `GCL_KERNELS_DEBUG=1` checks it.
    """
    need = Need(*(torch.is_grad_enabled() and x.requires_grad for x in pairs.differentiable))
    named = dict(pairs.tensors())
    if known_upstream is not None and any(need):
        named |= {name: g.detach() for name, g in zip(UPSTREAM, known_upstream, strict=True) if g is not None}
    return _forward(list(named.values()), ",".join(named), list(want), list(need), backend)[:3]


def unpacked(tensors: Sequence[Tensor], names: str) -> tuple[Pairs, Lines]:
    """The operator's tensors as inputs and as upstream gradients."""
    named = dict(zip(names.split(","), tensors, strict=True))
    upstream = Lines(*(named.pop(name, None) for name in UPSTREAM))
    return Pairs(**named), upstream


def in_one_pass(pairs: Pairs, upstream: Lines, want: Sequence[bool], backend: str) -> bool:
    if upstream.positive is None:
        return False
    rule = backends.BACKENDS[backend].one_pass
    return rule(pairs.n, pairs.m, Want(*want), pairs.lhs.device, pairs.lhs.dtype)


@torch.library.custom_op("gcl_kernels::pairwise_logsumexp", mutates_args=())
def _forward(
    tensors: Sequence[Tensor], names: str, want: Sequence[bool], need: Sequence[bool], backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row, col, positive, dlhs, drhs, dscale); what is not made is empty."""
    pairs, upstream = unpacked(tensors, names)
    name = backends.choose(backend, pairs.lhs.device, pairs.lhs.dtype)
    module, gradients = backends.load(name), Gradients(None, None, None)
    if in_one_pass(pairs, upstream, want, name):
        lines, gradients = module.forward_with_gradient(pairs, upstream, Need(*need))
    else:
        lines = module.forward(pairs, Want(*want))
    kind = statistics_dtype(pairs.lhs.device)
    row, col, positive = (pairs.lhs.new_empty(0, dtype=kind) if v is None else v for v in lines)
    return row, col, positive, *filled(gradients, pairs)


@_forward.register_fake
def _(tensors, names, want, need, backend):
    pairs, upstream = unpacked(tensors, names)
    lhs, kind = pairs.lhs, statistics_dtype(pairs.lhs.device)
    name = backends.choose(backend, lhs.device, lhs.dtype)
    made = Need(*need) if in_one_pass(pairs, upstream, want, name) else Need(False, False, False)
    return (
        lhs.new_empty(pairs.n if want[0] else 0, dtype=kind),
        lhs.new_empty(pairs.m if want[1] else 0, dtype=kind),
        lhs.new_empty((pairs.n, pairs.positives), dtype=kind),
        *empty_gradients(pairs, made),
    )


@torch.library.custom_op("gcl_kernels::pairwise_logsumexp_backward", mutates_args=())
def _backward(
    tensors: Sequence[Tensor],
    names: str,
    statistics: Sequence[Tensor],
    want: Sequence[bool],
    need: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs, upstream = unpacked(tensors, names)
    row, col, positive = statistics
    lines = Lines(row if want[0] else None, col if want[1] else None, positive)
    module = backends.load(backends.choose(backend, pairs.lhs.device, pairs.lhs.dtype))
    return filled(module.backward(pairs, lines, upstream, Need(*need)), pairs)


@_backward.register_fake
def _(tensors, names, statistics, want, need, backend):
    return empty_gradients(unpacked(tensors, names)[0], Need(*need))


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
    tensors, ctx.names, ctx.want, ctx.need, ctx.backend = inputs
    *lines, dlhs, drhs, dscale = output
    ctx.save_for_backward(*tensors, *lines)
    made = any(g.numel() for g in (dlhs, drhs, dscale))
    # detached, since the outputs themselves would hold this ctx, and it them
    ctx.gradients = [g.detach() for g in (dlhs, drhs, dscale)] if made else None
    ctx.made = made
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g_row, g_col, g_positive, *through_the_gradients):
    if any(g is not None and g.numel() for g in through_the_gradients):
        _refuse_double_backward(ctx)
    *tensors, row, col, positive = ctx.saved_tensors
    names = ctx.names.split(",")
    inputs = [name for name in names if name not in UPSTREAM]
    known = dict(zip(names, tensors, strict=True))
    needs = dict(zip(names, ctx.needs_input_grad[0], strict=True))
    need = [needs[name] for name in ("lhs", "rhs", "logit_scale")]
    actual = dict(
        zip(UPSTREAM, (g_row if ctx.want[0] else None, g_col if ctx.want[1] else None, g_positive), strict=True)
    )
    if ctx.made:
        # The stored gradients are returned without a copy, so they can be used once. A second backward (retain_graph) makes
        # them again, bit for bit. With create_graph they are made again as well, because only those raise the error about a
        # double backward.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():
            gradients = _forward(tensors, ctx.names, ctx.want, ctx.need, ctx.backend)[3:]
        factor = _common_factor(*((actual[name], known.get(name)) for name in ("g_row", "g_col")))
        gradients = [g.mul_(factor.to(g.dtype)) for g in gradients]
    else:
        named = {name: known[name] for name in inputs} | {name: g for name, g in actual.items() if g is not None}
        lines = [row, col, positive]
        gradients = _backward(list(named.values()), ",".join(named), lines, ctx.want, need, ctx.backend)
    of = dict(zip(("lhs", "rhs", "logit_scale"), gradients, strict=True))
    return [of[name] if name in of and needs[name] else None for name in names], None, None, None, None


def _common_factor(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """k of actual = k * known, of the first pair that has both; no number is read on the host."""
    factor = None
    for actual, known in pairs:
        if actual is None or known is None:
            continue
        if factor is None:
            square = (known * known).sum()
            factor = (actual * known).sum() / torch.where(square > 0, square, 1.0)
        if debug() and not torch.allclose(actual, factor * known, equal_nan=True):
            raise RuntimeError("known_upstream: expected gradients proportional to those known beforehand, got others")
    assert factor is not None
    return factor


_refuse_double_backward = refuse_double_backward(
    "pairwise_logsumexp", "(gcl_kernels.reference.pairwise_logsumexp can be differentiated any number of times)"
)


def _one_by_one(operator):
    """A rule for `torch.func.vmap`: the operator of each element of the batch. PyTorch's own takes no lists of tensors."""

    def rule(info, in_dims, *arguments):
        def element(x, dim, i):
            if isinstance(x, (list, tuple)):
                dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(x)
                return [element(v, d, i) for v, d in zip(x, dims, strict=True)]
            return x if dim is None else x.select(dim, i)

        results = [
            operator(*(element(x, dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


_forward.register_vmap(_one_by_one(_forward))
_backward.register_vmap(_one_by_one(_backward))
_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_refuse_double_backward, setup_context=lambda ctx, inputs, output: None)
