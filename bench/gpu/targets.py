"""The targets of a GPU session, each beside what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.gpu.context import REAL, Result, median, read

# Targets: on one GPU, bf16, forward and backward.
FRACTION_OF_GEMM, SPEEDUP, SPEEDUP_OVER_INF_CL, EXTRA_MIB, FRACTION_OF_COPY = 0.70, 1.5, 5.0, 600e6 / 2**20, 0.80


def targets(steps: Result, out: Path) -> list[Result]:
    """Each target with what was measured; `met` is None where it was not."""

    def result(step: str) -> Result:
        return steps.get(step, {}).get("result") or {}

    large, small, huge = (bench_rows(out / f"{name}.json") for name in REAL.bench)
    rate = result("ceilings").get("gemm", {}).get("tflops")
    found: list[Result] = []

    def add(name: str, value: float | None, goal: float, below: bool = False) -> None:
        met = None if value is None else value <= goal if below else value >= goal
        found.append({"target": name, "measured": value, "goal": goal, "met": met})

    ours = large.get("ours", {})
    flops = 8 * 65_536**2 * 768
    seconds = ours.get("seconds")
    add("N=65,536: part of cuBLAS bf16", flops / seconds / 1e12 / rate if seconds and rate else None, FRACTION_OF_GEMM)
    add("N=65,536: over the fastest peer", over_fastest(large), SPEEDUP)
    inf_cl = next((row["seconds"] for peer, row in large.items() if peer.replace("-", "_").startswith("inf_cl")), None)
    add("N=65,536: over inf-cl", inf_cl / seconds if inf_cl and seconds else None, SPEEDUP_OVER_INF_CL)
    add("N=65,536: extra memory, MiB", ours.get("extra_mib"), EXTRA_MIB, below=True)
    add("N=4,096: over the fastest peer", over_fastest(small), 1.0)
    add("N=1,048,576, D=512 runs: seconds", huge.get("ours", {}).get("seconds"), float("inf"), below=True)
    fields = result("ceilings").get("aggregate_fields", {})
    add("aggregate_fields, forward: part of copy", fields.get("forward_of_copy"), FRACTION_OF_COPY)
    add("aggregate_fields, both: part of copy", fields.get("forward_and_backward_of_copy"), FRACTION_OF_COPY)
    return found


def over_fastest(rows: dict[str, Result]) -> float | None:
    peers = [row["seconds"] for name, row in rows.items() if name != "ours" and row.get("seconds")]
    ours = rows.get("ours", {}).get("seconds")
    return min(peers) / ours if peers and ours else None


def bench_rows(path: Path) -> dict[str, Result]:
    """{peer: {"seconds": median of forward and backward, "extra_mib"}} of a result file of `python -m bench`."""
    rows: dict[str, Result] = {}
    for cell in read(path).get("cells", []):
        if cell.get("seconds") and cell["passes"] == "both":
            rows[cell["peer"]] = {"seconds": median(cell["seconds"]), "extra_mib": cell.get("extra_mib")}
    return rows


def targets_table(found: Iterable[Result]) -> str:
    lines = [f"{'target':44}{'measured':>12}{'goal':>10}"]
    for row in found:
        value = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
        goal = "" if row["goal"] == float("inf") else f"{row['goal']:.3g}"
        lines.append(f"{row['target']:44}{value:>12}{goal:>10}  {verdict}")
    return "\n".join(lines)
