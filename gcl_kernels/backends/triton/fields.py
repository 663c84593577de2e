"""Field aggregation, as `field_kernels` does it: what its two kernels are launched with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..choice import FIELDS_AND_WIDTH, fields_fit
from ..chunks import cdiv
from ..contract import Mean
from .config import RowBlock, row_block
from .run import run, storable


def aggregate_fields(fields: Sequence[Tensor], mask: Tensor | None, mean: Mean) -> tuple[Tensor, Tensor]:
    """See `backends.contract`."""
    n, d = fields[0].shape
    out = fields[0].new_empty((n, d), dtype=storable(fields[0]))
    inverse_norms = fields[0].new_empty((n, len(fields) + 1), dtype=torch.float32)
    run("aggregate_forward", **arguments(fields, mask, mean, inverse_norms), p_out=out)
    return out.to(fields[0].dtype), inverse_norms


def aggregate_fields_backward(
    fields: Sequence[Tensor], mask: Tensor | None, mean: Mean, inverse_norms: Tensor, g: Tensor, need: Sequence[bool]
) -> list[Tensor]:
    """See `backends.contract`."""
    stored = storable(fields[0])
    gradients = [x.new_empty(x.shape if needed else 0, dtype=stored) for x, needed in zip(fields, need, strict=True)]
    of_output = {"p_g": g, "g_strides": g.stride(), "gradients": tuple(gradients), "NEED": tuple(need)}
    run("aggregate_backward", **arguments(fields, mask, mean, inverse_norms), **of_output)
    return [v.to(fields[0].dtype) for v in gradients]


def arguments(fields: Sequence[Tensor], mask: Tensor | None, mean: Mean, inverse_norms: Tensor) -> dict[str, Any]:
    """What both kernels take, and how many programs. `inverse_norms` stands in for a mask that is not there.

    Its strides too: with (0, 0) instead, 8 float16 fields take 69 registers on sm_100, not 64, and three blocks share an SM,
    not four. The weights come next among a kernel's arguments, and where they lie decides how many are loaded at a time.
    """
    n, d = fields[0].shape
    if not fields_fit(len(fields), d):
        limits = " or ".join(f"{most} fields of D <= {widest}" for most, widest in FIELDS_AND_WIDTH)
        raise ValueError(
            f"fields: expected at most {limits} for backend 'triton', got {len(fields)} of D = {d}; backend 'torch' takes them"
        )
    block = row_block(d, lanes=64 if torch.version.hip else 32)
    mask_or_other = inverse_norms if mask is None else mask
    return {
        "programs": cdiv(n, block.rows),
        "fields": tuple(fields),
        "p_mask": mask_or_other,
        "p_inverse_norms": inverse_norms,
        "n": n,
        "d": d,
        "strides": tuple(x.stride() for x in fields),
        "mask_strides": mask_or_other.stride(),
        "weights": tuple(mean.weights),
        "HAS_MASK": mask is not None,
        "NORMALIZE_FIELDS": mean.normalize_fields,
        "NORMALIZE": mean.normalize,
        **block_constants(block),
    }


def block_constants(block: RowBlock) -> dict[str, int]:
    return {"ROWS": block.rows, "BLOCK_D": block.d, "num_warps": block.warps}
