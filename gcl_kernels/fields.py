"""`aggregate_fields`: one vector per row from several field embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import backends
from .backends import Mean
from .backends.settings import debug
from .derivatives import refuse_double_backward, refuse_forward_mode
from .types import Backend
from .validation import check_device, check_tensor, may_read

Fields = Mapping[str, Tensor] | Sequence[Tensor]
FieldWeights = Mapping[str, float] | Sequence[float] | None


def aggregate_fields(
    fields: Fields,
    weights: FieldWeights = None,
    *,
    mask: Tensor | None = None,
    normalize_fields: bool = True,
    normalize: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    """Weighted mean of a row's fields: `normalize(sum_f m_f u_f normalize(x_f) / sum_f m_f u_f)`.

    Args:
        fields: F tensors (N, D) of one dtype and device, by name or in order.
        weights: u_f >= 0 by the same names or in the same order, not all 0; None: equal weights. Only ratios matter.
        mask: (N, F) bool, columns in the order of `fields`: which fields a row has. What an absent field holds is never
            read into a result. The weights are renormalised over the fields present, so that a document without an image
            is not dragged to the origin.
        normalize_fields: L2-normalise each field first.
        normalize: L2-normalise the mean.
        backend: as in `pairwise_logsumexp`. Triton's is one fused kernel a pass: every input is read once. It takes up to 4
            fields of D <= 8192 or 8 of D <= 4096; without a backend named, others take the plain expressions.

    Returns:
        (N, D) in the fields' dtype, computed in float32 (float64 for float64). A row with no field present, or whose mean
        is the zero vector, is a zero row with zero gradient; with `GCL_KERNELS_DEBUG=1` it is a ValueError.

    Source: GCL (arXiv 2404.08535) and its authors' evaluation code.
    """
    names, tensors = named_fields("fields", fields)
    u = normalized_weights("weights", weights, names)
    if mask is not None:
        check_mask("mask", mask, tensors)
    x = tensors[0]
    name = backends.choose_for_fields(backend, x.device, x.dtype, len(tensors), x.shape[1])
    if name == "triton":
        refuse_forward_mode("aggregate_fields", *tensors)
        result, _ = _forward(tensors, mask, u, [normalize_fields, normalize], name)
    else:
        result = weighted_mean(tensors, mask, Mean(u, normalize_fields, normalize))
    if debug() and may_read(result):
        zero = (result == 0).all(dim=1)
        if bool(zero.any()):
            i = int(zero.nonzero()[0])
            raise ValueError(
                f"fields: expected a non-zero aggregate in every row, got none in row {i} ({int(zero.sum())} such)"
            )
    return result


def weighted_mean(tensors: list[Tensor], mask: Tensor | None, mean: Mean) -> Tensor:
    """`aggregate_fields` of checked arguments, in plain PyTorch."""
    compute = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=compute)
    present_weight = total.new_zeros(total.shape[0], 1)
    for f, x in enumerate(tensors):
        x = x.to(compute)
        if mask is not None:
            x = torch.where(mask[:, f : f + 1], x, 0.0)
            present_weight = present_weight + mean.weights[f] * mask[:, f : f + 1].to(compute)
        total = total + mean.weights[f] * (unit(x) if mean.normalize_fields else x)
    if mask is not None:
        total = total / torch.where(present_weight > 0, present_weight, 1.0)
    return (unit(total) if mean.normalize else total).to(tensors[0].dtype)


def unit(x: Tensor) -> Tensor:
    """x / |x| by rows; a zero row stays zero, with gradient 0 (not 1 / eps)."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    zero = norm == 0
    return x * torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, norm))


# A backend's kernels as custom operators, so that torch.compile sees one node; the plain expressions need none.


@torch.library.custom_op("gcl_kernels::aggregate_fields", mutates_args=())
def _forward(
    fields: Sequence[Tensor], mask: Tensor | None, weights: Sequence[float], normalize: Sequence[bool], backend: str
) -> tuple[Tensor, Tensor]:
    """(mean, inverse norms), see `backends.contract`; normalize: the fields, the mean."""
    return backends.load(backend).aggregate_fields(fields, mask, Mean(weights, *normalize))


@_forward.register_fake
def _(fields, mask, weights, normalize, backend):
    n, d = fields[0].shape
    return fields[0].new_empty((n, d)), fields[0].new_empty((n, len(fields) + 1), dtype=torch.float32)


@torch.library.custom_op("gcl_kernels::aggregate_fields_backward", mutates_args=())
def _backward(
    fields: Sequence[Tensor],
    mask: Tensor | None,
    weights: Sequence[float],
    normalize: Sequence[bool],
    inverse_norms: Tensor,
    g: Tensor,
    need: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    module = backends.load(backend)
    return module.aggregate_fields_backward(fields, mask, Mean(weights, *normalize), inverse_norms, g, need)


@_backward.register_fake
def _(fields, mask, weights, normalize, inverse_norms, g, need, backend):
    return [x.new_empty(x.shape if needed else 0) for x, needed in zip(fields, need, strict=True)]


def _setup_context(ctx, inputs, output):
    fields, mask, ctx.weights, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(*fields, mask, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, g, _):
    *fields, mask, inverse_norms = ctx.saved_tensors
    need = list(ctx.needs_input_grad[0])
    gradients = _backward(fields, mask, ctx.weights, ctx.normalize, inverse_norms, g, need, ctx.backend)
    return ([g if needed else None for g, needed in zip(gradients, need, strict=True)], *[None] * 4)


_refuse = refuse_double_backward(
    "aggregate_fields", "by backend 'triton' (backend 'torch' can be differentiated any number of times)"
)
_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


def named_fields(name: str, fields: Fields) -> tuple[list[str], list[Tensor]]:
    if isinstance(fields, Mapping):
        names, tensors = [str(k) for k in fields], list(fields.values())
    elif isinstance(fields, Sequence) and not isinstance(fields, str):
        names, tensors = [str(k) for k in range(len(fields))], list(fields)
    else:
        raise TypeError(f"{name}: expected a mapping or sequence of (N, D) tensors, got {type(fields).__name__}")
    if not tensors:
        raise ValueError(f"{name}: expected at least one field, got none")
    for key, x in zip(names, tensors, strict=True):
        check_tensor(f"{name}[{key}]", x, (2,))
        check_device(f"{name}[{key}]", x, tensors[0].device, f"{name}[{names[0]}]")
        if x.shape != tensors[0].shape or 0 in x.shape:
            raise ValueError(f"{name}[{key}]: expected shape {tuple(tensors[0].shape)}, got {tuple(x.shape)}")
        if x.dtype != tensors[0].dtype:
            raise TypeError(f"{name}[{key}]: expected dtype {tensors[0].dtype}, got {x.dtype}")
    return names, tensors


def normalized_weights(name: str, weights: FieldWeights, names: list[str]) -> list[float]:
    """One weight per field, in order, summing to 1."""
    if weights is None:
        return [1.0 / len(names)] * len(names)
    if isinstance(weights, Mapping):
        if {str(k) for k in weights} != set(names):
            raise ValueError(f"{name}: expected the fields {sorted(names)}, got {sorted(map(str, weights))}")
        values = [float(weights[n]) for n in names]
    else:
        values = [float(w) for w in weights]
        if len(values) != len(names):
            raise ValueError(f"{name}: expected {len(names)} weights, one a field, got {len(values)}")
    if not all(math.isfinite(w) and w >= 0 for w in values) or sum(values) == 0:
        raise ValueError(f"{name}: expected finite weights >= 0, not all 0, got {values}")
    return [w / sum(values) for w in values]


def check_mask(name: str, mask: Tensor, tensors: list[Tensor]) -> None:
    check_tensor(name, mask, (2,), (torch.bool,))
    expected = tensors[0].shape[0], len(tensors)
    if tuple(mask.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, rows x fields, got {tuple(mask.shape)}")
    check_device(name, mask, tensors[0].device, "its fields")
