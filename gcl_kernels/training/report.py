"""`python -m gcl_kernels.training.report`: one picture of one or more evaluated runs.

    python -m gcl_kernels.training.report --runs results/clip results/gcl --training logs/clip logs/gcl --out report.png

Shows, of output directories of `gcl_kernels.training.evaluate`: every metric with its 95% interval; of the first two runs
each query's difference, worst to best; learning curves of training folders; and what some queries retrieve, with images and
grades.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcl_kernels.training.data import load_image
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.evaluation_files import read_per_query
from gcl_kernels.training.files import read_json
from gcl_kernels.training.metrics import NAMES
from gcl_kernels.training.significance import bootstrap_interval, paired_test

QUERIES_SHOWN = 4
COLOURS = ("#3b82d6", "#1a7f37", "#c9733e", "#8250df", "#b8b8b8")
WIN, LOSS = "#1a7f37", "#c9443e"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture; input that cannot be used gives its message and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m gcl_kernels.training.report", description="A picture of evaluated runs"
    )
    parser.add_argument(
        "--runs", nargs="+", required=True, type=Path, metavar="DIR", help="output directories of evaluate"
    )
    parser.add_argument(
        "--training", nargs="*", default=[], type=Path, metavar="DIR", help="LOGS/NAME of training runs"
    )
    parser.add_argument("--metric", choices=NAMES, default="NDCG@10", help="of the differences")
    parser.add_argument("--out", type=Path, default=Path("report.png"), metavar="FILE", help="a PNG, PDF or SVG file")
    args = parser.parse_args(argv)
    try:
        draw(args.runs, args.training, args.metric, args.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(args.out)
    return 0


def draw(runs: Sequence[Path], training: Sequence[Path], metric: str, path: Path) -> None:
    """Draw the report of the runs into a file."""
    from matplotlib.figure import Figure

    per_query = {run.name: read_per_query(run / "per_query.csv") for run in runs}
    examples = {run.name: read_json(run / "examples.json") for run in runs if (run / "examples.json").exists()}
    curves = {folder.name: read_json(folder / "results.json") for folder in training}
    if len(per_query) < len(runs) or len(curves) < len(training):
        raise InputError("--runs, --training: expected folders of different names")

    shown = QUERIES_SHOWN if examples else 0
    lines = shown * len(examples)
    figure = Figure(figsize=(15, 5.2 + (1.5 * lines + 0.6 * shown if lines else 0)), dpi=100, layout="constrained")
    heights = [5.2, max(1.5 * lines + 0.6 * shown, 0.01)]
    top, bottom = figure.subfigures(2, 1, height_ratios=heights) if lines else (figure, None)
    panels = 1 + (len(runs) > 1) + bool(curves)
    axes = list(top.subplots(1, panels, squeeze=False)[0])
    draw_metrics(axes.pop(0), per_query)
    if len(runs) > 1:
        draw_differences(axes.pop(0), per_query, metric)
    if curves:
        draw_curves(axes.pop(0), curves)
    if bottom is not None:
        draw_examples(bottom, examples, shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_metrics(axes: Any, per_query: dict[str, dict[str, dict[str, float]]]) -> None:
    """Bars with 95% bootstrap intervals over queries."""
    width = 0.8 / len(per_query)
    for number, (run, queries) in enumerate(per_query.items()):
        values = [[of_query[name] for of_query in queries.values()] for name in NAMES]
        means = np.array([np.mean(of_metric) for of_metric in values])
        intervals = np.array([bootstrap_interval(of_metric) for of_metric in values])
        places = np.arange(len(NAMES)) + (number - (len(per_query) - 1) / 2) * width
        error = np.abs(intervals.T - means)
        label = f"{run} ({len(queries)} queries)"
        axes.bar(places, means, width, yerr=error, capsize=2, label=label, color=COLOURS[number % len(COLOURS)])
    axes.set(xticks=range(len(NAMES)), ylim=(0, None))
    axes.set_title("Means over queries, 95% bootstrap intervals", fontsize=11)
    axes.set_xticklabels(NAMES, rotation=35, ha="right")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_differences(axes: Any, per_query: dict[str, dict[str, dict[str, float]]], metric: str) -> None:
    """Each query's difference between the second run and the first, sorted."""
    (first, theirs), (second, ours), *_ = per_query.items()
    shared = [query for query in ours if query in theirs]
    if not shared:
        raise InputError(f"--runs: expected queries that are in both {first} and {second}, got none")
    a, b = (np.array([queries[query][metric] for query in shared]) for queries in (theirs, ours))
    difference = np.sort(b - a)
    axes.bar(range(len(shared)), difference, width=1.0, color=[WIN if value > 0 else LOSS for value in difference])
    axes.axhline(0, color="black", linewidth=0.8)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    axes.set(xlabel="queries, worst to best", ylabel=f"{metric}: {second} − {first}")
    axes.set_title(f"{wins} won, {losses} lost, {len(shared) - wins - losses} equal; mean {difference.mean():+.3f}, "
                   f"p = {paired_test(b, a):.4f}", fontsize=11)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(axes: Any, curves: dict[str, dict[str, Any]]) -> None:
    """The loss of every step, smoothed, and above it the mean NDCG@10 of the evaluations on the way."""
    histories: dict[str, dict[int, list[float]]] = {}
    for run, of_run in curves.items():
        for line in of_run.get("history", []):
            histories.setdefault(run, {}).setdefault(line["step"], []).append(line["NDCG@10"])
    # A single evaluation, that at the end, is no curve.
    second = axes.twinx() if any(len(history) > 1 for history in histories.values()) else None
    for number, (run, of_run) in enumerate(curves.items()):
        losses, colour = np.array(of_run["loss"]), COLOURS[number % len(COLOURS)]
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, label=run, color=colour)
        if second is not None and run in histories:
            means = [np.mean(values) for values in histories[run].values()]
            second.plot(list(histories[run]), means, "o--", color=colour, markersize=4)
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title("Learning curves" + (" (dashed: NDCG@10)" if second else ""), fontsize=11)
    # Losses fall and metrics rise: the corner below the first losses is empty.
    axes.legend(frameon=False, loc="lower left" if second else "best")
    axes.spines["top"].set_visible(False)
    if second is not None:
        second.set(ylabel="NDCG@10, mean of the test sets", ylim=(0, None))
        second.spines["top"].set_visible(False)


def draw_examples(figure: Any, examples: dict[str, dict[str, Any]], count: int) -> None:
    """What the first queries of the first run retrieve in every run: images or texts, framed by grade."""
    runs = list(examples)
    of_query = {run: {example["query"]: example for example in examples[run]["examples"]} for run in runs}
    queries = [query for query in of_query[runs[0]] if all(query in of_query[run] for run in runs)][:count]
    if not queries:
        return
    columns = max(len(of_query[run][query]["found"]) for run in runs for query in queries)
    grid = figure.subplots(len(queries) * len(runs), columns, squeeze=False)
    for line, (query, run) in enumerate((query, run) for query in queries for run in runs):
        example, kinds = of_query[run][query], examples[run]["kinds"]
        for rank, axes in enumerate(grid[line]):
            axes.set(xticks=[], yticks=[])
            if rank >= len(example["found"]):
                axes.axis("off")
                continue
            draw_document(axes, example["found"][rank], kinds)
        grid[line, 0].set_ylabel(f"{example['text'][:24]}\n{run[:24]}", rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("First ranks; the number is the grade, 0 not judged", fontsize=11)


def draw_document(axes: Any, document: dict[str, Any], kinds: dict[str, str]) -> None:
    image = next((document[key] for key, kind in kinds.items() if kind == "img" and document.get(key)), None)
    text = next((document[key] for key, kind in kinds.items() if kind == "txt" and document.get(key)), document["id"])
    try:
        if image:
            axes.imshow(load_image(image))
    except Exception:  # a picture for people: what cannot be decoded is shown by its text
        image = None
    if not image:
        axes.text(0.5, 0.5, wrapped(str(text)), ha="center", va="center", fontsize=7, transform=axes.transAxes)
    grade = document["grade"]
    colour = WIN if grade >= 60 else "#e0a100" if grade >= 10 else "#c9733e" if grade else "#b8b8b8"
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5)
    axes.set_xlabel(str(grade), fontsize=8, color=colour, labelpad=1)


def wrapped(text: str, width: int = 16, lines: int = 5) -> str:
    import textwrap

    # matplotlib takes dollars for mathematics.
    return "\n".join(textwrap.wrap(text.replace("$", r"\$"), width)[:lines])


if __name__ == "__main__":
    sys.exit(main())
