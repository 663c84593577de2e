"""The sigmoid's flat custom operator and its autograd rule, made as `ops` makes the softmax's.

One operator does both passes: a loss of each pair alone needs no statistics before its gradient. Where the upstream gradients are
known beforehand it is called once, 6 N M D floating-point operations, otherwise once a pass, 8.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends import statistics_dtype
from .backends.pointwise import PointwiseGradients, PointwiseNeed, PointwiseUpstream
from .backends.settings import debug
from .derivatives import refuse_double_backward
from .ops import INPUT_SCHEMA, INPUTS, _common_factor
from .pairs import Pairs

TENSORS = (*INPUTS, "logit_bias")
UPSTREAM = ("g_row", "g_positive")
DIFFERENTIABLE = ("lhs", "rhs", "logit_scale", "logit_bias")


class Call(NamedTuple):
    """What the operator is told besides its tensors."""

    need: PointwiseNeed
    weighted: bool  # `PointwiseUpstream`
    backend: str | None

    def text(self) -> str:
        return "".join("01"[flag] for flag in (*self.need, self.weighted)) + (self.backend or "")


@lru_cache(maxsize=256)
def call_of(text: str) -> Call:
    on = [flag == "1" for flag in text[:5]]
    return Call(PointwiseNeed(*on[:4]), on[4], text[5:] or None)


def softplus(
    pairs: Pairs, bias: Tensor, backend: str | None, known_row: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(row (N,), the positives' logits without the bias (N, P)), differentiable.

    `known_row` and `weights`, both (N, ..): by a caller whose loss is, up to one factor, `sum known_row row + sum weights
    softplus(-z)`. Gradients are then formed beside the results, and the backward hands them on times the factor. It reads nothing
    but the factor, so what was said must hold; `GCL_KERNELS_DEBUG=1` checks it.
    """
    need = PointwiseNeed(*(torch.is_grad_enabled() and x.requires_grad for x in (*pairs.differentiable, bias)))
    if not any(need):
        known_row = weights = None
    call = Call(need, True, backend)
    return _softplus(*arguments(pairs, bias, known_row, weights, call))[:2]


def arguments(
    pairs: Pairs, bias: Tensor, g_row: Tensor | None, g_positive: Tensor | None, call: Call
) -> tuple[Tensor | str | None, ...]:
    """The operator's, `unpacked`'s inverse."""
    upstream = (None if g is None else g.detach() for g in (g_row, g_positive))
    return *(getattr(pairs, name) for name in INPUTS), bias, *upstream, call.text()


def unpacked(given: tuple) -> tuple[Pairs, Tensor, PointwiseUpstream | None, Call]:
    k = len(INPUTS)
    bias, g_row, g_positive, text = given[k : k + 4]
    call = call_of(text)
    upstream = None if g_row is None else PointwiseUpstream(g_row, g_positive, call.weighted)
    return Pairs(*given[:k]), bias, upstream, call


def made_in(lhs: Tensor, call: Call) -> torch.dtype:
    """Of the gradients of lhs and rhs that wait for the factor. float16 would round them to its subnormals before the factor of a
    GradScaler lifts them."""
    return torch.float32 if call.weighted and lhs.dtype == torch.float16 else lhs.dtype


def _run(*given):
    """(row, positive, dlhs, drhs, dscale, dbias); what is not made is empty."""
    pairs, bias, upstream, call = unpacked(given)
    module = backends.load(backends.choose(call.backend, pairs.lhs.device, pairs.lhs.dtype))
    dtype = made_in(pairs.lhs, call)
    row, positive, gradients = module.softplus(pairs, bias, upstream, call.need, dtype=dtype)
    return row, positive, *filled(gradients, pairs, bias)


_softplus = torch.library.custom_op(
    "gcl_kernels::pairwise_softplus",
    _run,
    mutates_args=(),
    schema=f"({INPUT_SCHEMA}, Tensor logit_bias, Tensor? g_row, Tensor? g_positive, str call)"
    f" -> ({', '.join(['Tensor'] * 6)})",
)


@_softplus.register_fake
def _(*given):
    pairs, bias, upstream, call = unpacked(given)
    lhs, kind = pairs.lhs, statistics_dtype(pairs.lhs.device)
    made = [upstream is not None and needed for needed in call.need]
    dtypes = (made_in(lhs, call), made_in(lhs, call), None, None)
    gradients = (
        x.new_empty(x.shape if there else 0, dtype=dtype if there and dtype else x.dtype)
        for x, there, dtype in zip((*pairs.differentiable, bias), made, dtypes, strict=True)
    )
    return lhs.new_empty(pairs.n, dtype=kind), lhs.new_empty((pairs.n, pairs.positives), dtype=kind), *gradients


def filled(gradients: PointwiseGradients, pairs: Pairs, bias: Tensor) -> tuple[Tensor, ...]:
    """An operator returns no None: empty tensors instead."""
    inputs = (*pairs.differentiable, bias)
    return tuple(x.new_empty(0) if g is None else g for g, x in zip(gradients, inputs, strict=True))


def _setup_context(ctx, inputs, output):
    ctx.call = inputs[-1]
    _, positive, *gradients = output
    ctx.save_for_backward(*inputs[:-1], positive)
    ctx.made = any(g.numel() for g in gradients)
    # detached, since the outputs themselves would hold this ctx, and it them
    ctx.gradients = [g.detach() for g in gradients] if ctx.made else None
    ctx.set_materialize_grads(False)


def _differentiate(ctx, g_row, g_positive, *through_the_gradients):
    if any(g is not None and g.numel() for g in through_the_gradients):
        _refuse_double_backward(ctx)
    *tensors, known_row, weights, positive = ctx.saved_tensors
    *inputs, bias = tensors
    call = call_of(ctx.call)
    needs = dict(zip(TENSORS, ctx.needs_input_grad, strict=False))
    if g_row is None:
        g_row = torch.zeros_like(positive[:, 0])
    if ctx.made:
        # used once and made again for a second backward, as in `ops`
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():
            gradients = _softplus(*inputs, bias, known_row, weights, ctx.call)[2:]
        checked = []
        if debug() and g_positive is not None:
            labels = inputs[INPUTS.index("labels")]
            expected = PointwiseUpstream(known_row, weights, True).at_positives(positive, bias, labels)
            checked = [(g_positive, expected)]
        factor = _common_factor((g_row, known_row), *checked)
        gradients = [g.mul_(factor.to(g.dtype)) for g in gradients]
        gradients[:2] = [g.to(inputs[0].dtype) for g in gradients[:2]]
    else:
        need = PointwiseNeed(*(needs[name] for name in DIFFERENTIABLE))
        again = Call(need, False, call.backend).text()
        gradients = _softplus(*inputs, bias, g_row, g_positive, again)[2:]
    of = dict(zip(DIFFERENTIABLE, gradients, strict=True))
    return *(of[name] if name in of and needs[name] else None for name in TENSORS), *[None] * (len(UPSTREAM) + 1)


_refuse_double_backward = refuse_double_backward(
    "pairwise_softplus", "(gcl_kernels.reference.pairwise_softplus can be differentiated any number of times)"
)

_softplus.register_autograd(_differentiate, setup_context=_setup_context)
