"""Tables and figures from result files: `python -m bench.report`.

Reads every `bench/results/*.json` that `python -m bench` wrote, draws a figure beside each, and writes `bench/README.md`
and the figures of the project's README. Nothing in them is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import SMALL_N, Case
from gcl_kernels import plan

RESULTS = Path(__file__).parent / "results"
BENCH_README = Path(__file__).parent / "README.md"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: bench.report -->", "<!-- end figures -->"
CURVES = "cpu-curves.json"  # what the project's README shows

Cell = dict[str, Any]


def name_of(peer: str) -> str:
    return NAMES.get(peer, peer)


NAMES = {
    "ours": "gcl_kernels",
    "open_clip": "open_clip.ClipLoss",
    "open_clip_compiled": "open_clip.ClipLoss, compiled",
    "dense": "the formula in PyTorch",
    "linear_cross_entropy": "F.linear_cross_entropy",
    "linear_cross_entropy_chunked": "F.linear_cross_entropy, chunked",
    "cut_cross_entropy": "cut-cross-entropy",
    "liger": "Liger",
    "inf_cl": "inf-cl",
    "sentence_transformers": "sentence-transformers",
    "memeff": "memeff",
    "siglip_kernel": "siglip-kernel",
}
COLOURS = {
    "ours": "#0b6e4f", "open_clip": "#b23a48", "open_clip_compiled": "#e07a5f", "linear_cross_entropy": "#3d5a80",
    "dense": "#7f7f7f", "linear_cross_entropy_chunked": "#98c1d9",
    "cut_cross_entropy": "#8d6a9f", "liger": "#d4a017", "inf_cl": "#5c5c5c", "sentence_transformers": "#81b29a",
    "memeff": "#bc6c25", "siglip_kernel": "#606c38",
}  # fmt: skip
FLOOR = "6 N²D at the run's GEMM rate (model)"  # the least of an exact loss, with every exponential kept


def read(path: Path) -> dict[str, Any]:
    """The result file; no cells where there is none yet."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {"cells": []}


def case_of(cell: Cell) -> Case:
    return Case(**{name: cell[name] for name in Case.__dataclass_fields__ if name in cell})


def median(cell: Cell) -> float:
    return statistics.median(cell["seconds"])


def spread(cell: Cell) -> str:
    """Least and greatest of the turns over their median; of a step that was measured once, nothing."""
    if len(cell["seconds"]) == 1:
        return ""
    low, high = min(cell["seconds"]) / median(cell), max(cell["seconds"]) / median(cell)
    return f"{low - 1:+.0%} {high - 1:+.0%}"


def rate(cell: Cell) -> str:
    """Of the GEMM's; a step that was measured once has none, having had no turn beside one."""
    return f"{cell['of_gemm']:.0%}" if "of_gemm" in cell else ""


# Tables.


def table(cells: Sequence[Cell], title: str) -> str:
    """One case as Markdown: a row for each loss."""
    ours = next((c for c in cells if c["peer"] == "ours"), {})
    ratios = ours.get("over") or {}
    lines = [
        f"**{title}**", "",
        "| | time | spread | TFLOP/s | of GEMM | ours is faster by | extra memory | error: loss | lhs | rhs | scale |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for cell in cells:
        name = name_of(cell["peer"])
        if cell["seconds"] is None:
            lines.append(f"| {name} | {cell['reason']} |" + " |" * 9)
            continue
        error = cell.get("error") or {}
        lines.append(
            "| " + " | ".join([
                name, plan.duration(median(cell)), spread(cell), f"{cell['tflops']:.3g}", rate(cell),
                f"{ratios[cell['peer']]:.2f}x" if cell["peer"] in ratios else "",
                f"{cell['extra_mib']:,.0f} MiB" if cell.get("extra_mib") is not None else "",
                *(f"{error[k]:.1e}" if k in error else "" for k in ("loss", "lhs", "rhs", "logit_scale")),
            ]) + " |"
        )  # fmt: skip
    return "\n".join([*lines, ""])


def where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    chip = machine.get("gpu") or f"{machine['threads']} threads of {machine['cpu']} ({machine['capability']})"
    return f"{chip}, torch {machine['torch']}"


def about(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{NAMES[k]} {v}" for k, v in result["versions"].items() if v and k != "open_clip_compiled")
    return f"Measured on {result['date']}: {where(result)}. {versions}."


def measured() -> dict[str, dict[str, Any]]:
    """{file: what `python -m bench` wrote there}."""
    results = {path.name: read(path) for path in sorted(RESULTS.glob("*.json"))}
    return {name: result for name, result in results.items() if result.get("cells")}


def grouped(cells: Iterable[Cell]) -> dict[Case, list[Cell]]:
    groups: dict[Case, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(case_of(cell), []).append(cell)
    return groups


def bench_readme(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Benchmarks", "",
        "Generated by `python -m bench.report` from the result files in [results](results).", "",
        "    make bench     # ours beside its peers, 5 minutes on 2 cores; then this page",
        "    make curves    # the scaling curves; a quarter of an hour on 2 cores",
        "    python -m bench --help", "",
        "On a GPU: `python -m bench.gpu` measures everything in calls of nine minutes; [gpu](gpu/README.md) says what and how.",
        "",
        "Ours and its peers take turns in one process, with a matrix product between them. A time is the median over turns; a "
        "ratio is the median of each turn's ratio. A step of over 20 seconds is measured once and has no rate. TFLOP/s count the "
        "least work without N x M memory: 8 N M D floating-point operations for both directions, 6 for one, 2 for a forward "
        "alone. On a CPU, ours does fewer if its workspace holds exponentials from the forward to the backward; the dense losses "
        "do 12. A rate above the GEMM's is possible, because fewer operations were done than are counted; it is not the speed of "
        "the products themselves. Extra memory is the peak over inputs and gradients; on a CPU it is measured in a fresh "
        "process. Errors are relative to float64, by norm.",
        "",
    ]  # fmt: skip
    for name, result in results.items():
        stem = Path(name).stem
        lines += [
            f"## {stem}",
            "",
            about(result),
            "",
            *[f"![{stem}](results/{stem}.png)", ""] * (RESULTS / f"{stem}.png").exists(),
        ]
        for case, cells in grouped(result["cells"]).items():
            lines.append(table(cells, case.title))
    return "\n".join(lines)


def scaling(cells: Iterable[Cell]) -> list[Cell]:
    """The cells of the curve over N: those of the commonest shape otherwise."""
    cells = [
        c for c in cells if c["seconds"] and c["n"] == c["m"] and c["passes"] == "both" and c["directions"] == "both"
    ]
    key = lambda c: (c["d"], c["dtype"], c["fields"], c["ids"], c["draw"], c["logit_scale"])  # noqa: E731
    if not cells:
        return []
    common = statistics.mode(key(c) for c in cells)
    return sorted((c for c in cells if key(c) == common), key=lambda c: c["n"])


def work(case: Case) -> float:
    """FLOPs of our two-direction step on a CPU, in units of N M D: what is stored is not made again."""
    problem = plan.Sizes(case.n, case.m, case.d, case.dtype)
    return 8 - 2 * plan.stored_tiles(problem) / plan.tile_count(problem)


def readme_table(result: dict[str, Any]) -> str:
    cells = scaling(result["cells"])
    case = case_of(cells[0])
    lines = [
        f"{about(result)} D = {case.d}, {case.dtype}, {case.draw} embeddings, logit_scale {case.logit_scale:g}, forward and "
        "backward; both losses and a matrix product take turns in one process "
        f"([{CURVES}](bench/results/{CURVES}), more in [bench](bench/README.md)).",
        "",
        "| N | ours | `open_clip.ClipLoss` | faster | work | of the GEMM rate | extra memory, ours | `open_clip` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    slower = []
    for n in dict.fromkeys(c["n"] for c in cells):
        ours, dense = (next((c for c in cells if c["n"] == n and c["peer"] == p), None) for p in ("ours", "open_clip"))
        if ours is None:
            continue
        memory = [f"{c['extra_mib']:,.0f} MiB" if c else "" for c in (ours, dense)]
        faster = ours["over"]["open_clip"] if dense else None
        slower += [n] if faster is not None and faster < 1 else []
        lines.append(
            f"| {n:,} | {plan.duration(median(ours))} | {plan.duration(median(dense)) if dense else 'not run'} | "
            f"{'' if faster is None else f'{faster:.2f}x'} | {work(case_of(ours)):.1f} N²D | "
            f"{rate(ours)} | {memory[0]} | {memory[1]} |"
        )
    lines += [
        "",
        "*Work* is the number of floating-point operations in units of N²D: 6 if the workspace holds all exponentials from one "
        "pass to the next, 8 if it holds none. *Of the GEMM rate* always counts 8 N²D, so it can exceed 100% where fewer were "
        "needed. A step of over 20 seconds was measured once and has no rate."
        + (f" At N = {' and '.join(map(str, slower))} `open_clip.ClipLoss` is faster." if slower else ""),
    ]
    return "\n".join(lines)


def with_figures(readme: str, result: dict[str, Any]) -> str:
    """The project's README with the table of this result."""
    before, begin, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{readme_table(result)}\n{END}{after}" if begin else readme


# Figures.


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [c for c in result["cells"] if c["seconds"]]
    panels = [
        panel
        for panel in (time_over_n, memory_over_n, small_batches, over_d, over_fields, variants)
        if panel(cells, None)
    ]
    if not panels:
        return  # no curve: the tables are all there is
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.9 * rows), layout="constrained", squeeze=False)
    for panel, axis in zip(panels, axes.flat, strict=False):
        panel(cells, axis)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    case = case_of((scaling(cells) or cells)[0])
    figure.suptitle(
        f"Measured (circles): {where(result)}; D = {case.d} unless said, {case.dtype}, {case.draw}, "
        f"logit_scale {case.logit_scale:g}",
        fontsize=10,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def lines_by_peer(cells: Sequence[Cell], x: str, value, axis) -> None:
    for peer in dict.fromkeys(c["peer"] for c in cells):
        rows = sorted((c for c in cells if c["peer"] == peer), key=lambda c: c[x])
        curve(axis, peer, [c[x] for c in rows], [value(c) for c in rows])


def curve(axis, peer: str, x: Sequence[float], y: Sequence[float]) -> None:
    axis.plot(x, y, "o-", ms=4, color=COLOURS.get(peer, "#000000"), label=name_of(peer))


def floor(cells: Sequence[Cell], x: str, axis) -> None:
    """The model's seconds, see `FLOOR`."""
    ours = [c for c in cells if c["peer"] == "ours"]
    seconds = [6 * c["n"] * c["m"] * c["d"] / (1e12 * c["gemm_tflops"]) for c in ours]
    axis.plot([c[x] for c in ours], seconds, ":", color="grey", label=FLOOR)


def batch_axis(axis, ns: Sequence[int]) -> None:
    from matplotlib.ticker import NullFormatter

    axis.set_xscale("log")
    ticks = [n for n in (64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576) if min(ns) <= n <= max(ns)]
    axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("batch size N")


def time_over_n(cells, axis) -> bool:
    cells = scaling(cells)
    if axis is not None:
        lines_by_peer(cells, "n", median, axis)
        floor(cells, "n", axis)
        batch_axis(axis, [c["n"] for c in cells])
        axis.set(yscale="log", ylabel="seconds", title="Forward and backward")
        axis.legend(frameon=False, fontsize=8)
    return len({c["n"] for c in cells}) > 1


def memory_over_n(cells, axis) -> bool:
    cells = [c for c in scaling(cells) if c.get("extra_mib") and c["extra_mib"] >= 1]
    if axis is not None:
        lines_by_peer(cells, "n", lambda c: c["extra_mib"], axis)
        batch_axis(axis, [c["n"] for c in cells])
        axis.set(yscale="log", ylabel="MiB", title="Extra peak memory over inputs and gradients")
        axis.legend(frameon=False, fontsize=8)
    return len({c["n"] for c in cells}) > 1


def small_batches(cells, axis) -> bool:
    cells = [c for c in scaling(cells) if c["peer"] == "ours" and c["n"] in SMALL_N and c.get("over")]
    if axis is not None:
        peers = dict.fromkeys(p for c in cells for p in c["over"])
        for peer in peers:
            rows = [c for c in cells if peer in c["over"]]
            curve(axis, peer, [c["n"] for c in rows], [c["over"][peer] for c in rows])
        axis.axhline(1, color="grey", lw=1)
        batch_axis(axis, [c["n"] for c in cells])
        axis.set(ylim=(0, None), ylabel="times as fast as", title="Small batches")
        axis.legend(frameon=False, fontsize=8)
    return len(cells) > 1


def varying(cells, name: str) -> list[Cell]:
    """Cells that differ from the curve over N in this alone, at the N where there are most of them."""
    base = scaling(cells)
    if not base:
        return []
    usual = case_of(base[0])
    others = [k for k in Case.__dataclass_fields__ if k not in (name, "n", "m")]
    found = [c for c in cells if all(c[k] == getattr(usual, k) for k in others)]
    odd = [c for c in found if c[name] != getattr(usual, name)]
    if not odd:
        return []
    n = statistics.mode(c["n"] for c in odd)
    return sorted((c for c in found if c["n"] == n), key=lambda c: c[name])


def over_d(cells, axis) -> bool:
    cells = varying(cells, "d")
    if axis is not None:
        lines_by_peer(cells, "d", median, axis)
        floor(cells, "d", axis)
        axis.set(xlabel="D", ylabel="seconds", title=f"Dimension, N = {cells[0]['n']:,}", ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    return len(cells) > 1


def over_fields(cells, axis) -> bool:
    cells = varying(cells, "fields")
    if axis is not None:
        lines_by_peer([c for c in cells if c["peer"] in ("ours", "dense")], "fields", median, axis)
        axis.legend(frameon=False, fontsize=8)
        axis.set(
            xlabel="fields of a document", ylabel="seconds", title=f"Fields, N = {cells[0]['n']:,}", ylim=(0, None)
        )
    return len(cells) > 1


def variants(cells, axis) -> bool:
    """Ours with one thing changed, over ours as it is, each in the time of its own run's matrix product."""
    base = scaling(cells)
    changed = [(k, varying(cells, k)) for k in ("ids", "directions", "passes", "dtype", "logit_scale")]
    bars: dict[str, float] = {}
    for name, found in changed:
        ours = [c for c in found if c["peer"] == "ours"]
        usual = next((c for c in ours if c[name] == base[0][name]), None)
        for c in ours:
            if usual is not None and c is not usual:
                label = {
                    "ids": "ids mask false negatives",
                    "directions": "one direction",
                    "passes": "forward alone",
                    "logit_scale": f"logit_scale {c['logit_scale']:g}",
                }.get(name, str(c[name]))
                bars[label] = median(c) * c["gemm_tflops"] / (median(usual) * usual["gemm_tflops"])
    if axis is not None:
        axis.barh(list(bars), list(bars.values()), color=COLOURS["ours"])
        axis.axvline(1, color="grey", lw=1)
        axis.set(xlabel="time over the plain step's, each at its run's GEMM rate", title="Options, ours")
    return bool(bars)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = measured()
    for name, result in results.items():
        draw(result, (RESULTS / name).with_suffix(".png"))
    BENCH_README.write_text(bench_readme(results))
    if CURVES in results:
        README.write_text(with_figures(README.read_text(), results[CURVES]))
    print(f"tables: {BENCH_README}, figures: {RESULTS}/*.png")


if __name__ == "__main__":
    main()
