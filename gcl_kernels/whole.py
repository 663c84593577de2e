"""A whole plain loss as one node of autograd, where a backend can make it with its gradients at once.

A backend may offer two functions beside its contract, of `Pairs` that its `fits` takes:

    softmax_step(pairs, weights, mean, need) -> (loss, PointwiseGradients) | None
    sigmoid_step(pairs, bias, mean, need) -> (loss, PointwiseGradients) | None

They return the loss, 0-d, and its own gradients: the backward multiplies those by the loss's. None says that the inputs are
beyond them, and the loss takes the path of all others.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, linear, validation
from .backends.pointwise import PointwiseNeed
from .derivatives import eager, refuse_double_backward
from .pairs import Pairs

CPU = torch.device("cpu")
# Of the features: the dtype that a scale and a bias have as they are.
STEP_DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}
FIELDS = tuple(field.name for field in dataclasses.fields(Pairs))


def softmax(pairs: Pairs, weights: Tensor | None, reduction: str, backend: str | None) -> Tensor | None:
    """The loss of `linear`, float32 or wider; None where it is to be made otherwise."""
    if weights is not None and (weights.requires_grad or weights.ndim > 1):
        return None
    return _step(pairs, None, weights, reduction, backend)


def sigmoid(pairs: Pairs, bias: Tensor, reduction: str, backend: str | None) -> Tensor | None:
    """`sigmoid_loss` of one pair of sides without weights, float32 or wider; None where it is to be made otherwise."""
    return _step(pairs, bias, None, reduction, backend)


def of_features(lhs: Tensor, rhs: Tensor, logit_scale: object, bias: object = None) -> Tensor | None:
    """The mean of `softmax`, or of `sigmoid` beside a bias, of a drop-in's arguments as they came, where nothing about them needs
    a check; None otherwise."""
    if not needs_no_check(lhs, rhs, logit_scale, bias):
        return None
    return of_checked(lhs, rhs, logit_scale, bias)  # pyright: ignore[reportArgumentType]


def of_checked(
    lhs: Tensor, rhs: Tensor, logit_scale: Tensor, bias: Tensor | float | None = None, weights: Tensor | None = None
) -> Tensor | None:
    """None where it is to be made otherwise."""
    pairs = Pairs(lhs, rhs, logit_scale)
    if bias is None and linear.takes(pairs, weights, "both", "mean", None):
        return linear.loss(pairs, weights, "both", "mean", None)
    return _step(pairs, bias, weights, "mean", None) if lhs.device == CPU else None


def needs_no_check(lhs: object, rhs: object, logit_scale: object, bias: object = None, weights: object = None) -> bool:
    """Whether the arguments of a loss are already what its checks would make of them.

    The checks of a public function take the host as long as a third of a step of 64 rows.
    """
    numbers = tuple(x for x in (logit_scale, bias) if isinstance(x, Tensor))
    return (
        isinstance(logit_scale, Tensor)
        and (bias is None or isinstance(bias, (Tensor, float)))
        and isinstance(lhs, Tensor)
        and isinstance(rhs, Tensor)
        and eager(lhs, rhs, *numbers)
        and lhs.ndim == 2
        and lhs.shape == rhs.shape
        and lhs.dtype == rhs.dtype
        and lhs.dtype in STEP_DTYPES
        and lhs.device == rhs.device == logit_scale.device
        and not any(x.ndim or x.dtype != STEP_DTYPES[lhs.dtype] or x.device != lhs.device for x in numbers)
        and lhs.numel() > 0
        and (weights is None or _need_no_check(weights, lhs))
        and not torch.is_autocast_enabled(lhs.device.type)
        and forward_ad._current_level < 0
    )


def _need_no_check(weights: object, lhs: Tensor) -> bool:
    """One number a row, which nobody may look at."""
    return (
        isinstance(weights, Tensor)
        and eager(weights)
        and weights.shape == lhs.shape[:1]
        and weights.dtype in STEP_DTYPES
        and weights.device == lhs.device
        and not validation.may_read(weights)
    )


def _step(
    pairs: Pairs, bias: Tensor | float | None, weights: Tensor | None, reduction: str, backend: str | None
) -> Tensor | None:
    tracked = (*pairs.differentiable, bias) if isinstance(bias, Tensor) else pairs.differentiable
    if not eager(*tracked) or reduction not in ("mean", "sum"):
        return None
    if backends.choose(backend, pairs.lhs.device, pairs.lhs.dtype) != "torch" or not backends.load("torch").fits(pairs):
        return None
    given = (*(getattr(pairs, name) for name in FIELDS), bias, weights, reduction == "mean")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tracked):
        return _Whole.apply(*given)
    made = _made(given, PointwiseNeed(False, False, False, False))
    return None if made is None else _rounded(made[0], pairs.lhs)


def _made(given: tuple, need: PointwiseNeed):
    *fields, bias, weights, mean = given
    pairs, module = Pairs(*fields), backends.load("torch")
    if bias is None:
        return module.softmax_step(pairs, weights, mean, need)
    return module.sigmoid_step(pairs, bias, mean, need)


def _rounded(loss: Tensor, lhs: Tensor) -> Tensor:
    return loss if lhs.dtype == torch.float64 else loss.to(torch.float32)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *given):
        needs = ctx.needs_input_grad
        ctx.need = PointwiseNeed(needs[0], needs[1], needs[2], needs[len(FIELDS)])
        made = _made(given, ctx.need)
        if made is None:
            return None
        loss, ctx.gradients = made
        *tensors, bias, weights, ctx.mean = given
        ctx.bias = None if isinstance(bias, Tensor) else bias
        ctx.save_for_backward(*tensors, bias if ctx.bias is None else None, weights)
        return _rounded(loss, given[0])

    @staticmethod
    def backward(ctx, g):
        # Gradients are returned without a copy, so they can be used once. A second backward (retain_graph) makes them again.
        made, ctx.gradients = ctx.gradients, None
        if made is None or torch.is_grad_enabled():
            *tensors, bias, weights = ctx.saved_tensors
            made = _Again.apply(ctx.need, *tensors, bias if ctx.bias is None else ctx.bias, weights, ctx.mean)
        lhs, rhs, scale, bias = _times(made, g)
        return lhs, rhs, scale, *[None] * (len(FIELDS) - 3), bias, None, None


def _times(gradients, g: Tensor):
    if torch.is_grad_enabled():
        return tuple(None if x is None else x * g for x in gradients)
    if float(g) == 1:
        return gradients
    return tuple(None if x is None else x.mul_(g) for x in gradients)


class _Again(torch.autograd.Function):
    """The gradients once more. Under create_graph they are the part that cannot be differentiated."""

    @staticmethod
    def forward(ctx, need, *given):
        ctx.softmax = given[len(FIELDS)] is None
        return tuple(_made(given, need)[1])

    @staticmethod
    def backward(ctx, *gradients):
        (_refuse_softmax if ctx.softmax else _refuse_sigmoid)(ctx)


_refuse_softmax = refuse_double_backward(
    "gcl_loss", "(gcl_kernels.reference.gcl_loss can be differentiated any number of times)"
)
_refuse_sigmoid = refuse_double_backward(
    "sigmoid_loss", "(gcl_kernels.reference.sigmoid_loss can be differentiated any number of times)"
)
