"""Compiles one kernel ahead of time, for a chip that need not be present, as the library would launch it."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.aot.grid import BACKWARD_OPTIONS, FORWARD_OPTIONS, VARIANTS, Case
from bench.cases import SHORT_NAMES
from gcl_kernels.backends.triton import fields, kernels, launch
from gcl_kernels.backends.triton.config import row_block

POINTERS = {
    "p_scale": "*fp32",
    "p_labels": "*i32",
    "p_lhs_ids": "*i32",
    "p_rhs_ids": "*i32",
    "p_total": "*fp64",
    "p_skip": "*i32",
}

# what `launch.operand` guarantees, and the compiler is told at launch: multiples of 16
ALIGNED_SIZES = (
    "d",
    "lhs_stride",
    "rhs_stride",
    "gradient_stride",
    "kept_stride",
    "row_line_stride",
    "col_line_stride",
    "lhs_ids_stride",
    "rhs_ids_stride",
)


def build(case: Case) -> triton.compiler.CompiledKernel:
    """Compile one kernel as `launch` and `fields` would launch it."""
    kernel = getattr(fields if case.of_fields else kernels, case.kernel)
    if case.of_fields:
        types, constants = field_arguments(case)
    elif case.of_tiles:
        types, constants = tile_arguments(case)
    else:
        types, constants = {}, {"BLOCK_TILES": launch.MERGE_TILES, "BLOCK_LINES": launch.MERGE_LINES, "num_warps": 4}
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature, attributes = {}, {}
    literals: dict[Any, Any] = dict(constants)

    def declare(kind: Any, path: tuple[int, ...]) -> Any:
        """The compiler's word for an argument's type, which is "type", "type:16" (a multiple of 16), "type:1" (always 1), or
        a tuple of them."""
        if isinstance(kind, tuple):
            return tuple(declare(part, (*path, position)) for position, part in enumerate(kind))
        name, _, hint = kind.partition(":")
        if hint == "16":
            attributes[path] = [["tt.divisibility", 16]]
        if hint == "1":
            literals[path] = 1
        return "constexpr" if hint == "1" else name

    for position, name in enumerate(kernel.arg_names):
        default = f"{POINTERS.get(name, '*fp32')}:16" if name.startswith("p_") else "i32"
        signature[name] = "constexpr" if name in constants else declare(types.get(name, default), (position,))
    source = ASTSource(kernel, signature, literals, attributes)
    return triton.compile(source, target=GPUTarget(*case.family.target), options=options)


def tile_arguments(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Types of what is not a pointer to float32 or a plain number, and the constants."""
    tile, descriptors, backward = case.tile, case.config.descriptors, case.kernel == "backward_tile"
    element = SHORT_NAMES[case.dtype]
    blocks = {"lhs": (tile.rows, tile.d), "rhs": (tile.cols, tile.d), "gradient": (tile.rows, tile.stored_cols)}
    blocks["kept"] = blocks["gradient"]
    options = {**(BACKWARD_OPTIONS if backward else FORWARD_OPTIONS), "HALVES": tile.halves}
    names = {*options, "WHOLE_D"}
    constants = {
        **launch.tile_constants(tile, descriptors, case.d),
        **options,
        **{k: v for k, v in VARIANTS[case.variant].items() if k in names},
        "WIDEN": False,
        "PRECISION": case.precision,
        "FULL_SCALE": case.dtype == torch.float32,
    }
    types = {
        **{name: f"tensordesc<{element}{list(b)}>" if descriptors else f"*{element}:16" for name, b in blocks.items()},
        **dict.fromkeys(ALIGNED_SIZES, "i32:16"),
    }
    if not constants.get("KEEP"):
        types["kept"] = "*fp32:16"  # what stands in for it
    return types, constants


def field_arguments(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    options, hint = case.field_options, ":16" if case.field_options["aligned"] else ""
    n_fields, element = options["n_fields"], SHORT_NAMES[case.dtype]
    strides = (f"i32{hint}", "i32:1")
    types = {
        "fields": (f"*{element}:16",) * n_fields,
        "gradients": (f"*{element}:16",) * n_fields,
        "p_out": f"*{element}:16",
        "p_g": f"*{element}:16",
        "p_mask": "*i1:16",
        "d": f"i32{hint}",
        "strides": (strides,) * n_fields,
        "g_strides": strides,
        "mask_strides": ("i32", "i32:1"),
        "weights": ("fp32",) * n_fields,
    }
    constants = {
        **fields.block_constants(row_block(case.d, case.family.target[2])),
        **{name: options[name] for name in ("HAS_MASK", "NORMALIZE_FIELDS", "NORMALIZE")},
        **({"NEED": (True,) * n_fields} if case.kernel == "aggregate_backward" else {}),
    }
    return types, constants
