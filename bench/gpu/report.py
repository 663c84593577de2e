"""What a session measured beside what was predicted, as Markdown: `python -m bench.gpu.report RESULTS`.

Written to RESULTS/report.md after each step as well. With `--plot FILE` the curves over N are drawn too, predicted as lines.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.gpu.cells import all_cells
from bench.gpu.context import Result, median, read
from bench.gpu.targets import targets_table
from gcl_kernels.plan import LABEL

Key = tuple[int, int, str, str, bool]


def key_of(entry: Result) -> Key:
    return entry["n"], entry["d"], entry["dtype"], entry["loss"], entry.get("graph", False)


def predicted_ms(plan: Result, graph: bool) -> float:
    """Of a CUDA graph the device's time; of an eager step, from idle to idle, the slower of host and device."""
    return plan["device_ms"] if graph else max(plan["device_ms"], plan["host_ms"])


def rows(summary: Result, out: Path) -> list[Result]:
    """A row a cell: what was measured, in ms, and what was predicted."""
    steps = summary.get("steps", {})
    predictions = {key_of(p): p for p in (steps.get("machine", {}).get("result") or {}).get("predictions", [])}
    found = []
    for cell in all_cells(out):
        prediction = predictions.get(key_of(cell), {})
        plan = prediction.get("plans", {}).get(cell["peer"])
        found.append(
            {
                "key": key_of(cell),
                "peer": cell["peer"],
                "reason": cell["reason"],
                "seconds": cell["seconds"],
                "predicted_ms": predicted_ms(plan, cell.get("graph", False)) if plan else None,
                "floor_ms": prediction.get("floor_ms"),
                "extra_mib": cell.get("extra_mib"),
                "predicted_mib": plan["extra_memory_mib"] if plan else None,
                "error": cell.get("error") or {},
            }
        )
    return found


def text(summary: Result, out: Path) -> str:
    steps = summary.get("steps", {})
    machine = (steps.get("machine", {}) or {}).get("result") or {}
    warning = ["**A dry run on a CPU: its figures mean nothing.**", ""] if summary.get("dry_run") else []
    return "\n".join(
        [
            f"# GPU session: {machine.get('gpu', 'no machine')}",
            "",
            *warning,
            "| step | status | seconds |",
            "|---|---|---|",
            *(f"| {name} | {step['status']} | {step['seconds']} |" for name, step in steps.items()),
            "",
            "## Gates and targets",
            "",
            "```",
            targets_table(summary.get("targets", [])),
            "```",
            "",
            "## Predicted and measured",
            "",
            f"Predictions: {LABEL.lower()}, written before the first measurement. Times in ms, forward and backward.",
            "",
            *cell_table(rows(summary, out)),
            "",
            *tile_table(steps),
        ]
    )


def cell_table(found: Iterable[Result]) -> list[str]:
    lines = [
        "| N | D | dtype | loss | how | who | floor | predicted | median | minimum | spread | measured / predicted "
        "| MiB predicted | MiB | greatest error |",
        "|" + "---|" * 15,
    ]
    for row in sorted(found, key=lambda row: (row["key"][3], row["key"][1:3], row["key"][0], row["key"][4])):
        n, d, dtype, loss, graph = row["key"]
        head = f"| {n:,} | {d} | {dtype} | {loss} | {'graph' if graph else 'eager'} | {row['peer']} |"
        if not row["seconds"]:
            lines.append(f"{head} {row['reason']} |" + " |" * 8)
            continue
        times = [1e3 * seconds for seconds in row["seconds"]]
        middle, model = median(times), row["predicted_ms"]
        errors = [value for name, value in row["error"].items() if name != "sampled lines"]
        cells = [
            number(row["floor_ms"]),
            number(model),
            number(middle),
            number(min(times)),
            f"{(max(times) - min(times)) / middle:.0%}",
            f"{middle / model:.2f}" if model else "",
            number(row["predicted_mib"]),
            number(row["extra_mib"]),
            f"{max(errors):.1e}" if errors else "",
        ]
        lines.append(f"{head} " + " | ".join(cells) + " |")
    return lines


def tile_table(steps: Result) -> list[str]:
    """The tuned kernels: fastest of each at each D and N, and the model's time of that phase by its slowest part."""
    times = (steps.get("tune", {}).get("result") or {}).get("times", [])
    best: dict[tuple[str, int, int], Result] = {}
    for row in times:
        key = row["kernel"], row["d"], row["n"]
        if "median_seconds" in row and row["median_seconds"] < best.get(key, {}).get("median_seconds", math.inf):
            best[key] = row
    if not best:
        return []
    lines = ["## Fastest tiles", "", "| kernel | D | N | tile | ms |", "|---|---|---|---|---|"]
    for (kernel, d, n), row in best.items():
        tile = row["tile"]
        shape = f"{tile['rows']}x{tile['cols']}x{tile['d']} w{tile['warps']} s{tile['stages']} group {tile['group']}"
        halves = ", halves" if tile["halves"] else ""
        lines.append(f"| {kernel} | {d} | {n:,} | {shape}{halves} | {number(1e3 * row['median_seconds'])} |")
    return [*lines, ""]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def plot(found: Sequence[Result], path: Path) -> None:
    """Time over N at D = 512, bf16: circles measured, lines predicted; a panel for each loss and way of running."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from bench.cells import name_of
    from bench.figures import COLOURS

    panels = [(loss, graph) for loss in ("softmax", "sigmoid") for graph in (False, True)]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for (loss, graph), axis in zip(panels, axes.flat, strict=True):
        chosen = [r for r in found if r["key"][3:] == (loss, graph) and r["seconds"] and r["key"][2] == "bf16"]
        d = 512 if any(r["key"][1] == 512 for r in chosen) else next((r["key"][1] for r in chosen), 512)
        for peer in dict.fromkeys(r["peer"] for r in chosen):
            mine = sorted((r for r in chosen if r["peer"] == peer and r["key"][1] == d), key=lambda r: r["key"][0])
            colour, ns = COLOURS.get(peer, "#000000"), [r["key"][0] for r in mine]
            axis.plot(ns, [1e3 * median(r["seconds"]) for r in mine], "o", color=colour, label=name_of(peer))
            modelled = [(n, r["predicted_ms"]) for n, r in zip(ns, mine, strict=True) if r["predicted_ms"]]
            if modelled:
                axis.plot(*zip(*modelled, strict=True), "-", lw=1, color=colour)
        axis.set(title=f"{loss}, {'CUDA graph' if graph else 'eager'}, D = {d}", xlabel="N", ylabel="ms")
        if chosen:
            axis.set(xscale="log", yscale="log")
            axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle("Circles: measured. Lines: predicted before.")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of a session")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves too")
    options = parser.parse_args(arguments)
    summary = read(options.results / "summary.json")
    if not summary:
        parser.error(f"results: expected a folder with a session's summary.json, got {options.results}")
    print(text(summary, options.results))
    if options.plot:
        plot(rows(summary, options.results), options.plot)


if __name__ == "__main__":
    main()
