"""The figure of a result file: curves over N, D and fields, and options beside the plain step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cases import SMALL_N, Case
from bench.cells import Cell, case_of, drop_in, falls_after, median, name_of, scaling, series, where

COLOURS = {
    "ours": "#0b6e4f", "open_clip": "#b23a48", "open_clip_compiled": "#e07a5f", "linear_cross_entropy": "#3d5a80",
    "dense": "#7f7f7f", "linear_cross_entropy_chunked": "#98c1d9",
    "cut_cross_entropy": "#8d6a9f", "liger": "#d4a017", "inf_cl": "#5c5c5c", "sentence_transformers": "#81b29a",
    "memeff": "#bc6c25", "siglip_kernel": "#606c38",
}  # fmt: skip
STYLES = ("o-", "s--", "^:", "v-.")  # of a loss and dtype
PLAIN_NAMES = {"ours": "gcl_kernels", "open_clip": "open_clip"}
FLOOR = "6 N²D at the run's GEMM rate (model)"  # the least of an exact loss, with every exponential kept


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


def draw_summary(result: dict[str, Any], path: Path) -> None:
    """Memory and time over N, ours and open_clip's: one line each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [c for c in scaling([c for c in result["cells"] if c["seconds"]]) if c["peer"] in PLAIN_NAMES]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    for axis, value, title, unit in (
        (axes[0], extra, "Extra memory of a step", "MiB"),
        (axes[1], median, "Time of a step, forward and backward", "seconds"),
    ):
        drawn = [c for c in cells if value(c)]
        lines_by_peer(drawn, "n", value, axis)
        batch_axis(axis, [c["n"] for c in drawn])
        axis.set(yscale="log", ylabel=unit)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def extra(cell: Cell) -> float | None:
    """MiB; less than 1 is what the allocator happens to do."""
    mib = cell.get("extra_mib")
    return mib if mib is not None and mib >= 1 else None


def lines_by_series(cells: Sequence[Cell], value, axis) -> list[Cell]:
    """A line for each peer of each loss and dtype; the cells that are drawn."""
    drawn: list[Cell] = []
    for (loss, dtype), style in zip(series(cells), STYLES, strict=False):
        of_series = [c for c in series(cells)[loss, dtype] if value(c)]
        drawn += of_series
        for peer in dict.fromkeys(c["peer"] for c in of_series):
            rows = [c for c in of_series if c["peer"] == peer]
            label = f"{PLAIN_NAMES.get(peer, peer)} {drop_in(loss)}, {dtype}"
            x, y = [c["n"] for c in rows], [value(c) for c in rows]
            axis.plot(x, y, style, ms=4, color=COLOURS.get(peer, "#000000"), label=label)
    return drawn


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
    if axis is not None:
        drawn = lines_by_series(cells, median, axis)
        floor(scaling(cells), "n", axis)
        batch_axis(axis, [c["n"] for c in drawn])
        axis.set(yscale="log", ylabel="seconds", title="Forward and backward")
        axis.legend(frameon=False, fontsize=7)
    return len({c["n"] for c in scaling(cells)}) > 1


def memory_over_n(cells, axis) -> bool:
    if axis is not None:
        drawn = lines_by_series(cells, extra, axis)
        batch_axis(axis, [c["n"] for c in drawn])
        fall = falls_after(scaling(cells))
        title = "Extra peak memory over inputs and gradients"
        if fall is not None:
            title += f"\nours falls above N = {fall:,}: the workspace no longer holds enough exponentials to store any"
        axis.set(yscale="log", ylabel="MiB")
        axis.set_title(title, fontsize=9)
        axis.legend(frameon=False, fontsize=7)
    return len({c["n"] for c in scaling(cells) if extra(c)}) > 1


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
    found = [c for c in cells if all(getattr(case_of(c), k) == getattr(usual, k) for k in others)]
    odd = [c for c in found if getattr(case_of(c), name) != getattr(usual, name)]
    if not odd:
        return []
    n = statistics.mode(c["n"] for c in odd)
    return sorted((c for c in found if c["n"] == n), key=lambda c: getattr(case_of(c), name))


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
    changed = [(k, varying(cells, k)) for k in ("ids", "directions", "passes", "dtype", "logit_scale", "option")]
    bars: dict[str, float] = {}
    for name, found in changed:
        ours = [c for c in found if c["peer"] == "ours"]
        usual = next((c for c in ours if getattr(case_of(c), name) == getattr(case_of(base[0]), name)), None)
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
