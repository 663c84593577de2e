"""The gates and targets of a GPU session, each beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.cells import all_cells
from bench.gpu.context import Result, median

# On one GPU, bf16, forward and backward; milliseconds are an H100's. The floor of the first is 8 N^2 D at 790 TFLOP/s, 33.4 ms.
GATE_MS, GATE_SIGMOID_MS = 45.0, 33.0
FRACTION_OF_GEMM, SPEEDUP, SPEEDUP_OVER_INF_CL, EXTRA_MIB, FRACTION_OF_COPY = 0.70, 1.5, 5.0, 600e6 / 2**20, 0.80
DENSE = ("open_clip", "open_clip_compiled")


def targets(steps: Result, out: Path) -> list[Result]:
    """Each target with what was measured; `met` is None where it was not."""
    cells = all_cells(out)

    def rows(n: int, d: int, **others: Any) -> dict[str, Result]:
        return rows_of(cells, n, d, **others)

    ceilings = steps.get("ceilings", {}).get("result") or {}
    rate = ceilings.get("gemm", {}).get("tflops")
    found: list[Result] = []

    def add(name: str, value: float | None, goal: float, below: bool = False) -> None:
        met = None if value is None else value <= goal if below else value >= goal
        found.append({"target": name, "measured": value, "goal": goal, "met": met})

    large, sigmoid = rows(65_536, 768), rows(65_536, 768, loss="sigmoid")
    seconds = large.get("ours", {}).get("seconds")
    add("gate: N=65,536, D=768: ms", milliseconds(large), GATE_MS, below=True)
    add("gate: sigmoid, N=65,536, D=768: ms", milliseconds(sigmoid), GATE_SIGMOID_MS, below=True)
    for graph in (False, True):
        small, where = rows(2048, 512, graph=graph), ", CUDA graph" if graph else ""
        for peer in DENSE:
            add(f"gate: N=2,048, D=512{where}: over {peer}", over(small, (peer,)), 1.0)
    flops = 8 * 65_536**2 * 768
    add("N=65,536: part of cuBLAS bf16", flops / seconds / 1e12 / rate if seconds and rate else None, FRACTION_OF_GEMM)
    add("N=65,536: over the fastest peer", over(large), SPEEDUP)
    add("N=65,536, sigmoid: over the fastest peer", over(sigmoid), 1.0)
    add("N=65,536: over inf-cl", over(large, ("inf_cl",)), SPEEDUP_OVER_INF_CL)
    add("N=65,536: extra memory, MiB", large.get("ours", {}).get("extra_mib"), EXTRA_MIB, below=True)
    add("N=4,096: over the fastest peer", over(rows(4096, 768)), 1.0)
    add("N=1,048,576, D=512 runs: seconds", rows(2**20, 512).get("ours", {}).get("seconds"), math.inf, below=True)
    fields = ceilings.get("aggregate_fields", {})
    add("aggregate_fields, forward: part of copy", fields.get("forward_of_copy"), FRACTION_OF_COPY)
    add("aggregate_fields, both: part of copy", fields.get("forward_and_backward_of_copy"), FRACTION_OF_COPY)
    return found


def rows_of(
    cells: Iterable[Result], n: int, d: int, *, loss: str = "softmax", graph: bool = False, dtype: str = "bf16"
) -> dict[str, Result]:
    """{peer: {"seconds": median of forward and backward, "extra_mib", "over"}} of a case. `over` is how many times as fast ours
    was in the same turns. Where a case was measured in two steps, ours is as in the first."""
    rows: dict[str, Result] = {}
    wanted = {"n": n, "m": n, "d": d, "dtype": dtype, "loss": loss, "graph": graph, "passes": "both"}
    for cell in cells:
        if any(cell[name] != value for name, value in wanted.items()):
            continue
        if cell["seconds"]:
            row = {"seconds": median(cell["seconds"]), "extra_mib": cell.get("extra_mib")}
            rows[cell["peer"]] = {**row, **rows.get(cell["peer"], {})}
        for peer, ratio in (cell.get("over") or {}).items():
            rows.setdefault(peer, {}).setdefault("over", ratio)
    return rows


def milliseconds(rows: dict[str, Result]) -> float | None:
    seconds = rows.get("ours", {}).get("seconds")
    return 1e3 * seconds if seconds else None


def over(rows: dict[str, Result], peers: Sequence[str] | None = None) -> float | None:
    """How many times as fast as the fastest of these (None: of all) ours is, by ratios of the same turns."""
    found = [row["over"] for name, row in rows.items() if row.get("over") and (peers is None or name in peers)]
    return min(found, default=None)


def targets_table(found: Iterable[Result]) -> str:
    lines = [f"{'target':58}{'measured':>12}{'goal':>10}"]
    for row in found:
        value = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
        goal = "" if row["goal"] == math.inf else f"{row['goal']:.3g}"
        lines.append(f"{row['target']:58}{value:>12}{goal:>10}  {verdict}")
    return "\n".join(lines)
