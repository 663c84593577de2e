"""Reads what a kernel was compiled to: SASS for NVIDIA, gfx assembly for AMD."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from bench.aot.compiling import build
from bench.aot.grid import Case


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
            narrow = counts["load8"] + (0 if self.case.field_options["mask"] else counts["load1-2"])
            if narrow or not counts["load16"]:
                found.append("narrow loads")
        return found

    @property
    def integer_ratio(self) -> float | None:
        """Integer instructions for each matrix (multiply-add, without matrix units) instruction of the loop over D."""
        products = sum(self.loop[name] for name in ("tcgen05", "wgmma", "mfma", "mma", "ffma"))
        return self.loop["integer"] / products if products else None


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
