"""What the kernels compile to, without a GPU: ``python -m bench.aot [--family sm_90] [--dtype bfloat16] [--d 768]``.

Every kernel of the configuration table is compiled ahead of time, for chips that need not be present, and its machine code is
read: registers, stack frame, spills, shared memory against the chip's limit, matrix and copy instructions, access widths. Exits
with 1 where a default configuration spills, needs a stack frame, does not fit, or misses the chip's matrix or copy engine.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gcl_kernels.backends.triton import kernels, launch
from gcl_kernels.backends.triton.config import FAMILIES, Config, Family, Tile

DIMENSIONS = (64, 256, 512, 768, 1024, 1280)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRID_FAMILIES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# What ``launch.input_precision`` may ask of float32 products.
PRECISIONS = {"cuda": ("ieee", "tf32", "tf32x3"), "hip": ("ieee", "bf16x3")}

# The options that change machine code; the first is what CLIP training runs, and what has to be free of spills on every chip.
FORWARD_OPTIONS = {"LABELS": 0, "CHANNELS": 0, "WANT_ROW": True, "WANT_COL": True}
BACKWARD_OPTIONS = {"LABELS": 0, "CHANNELS": 0, "HAS_ROW": True, "HAS_COL": True}
VARIANTS = {
    "": {},
    "labels": {"LABELS": 1},
    "ids": {"CHANNELS": 1},
    "3 labels": {"LABELS": 3},
    "ids+labels": {"LABELS": 3, "CHANNELS": 2},
    "rows only": {"WANT_COL": False, "HAS_COL": False},
    "columns only": {"WANT_ROW": False, "HAS_ROW": False},
    "D tail": {"WHOLE_D": False},
}

POINTERS = {
    "p_scale": "*fp32",
    "p_labels": "*i32",
    "p_lhs_ids": "*i32",
    "p_rhs_ids": "*i32",
    "p_total": "*fp64",
}
# what ``launch.operand`` guarantees, and the compiler is told at launch: multiples of 16
ALIGNED_SIZES = (
    "d",
    "lhs_stride",
    "rhs_stride",
    "gradient_stride",
    "row_line_stride",
    "col_line_stride",
    "lhs_ids_stride",
    "rhs_ids_stride",
)


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
        return TYPE_NAMES[self.dtype] if self.precision == "ieee" else self.precision

    @property
    def tile(self) -> Tile:
        options = VARIANTS[self.variant]
        masked = options.get("CHANNELS", 0) > 0 or options.get("LABELS", 0) > 1
        return self.config.tile(self.kernel == "backward_tile", masked)

    @property
    def config(self) -> Config:
        return self.family.config(self.dtype, self.d, self.precision)

    def __str__(self) -> str:
        return " ".join(filter(None, [self.family.name, self.kernel, self.type_name, f"D={self.d}", self.variant]))


@dataclass
class Report:
    case: Case
    registers: int
    stack: int
    spills: int  # bytes of local memory, or spilled registers on AMD
    shared: int
    instructions: Counter[str]  # matrix, copy and other notable instructions

    @property
    def matrix(self) -> str:
        """The matrix instruction this kernel's products are made of."""
        return next((name for name in ("tcgen05", "wgmma", "mfma", "mma") if self.instructions[name]), "none")

    def complaints(self) -> list[str]:
        family, half = self.case.family, self.case.dtype != torch.float32
        found = []
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        if self.spills:
            found.append(f"{self.spills} spilled")
        if self.shared > family.shared_memory:
            found.append(f"shared memory {self.shared} over the chip's {family.shared_memory}")
        if self.case.kernel == "merge_partials":
            return found
        expected = {"sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
        if half and self.matrix != expected[family.name]:
            found.append(f"{self.matrix} instead of {expected[family.name]}")
        if half and family.name in ("sm_90", "sm_100") and not self.instructions["tma load"]:
            found.append("no TMA load")
        return found


def cases(families: Sequence[str], dtypes: Sequence[torch.dtype], dimensions: Sequence[int]) -> Iterator[Case]:
    """Every kernel of the table at every D, and at the last D of its band every variant."""
    for name in families:
        family = FAMILIES[name]
        yield Case(family, "merge_partials", torch.float32, dimensions[0])
        for dtype in dtypes:
            for precision in PRECISIONS[family.target[0]] if dtype == torch.float32 else ("ieee",):
                for kernel in ("forward_tile", "backward_tile"):
                    for position, d in enumerate(dimensions):
                        case = Case(family, kernel, dtype, d, "", precision)
                        yield case
                        next_d = dimensions[position + 1] if position + 1 < len(dimensions) else math.inf
                        if next_d == math.inf or replace(case, d=int(next_d)).config != case.config:
                            yield from (replace(case, variant=v) for v in VARIANTS if v)


def build(case: Case) -> triton.compiler.CompiledKernel:
    """Compile one kernel as ``launch`` would launch it."""
    kernel = getattr(kernels, case.kernel)
    descriptors = case.config.descriptors
    constants: dict[str, Any]
    if case.kernel == "merge_partials":
        constants = {"BLOCK_TILES": launch.MERGE_TILES, "BLOCK_LINES": launch.MERGE_LINES}
        options = {"num_warps": 4}
    else:
        constants = {
            **launch.tile_constants(case.tile, descriptors, case.d),
            **(FORWARD_OPTIONS if case.kernel == "forward_tile" else BACKWARD_OPTIONS),
            **({"HALVES": case.tile.halves} if case.kernel == "backward_tile" else {}),
            **{k: v for k, v in VARIANTS[case.variant].items() if k in kernel.arg_names},
            "WIDEN": False,
            "PRECISION": case.precision,
            "FULL_SCALE": case.dtype == torch.float32,
        }
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    signature, attributes = {}, {}
    element = TYPE_NAMES[case.dtype]
    blocks = {
        "lhs": (case.tile.rows, case.tile.d),
        "rhs": (case.tile.cols, case.tile.d),
        "gradient": (case.tile.rows, case.tile.stored_cols),
    }
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in blocks and descriptors:
            signature[name] = f"tensordesc<{element}{list(blocks[name])}>"
        elif name in blocks or name.startswith("p_"):
            signature[name] = f"*{element}" if name in blocks else POINTERS.get(name, "*fp32")
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name in ALIGNED_SIZES:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*case.family.target), options=options)


# Machine code, by what it says about speed. SASS for NVIDIA, gfx assembly for AMD.
PATTERNS = {
    "wgmma": r"\bHGMMA|\bQGMMA",
    "tcgen05": r"\bUTC\w*MMA",
    "mma": r"\bHMMA",
    "mfma": r"\bv_mfma",
    "ffma": r"\bFFMA|\bv_fmac?_f32|\bv_pk_fma_f32",
    "tma load": r"\bUTMALDG",
    "tma store": r"\bUTMASTG",
    "cp.async": r"\bLDGSTS",
    "ex2": r"\bMUFU\.EX2|\bv_exp_f32",
    "shuffle": r"\bSHFL|\bds_bpermute|\bv_mov_b32_dpp|_dpp\b",
    "local": r"\bLDL|\bSTL|\bscratch_(load|store)",
    "load16": r"\bLDG\.\S*128|LDGSTS\S*128|\b(global|buffer)_load_dwordx4",
    "load8": r"\bLDG\.\S*64(?!\S*128)|LDGSTS\S*\.64|\b(global|buffer)_load_dwordx2",
    "load4": r"\bLDG\.E(?!\S*(128|64|U8|S8|U16|S16))|\b(global|buffer)_load_dword\b",
    "load1-2": r"\bLDG\.\S*(U8|S8|U16|S16)|\b(global|buffer)_load_(u|s)(byte|short)",
    "store16": r"\bSTG\.\S*128|\b(global|buffer)_store_dwordx4",
}


def inspect(case: Case) -> Report:
    """Compile and read the machine code."""
    compiled = build(case)
    if case.family.target[0] == "hip":
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            return int(found[1]) if found else 0

        registers, stack = field("vgpr_count"), field("private_segment_fixed_size")
        spills = field("vgpr_spill_count")  # scalar registers spill into vector registers, not into memory
    else:
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = run(tools / "cuobjdump", "-res-usage", cubin.name)
            text = run(tools / "nvdisasm", "-c", cubin.name)
        # ptxas's own frame: REG, STACK, LOCAL of the one function in the file
        registers, stack, spills = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL"))
    counts = Counter({name: len(re.findall(pattern, text)) for name, pattern in PATTERNS.items()})
    return Report(case, registers, stack, spills + counts["local"], compiled.metadata.shared, counts)


def run(tool: Path, *arguments: str) -> str:
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


COLUMNS = ("wgmma", "tcgen05", "mma", "mfma", "tma load", "tma store", "cp.async", "ex2", "shuffle", "load16", "load4")


def line(report: Report) -> str:
    case, tile, limit = report.case, report.case.tile, report.case.family.shared_memory // 1024
    shape = "" if case.kernel == "merge_partials" else f"{tile.rows}x{tile.cols}x{tile.d} w{tile.warps} s{tile.stages}"
    name = f"{case.family.name:7}{case.kernel:15}{case.type_name:7}{case.d:<5}{case.variant:13}{shape:21}"
    usage = f"{report.registers:4} {report.stack:5} {report.spills:6} {report.shared // 1024:6}/{limit} KB"
    counts = " ".join(f"{c} {report.instructions[c]}" for c in COLUMNS if report.instructions[c])
    return f"{name}{usage}  {counts}  {'; '.join(report.complaints()).upper()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", choices=GRID_FAMILIES, default=GRID_FAMILIES)
    parser.add_argument(
        "--dtype", nargs="*", choices=[str(t)[6:] for t in DTYPES], default=[str(t)[6:] for t in DTYPES]
    )
    parser.add_argument("--d", nargs="*", type=int, default=DIMENSIONS)
    options = parser.parse_args()
    dtypes = [getattr(torch, name) for name in options.dtype]
    print(
        f"{'family kernel         type D    variant      tile, warps, stages':68}regs stack spills shared      instructions"
    )
    failures = 0
    for case in cases(options.family, dtypes, sorted(options.d)):
        report = inspect(case)
        failures += bool(report.complaints())
        print(line(report), flush=True)
    print(f"{failures} kernel(s) with complaints")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
