"""What is compiled: kernels, dtypes, dimensions and variants, of every chip of the configuration table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.cases import SHORT_NAMES
from gcl_kernels.backends.triton import lines, operands, partials, strips
from gcl_kernels.backends.triton.config import FAMILIES, Config, Family, TileShape, row_block

DIMENSIONS = (64, 256, 512, 768, 1024, 1280)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRID_FAMILIES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")

# What `operands.input_precision` may ask of float32 products.
PRECISIONS = {"cuda": ("ieee", "tf32", "tf32x3"), "hip": ("ieee", "bf16x3")}

# What changes machine code; the first is what CLIP training runs, and what has to be free of spills on every chip.
VARIANTS = {
    "": {},
    "labels": {"labels": 1},
    "ids": {"channels": 1},
    "3 labels": {"labels": 3},
    "ids+labels": {"labels": 3, "channels": 2},
    "limits": {"limits": True},
    "rows only": {"want": (True, False)},
    "columns only": {"want": (False, True)},
    "rows stored": {"want": (True, False), "stored": True},  # of the forward: one direction in one pass
    "columns stored": {"want": (False, True), "stored": True},
    "ids stored": {"want": (True, False), "stored": True, "channels": 1},
    "sigmoid": {"sigmoid": True},  # of the forward: sums alone
    "sigmoid stored": {"sigmoid": True, "gradient": True},  # both passes in one
    "sigmoid ids stored": {"sigmoid": True, "gradient": True, "channels": 1},
    "strips": {
        "strips": True
    },  # what runs beside the strips: of the forward, what their inexact lines are made again by
    "D tail": {"tail": True},
}

# What is O((N + M) D) beside tiles and products; D is an argument of theirs.
LINE_KERNELS = (
    "merge_partials",
    "finish_lines",
    "pack_lines",
    "inner_products",
    "sum_parts",
    "sum_losses",
    "spread_gradient",
)

TILE_KERNELS = ("forward_tile", "forward_strips", "backward_tile")

# Beside the strips. D is an argument of theirs, too.
STRIP_KERNELS = ("largest_norms", "one_reference", "finish_lines")

# Of the field kernels. An odd D is the slow path: rows that start anywhere are read a number at a time.
FIELD_OPTIONS = {"n_fields": 2, "mask": False, "normalize": True, "aligned": True}
FIELD_VARIANTS = {
    "": {},
    "1 field": {"n_fields": 1},
    "4 fields": {"n_fields": 4},
    "8 fields": {"n_fields": 8},
    "mask": {"mask": True},
    "as given": {"normalize": False},
    "odd D": {"aligned": False},
}


@dataclass(frozen=True)
class Case:
    family: Family
    kernel: str
    dtype: torch.dtype
    d: int
    variant: str = ""
    precision: str = "ieee"

    @property
    def type_name(self) -> str:
        return SHORT_NAMES[self.dtype] if self.precision == "ieee" else self.precision

    @property
    def of_tiles(self) -> bool:
        return self.kernel in TILE_KERNELS

    @property
    def of_strips(self) -> bool:
        return self.kernel == "forward_strips" or self.options.get("strips", False)

    @property
    def of_fields(self) -> bool:
        return self.kernel.startswith("aggregate")

    @property
    def options(self) -> dict[str, Any]:
        return VARIANTS[self.variant]

    @property
    def tile(self) -> TileShape:
        if self.kernel == "forward_strips":
            assert self.config.strips is not None
            return self.config.strips.tile
        terms = self.options.get("channels", 0) > 0 or self.options.get("limits", False)
        masked = terms or self.options.get("labels", 0) > 1
        return self.config.tile(self.kernel == "backward_tile", masked, self.options.get("stored", False))

    @property
    def config(self) -> Config:
        return self.family.config(self.dtype, self.d, self.precision)

    @property
    def field_options(self) -> dict[str, Any]:
        return {**FIELD_OPTIONS, **FIELD_VARIANTS[self.variant]}

    @property
    def shape(self) -> str:
        """How it is launched: tile (rows x columns x D a step) or block (rows x D), warps, stages."""
        if self.of_tiles:
            tile = self.tile
            return f"{tile.rows}x{tile.cols}x{tile.d} w{tile.warps} s{tile.stages}"
        if self.of_fields:
            block = row_block(self.d, self.family.target[2])
            return f"{block.rows}x{block.d} w{block.warps}"
        if self.kernel in ("merge_partials", "finish_lines"):
            return f"{partials.MERGE_TILES}x{partials.MERGE_LINES} w4"
        return {
            "largest_norms": f"{strips.NORM_ROWS}x{strips.NORM_D} w4",
            "inner_products": f"{lines.ROWS}x{lines.BLOCK_D} w4",
            "mark_ids": f"{operands.PAD} w4",
            "pack_limits": f"{operands.PAD} w4",
            "pack_lines": f"{operands.PAD} w4",
            "spread_gradient": f"{lines.BLOCK} w4",
        }.get(self.kernel, f"{lines.ONE_PROGRAM} w4")

    def __str__(self) -> str:
        return " ".join(filter(None, [self.family.name, self.kernel, self.type_name, f"D={self.d}", self.variant]))


def cases(families: Sequence[str], dtypes: Sequence[torch.dtype], dimensions: Sequence[int]) -> Iterator[Case]:
    """Every kernel of the table at every D, and at the last D of its band every variant."""
    for name in families:
        family = FAMILIES[name]
        yield from (Case(family, kernel, torch.float32, dimensions[0]) for kernel in LINE_KERNELS)
        yield Case(family, "mark_ids", torch.float32, dimensions[0], "ids")
        yield Case(family, "pack_limits", torch.float32, dimensions[0], "limits")
        for dtype in dtypes:
            for precision in PRECISIONS[family.target[0]] if dtype == torch.float32 else ("ieee",):
                for kernel in TILE_KERNELS:
                    for position, d in enumerate(dimensions):
                        case = Case(family, kernel, dtype, d, "", precision)
                        next_d = dimensions[position + 1] if position + 1 < len(dimensions) else math.inf
                        last = next_d == math.inf or replace(case, d=int(next_d)).config != case.config
                        every = (replace(case, variant=v) for v in VARIANTS if last or not v)
                        yield from filter(is_launched, every)
            if dtype != torch.float32:
                yield from (Case(family, kernel, dtype, dimensions[0], "strips") for kernel in STRIP_KERNELS)
            for kernel in ("aggregate_forward", "aggregate_backward"):
                yield from (Case(family, kernel, dtype, d) for d in dimensions)
                yield from (Case(family, kernel, dtype, dimensions[-1], v) for v in FIELD_VARIANTS if v)


def is_launched(case: Case) -> bool:
    """Whether the variant is one of the kernel's."""
    if case.of_strips and case.config.strips is None:
        return False
    if case.kernel == "forward_strips":
        return case.variant in ("", "D tail")
    return case.kernel == "forward_tile" or not {"stored", "sigmoid", "strips"} & case.options.keys()


def same_code(case: Case) -> Case:
    """The case with the smallest D that compiles to the same machine code: D is an argument; its configuration, and whether it
    is whole steps (a block of the field kernels: its next power of two), are not."""

    def compiled_in(d: int) -> Any:
        other = replace(case, d=d)
        return (other.config, d % other.tile.d == 0) if case.of_tiles else other.shape

    return replace(case, d=next((d for d in DIMENSIONS if compiled_in(d) == compiled_in(case.d)), case.d))
