"""What the kernels compile to, without a GPU: ``python -m bench.aot [--family sm_90] [--dtype bfloat16] [--d 768]``.

Every kernel of the configuration table is compiled ahead of time, for chips that need not be present, and its machine code is
read: registers, stack frame, spills, shared memory against the chip's limit, matrix and copy instructions, access widths, and
how many integer instructions the loop over D spends on each matrix instruction. Exits with 1 where a default configuration
spills, needs a stack frame, does not fit, misses the chip's matrix, copy or exponential unit, or reads in narrow pieces.

The table goes to ``bench/results/aot.txt``; a run over a part of the grid renews its part.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gcl_kernels.backends.triton import field_kernels, fields, kernels, operands, partials, softmax
from gcl_kernels.backends.triton.config import FAMILIES, Config, Family, TileShape, row_block

RESULT = Path(__file__).parent / "results/aot.txt"

DIMENSIONS = (64, 256, 512, 768, 1024, 1280)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRID_FAMILIES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# What ``operands.input_precision`` may ask of float32 products.
PRECISIONS = {"cuda": ("ieee", "tf32", "tf32x3"), "hip": ("ieee", "bf16x3")}

# The options that change machine code; the first is what CLIP training runs, and what has to be free of spills on every chip.
FORWARD_OPTIONS = {"LABELS": 0, "CHANNELS": 0, "WANT_ROW": True, "WANT_COL": True, "KEEP": False}
BACKWARD_OPTIONS = {"LABELS": 0, "CHANNELS": 0, "HAS_ROW": True, "HAS_COL": True}
VARIANTS = {
    "": {},
    "labels": {"LABELS": 1},
    "ids": {"CHANNELS": 1},
    "3 labels": {"LABELS": 3},
    "ids+labels": {"LABELS": 3, "CHANNELS": 2},
    "rows only": {"WANT_COL": False, "HAS_COL": False},
    "columns only": {"WANT_ROW": False, "HAS_ROW": False},
    "rows kept": {"WANT_COL": False, "KEEP": True},  # of the forward: one direction in one pass
    "columns kept": {"WANT_ROW": False, "KEEP": True},
    "ids kept": {"WANT_COL": False, "KEEP": True, "CHANNELS": 1},
    "D tail": {"WHOLE_D": False},
}

# Of the field kernels. An odd D is the slow path: rows that start anywhere are read a number at a time.
FIELD_OPTIONS = {"n_fields": 2, "HAS_MASK": False, "NORMALIZE_FIELDS": True, "NORMALIZE": True, "aligned": True}
FIELD_VARIANTS = {
    "": {},
    "1 field": {"n_fields": 1},
    "4 fields": {"n_fields": 4},
    "8 fields": {"n_fields": 8},
    "mask": {"HAS_MASK": True},
    "as given": {"NORMALIZE_FIELDS": False, "NORMALIZE": False},
    "odd D": {"aligned": False},
}

POINTERS = {"p_labels": "*i32", "p_total": "*fp64", "p_skip": "*i32"}


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
    def of_tiles(self) -> bool:
        return self.kernel in ("forward_tile", "backward_tile")

    @property
    def of_fields(self) -> bool:
        return self.kernel.startswith("aggregate")

    @property
    def tile(self) -> TileShape:
        options = VARIANTS[self.variant]
        masked = options.get("CHANNELS", 0) > 0 or options.get("LABELS", 0) > 1
        return self.config.tile(self.kernel == "backward_tile", masked, stored="kept" in self.variant)

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
        return f"{partials.MERGE_TILES}x{partials.MERGE_LINES} w4"

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
    loop: Counter[str]  # those of the loop over D, of them also "integer"

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
        counts = self.instructions
        if self.case.of_tiles:
            expected = {"sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
            if half and self.matrix != expected[family.name]:
                found.append(f"{self.matrix} instead of {expected[family.name]}")
            if half and family.name in ("sm_90", "sm_100") and not counts["tma load"]:
                found.append("no TMA load")
            if not counts["ex2"]:
                found.append("exponentials not on the special-function unit")
            if counts["cp.async"] > counts["load16"]:
                found.append("copies of less than 16 bytes")
            if counts["load1-2"]:
                found.append(f"{counts['load1-2']} loads of 1 or 2 bytes")
        if self.case.of_fields and self.case.field_options["aligned"]:
            # loads of one byte are the mask's, of four the norms'
            narrow = counts["load8"] + (0 if self.case.field_options["HAS_MASK"] else counts["load1-2"])
            if narrow or not counts["load16"]:
                found.append("narrow loads")
        return found

    @property
    def integer_ratio(self) -> float | None:
        """Integer instructions for each matrix (multiply-add, without matrix units) instruction of the loop over D."""
        products = sum(self.loop[name] for name in ("tcgen05", "wgmma", "mfma", "mma", "ffma"))
        return self.loop["integer"] / products if products else None


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
                            yield from (
                                replace(case, variant=v)
                                for v in VARIANTS
                                if v and (kernel == "forward_tile" or "kept" not in v)
                            )
            for kernel in ("aggregate_forward", "aggregate_backward"):
                yield from (Case(family, kernel, dtype, d) for d in dimensions)
                yield from (Case(family, kernel, dtype, dimensions[-1], v) for v in FIELD_VARIANTS if v)


def same_code(case: Case) -> Case:
    """The case with the smallest D that compiles to the same machine code: D is an argument; its configuration, and whether it
    is whole steps (a block of the field kernels: its next power of two), are not."""

    def compiled_in(d: int) -> Any:
        other = replace(case, d=d)
        return (other.config, d % other.tile.d == 0) if case.of_tiles else other.shape

    return replace(case, d=next((d for d in DIMENSIONS if compiled_in(d) == compiled_in(case.d)), case.d))


def build(case: Case) -> triton.compiler.CompiledKernel:
    """Compile one kernel as ``launch`` and ``fields`` would launch it."""
    kernel = getattr(field_kernels if case.of_fields else kernels, case.kernel)
    if case.of_fields:
        types, constants = field_arguments(case)
    elif case.of_tiles:
        types, constants = tile_arguments(case)
    else:
        types, constants = (
            {},
            {"BLOCK_TILES": partials.MERGE_TILES, "BLOCK_LINES": partials.MERGE_LINES, "num_warps": 4},
        )
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    signature, attributes = {}, {}
    literals: dict[Any, Any] = dict(constants)

    def declare(kind: Any, path: tuple[int, ...]) -> Any:
        """The compiler's word for an argument's type, which is "type", "type:16" (a multiple of 16), "type:1" (always 1),
        None (the argument is None), or a tuple of them."""
        if kind is None:
            literals[path] = None
            return "constexpr"
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
    tile, backward, element = case.tile, case.kernel == "backward_tile", TYPE_NAMES[case.dtype]
    options = {**(BACKWARD_OPTIONS if backward else FORWARD_OPTIONS), **VARIANTS[case.variant]}
    descriptors = case.config.descriptors

    def matrix(rows: int, cols: int) -> str:
        return f"tensordesc<{element}[{rows}, {cols}]>" if descriptors else f"*{element}:16"

    pointer, ids = "*fp32:16", (("*i32:16", "*i32:16"),) * options["CHANNELS"]
    types = {
        "lhs": matrix(tile.rows, tile.d),
        "rhs": matrix(tile.cols, tile.d),
        "strides": ("i32:16", "i32:16", "i32:16"),
        "scale": (pointer, pointer if case.dtype == torch.float32 else None),
        "terms": (ids or None,),
        "d": "i32:16",
    }
    constants = {
        **operands.tile_constants(tile, case.d),
        "PRECISION": case.precision,
        "LABELS": max(options["LABELS"], 1),
    }
    if "WHOLE_D" in options:
        constants["WHOLE_D"] = options["WHOLE_D"]
    if not options["LABELS"]:
        types["p_labels"] = None
    if backward:
        both = options["HAS_ROW"] and options["HAS_COL"]
        line = (pointer, "i32:16")
        types["gradient"] = matrix(tile.rows, tile.stored_cols)
        types["lines"] = (
            line if options["HAS_ROW"] else None,
            line if options["HAS_COL"] else None,
            pointer if both else None,
        )
        constants["FITS"] = softmax.one_exponential_is_exact if both and tile.one_exponential else None
        constants["GRADIENT"] = softmax.gradient
        constants["HALVES"] = tile.halves
    else:
        rows, columns, stored = options["WANT_ROW"], options["WANT_COL"], options["KEEP"]
        if rows and columns:
            epilogue = "both_by_one_exponential" if tile.one_exponential else "both_by_two"
        else:
            epilogue = ("rows" if rows else "columns") + ("_stored" if stored else "")
        types["out"] = (pointer,) * (4 if rows and columns else 3 if stored else 2)
        types["stored"] = matrix(tile.rows, tile.stored_cols) if stored else None
        if not stored:
            types["p_skip"] = None
        constants["EPILOGUE"] = getattr(softmax, epilogue)
        constants["HALVES"] = stored and tile.halves
    return types, constants


def field_arguments(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    options, hint = case.field_options, ":16" if case.field_options["aligned"] else ""
    n_fields, element = options["n_fields"], TYPE_NAMES[case.dtype]
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
    "integer": r"\b(IADD3|IMAD|LEA|ISETP|LOP3|SHF|IADD|VIADD)\b|\bv_(add|lshl|lshlrev|mad|mul|and|or|xor)\w*_[iub]\d+",
}


def count(text: str) -> Counter[str]:
    return Counter({name: len(re.findall(pattern, text)) for name, pattern in PATTERNS.items()})


def loop_over_d(text: str) -> str:
    """The first innermost loop that multiplies: what lies between a label and a branch back to it."""
    places = {m[1]: m.end() for m in re.finditer(r"^(\.L\w+):", text, re.MULTILINE)}
    jumps = re.finditer(r"(?:BRA\S*|s_cbranch_\w+)\s[^\n]*?(\.L\w+)", text)
    loops = [text[places[m[1]] : m.start()] for m in jumps if m[1] in places and places[m[1]] < m.start()]
    multiplying = [code for code in loops if any(count(code)[k] for k in ("tcgen05", "wgmma", "mfma", "mma", "ffma"))]
    return min(multiplying, key=len, default="")


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
    counts = count(text)
    loop = count(loop_over_d(text)) if case.of_tiles else Counter()
    return Report(case, registers, stack, spills + counts["local"], compiled.metadata.shared, counts, loop)


def run(tool: Path, *arguments: str) -> str:
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout


COLUMNS = (
    *("wgmma", "tcgen05", "mma", "mfma", "ffma", "tma load", "tma store", "cp.async", "ex2", "shuffle"),
    *("load16", "load8", "load4", "load1-2", "store16"),
)
HEADER = (
    f"{'family kernel             type   D    variant      launched as':74}regs stack spills shared        instructions"
)


def title(case: Case) -> str:
    return f"{case.family.name:7}{case.kernel:19}{case.type_name:7}{case.d:<5}{case.variant:13}"


def line(report: Report) -> str:
    case, limit, ratio = report.case, report.case.family.shared_memory // 1024, report.integer_ratio
    usage = f"{report.registers:4} {report.stack:5} {report.spills:6} {report.shared // 1024:6}/{limit:<3} KB"
    counts = [f"{c} {report.instructions[c]}" for c in COLUMNS if report.instructions[c]]
    counts += [] if ratio is None else [f"(loop: {ratio:.1f} integer a product)"]
    complaints = "; ".join(report.complaints()).upper()
    return f"{title(case)}{case.shape:23}{usage}  {', '.join(counts)}  {complaints}".rstrip()


def save(lines: dict[str, str]) -> None:
    """Renew these rows of the table, by their titles; rows whose case is no longer in the grid go."""
    known = {old[: len(title(NOTHING))]: old for old in RESULT.read_text().splitlines()} if RESULT.exists() else {}
    known |= lines
    rows = [known[title(case)] for case in cases(GRID_FAMILIES, DTYPES, DIMENSIONS) if title(case) in known]
    note = (
        f"# python -m bench.aot, triton {triton.__version__}. Compiled ahead of time and read; nothing here was run.\n"
    )
    RESULT.write_text("\n".join([note + HEADER, *rows]) + "\n")


NOTHING = Case(FAMILIES["sm_80"], "merge_partials", torch.float32, DIMENSIONS[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", choices=GRID_FAMILIES, default=GRID_FAMILIES)
    parser.add_argument(
        "--dtype", nargs="*", choices=[str(t)[6:] for t in DTYPES], default=[str(t)[6:] for t in DTYPES]
    )
    parser.add_argument("--d", nargs="*", type=int, default=DIMENSIONS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    grid: dict[Case, list[Case]] = {}
    for case in cases(options.family, [getattr(torch, name) for name in options.dtype], sorted(options.d)):
        grid.setdefault(same_code(case), []).append(case)
    tqdm.write(HEADER)
    failures, lines = 0, {}
    with ProcessPoolExecutor(options.processes) as pool:
        for compiled, report in tqdm(zip(grid, pool.map(inspect, grid), strict=True), total=len(grid), unit="kernel"):
            for case in grid[compiled]:
                lines[title(case)] = line(replace(report, case=case))
                failures += bool(report.complaints())
                tqdm.write(lines[title(case)])
            save(lines)
    print(f"{failures} kernel(s) with complaints")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
