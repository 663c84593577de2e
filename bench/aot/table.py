"""The table of what was compiled, one line a case, in `bench/results/aot.txt`."""

from __future__ import annotations

from pathlib import Path

import triton

from bench.aot.grid import DIMENSIONS, DTYPES, GRID_FAMILIES, Case, cases
from bench.aot.machine_code import Report

RESULT = Path(__file__).parents[1] / "results/aot.txt"

TITLE_WIDTH = 7 + 19 + 7 + 5 + 15
COLUMNS = (
    *("wgmma", "tcgen05", "mma", "mfma", "ffma", "tma load", "tma store", "cp.async", "ex2", "shuffle"),
    *("load16", "load8", "load4", "load1-2", "store16"),
)

HEADER = f"{'family kernel             type   D    variant        launched as':76}regs stack spills shared        instructions"


def title(case: Case) -> str:
    """The columns that say which case a row is of; `TITLE_WIDTH` characters."""
    return f"{case.family.name:7}{case.kernel:19}{case.type_name:7}{case.d:<5}{case.variant:15}"


def line(report: Report) -> str:
    case, limit, ratio = report.case, report.case.family.shared_memory // 1024, report.integer_ratio
    usage = f"{report.registers:4} {report.stack:5} {report.spills:6} {report.shared // 1024:6}/{limit:<3} KB"
    counts = [f"{c} {report.instructions[c]}" for c in COLUMNS if report.instructions[c]]
    counts += [] if ratio is None else [f"(loop: {ratio:.1f} integer a product)"]
    complaints = "; ".join(report.complaints()).upper()
    return f"{title(case)}{case.shape:23}{usage}  {', '.join(counts)}  {complaints}".rstrip()


def save(lines: dict[str, str]) -> None:
    """Renew these rows of the table, by their titles; rows whose case is no longer in the grid go."""
    known = {old[:TITLE_WIDTH]: old for old in RESULT.read_text().splitlines()} if RESULT.exists() else {}
    known |= lines
    rows = [known[title(case)] for case in cases(GRID_FAMILIES, DTYPES, DIMENSIONS) if title(case) in known]
    note = (
        f"# python -m bench.aot, triton {triton.__version__}. Compiled ahead of time and read; nothing here was run.\n"
    )
    RESULT.write_text("\n".join([note + HEADER, *rows]) + "\n")
