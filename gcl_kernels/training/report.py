"""`python -m gcl_kernels.training.report`: one picture of one or more evaluated runs.

    python -m gcl_kernels.training.report --runs results/clip results/gcl --training logs/clip logs/gcl --out report.png

Shows, of output directories of `gcl_kernels.training.evaluate`: what was evaluated; every metric with its 95% interval; of
the first two runs each query's difference, worst to best; learning curves of training folders; and what the best, the median,
the worst and some random queries retrieve, or those that `--queries` names, with images and grades as they were given.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gcl_kernels.training.errors import InputError
from gcl_kernels.training.evaluation_files import read_about, read_per_query
from gcl_kernels.training.files import read_json
from gcl_kernels.training.metrics import NAMES
from gcl_kernels.training.report_examples import choose, draw_examples, read_examples
from gcl_kernels.training.significance import bootstrap_interval, paired_test

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
    parser.add_argument("--metric", choices=NAMES, default="NDCG@10", help="of the differences, and of best and worst")
    parser.add_argument("--queries", nargs="+", metavar="QUERY",
                        help="the queries to show, by text or id, or how many to draw; default: the best, the median, the worst "
                        "and three drawn at random")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("report.png"), metavar="FILE", help="a PNG, PDF or SVG file")
    args = parser.parse_args(argv)
    try:
        draw(args.runs, args.training, args.metric, args.out, args.queries)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:  # matplotlib's, for an ending that it cannot write
        print(f"--out {args.out}: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


def draw(
    runs: Sequence[Path], training: Sequence[Path], metric: str, path: Path, queries: Sequence[str] | None = None
) -> None:
    """Draw the report of the runs into a file."""
    from matplotlib.figure import Figure

    per_query = {run.name: read_per_query(run / "per_query.csv") for run in runs}
    about = {run.name: read_about(run) for run in runs}
    curves = {folder.name: read_json(folder / "results.json") for folder in training}
    if len(per_query) < len(runs) or len(curves) < len(training):
        raise InputError("--runs, --training: expected folders of different names")
    examples = {}
    for run in runs:
        file = run / "examples.json"
        if file.exists() and (content := read_examples(file, about[run.name].get("ground_truth"))):
            examples[run.name] = content
    if queries and not examples:
        raise InputError("--queries: expected examples.json in a run's folder, got none")
    chosen = choose(examples, per_query, metric, queries) if examples else {}

    described = (description(run, about[run], len(per_query[run])) for run in per_query)
    lines = [line for text in described for line in textwrap.wrap(text, 190, subsequent_indent="    ")]
    heights = [5.0 + 0.25 * len(lines), 0.7 + len(chosen) * (0.45 + 1.45 * len(examples))]
    figure = Figure(figsize=(15, sum(heights[: 1 + bool(chosen)])), dpi=100, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights) if chosen else (figure, None)
    top.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left", parse_math=False)
    panels = 1 + (len(runs) > 1) + bool(curves)
    axes = list(top.subplots(1, panels, squeeze=False)[0])
    draw_metrics(axes.pop(0), per_query)
    if len(runs) > 1:
        draw_differences(axes.pop(0), per_query, metric)
    if curves:
        draw_curves(axes.pop(0), curves)
    if bottom is not None:
        draw_examples(bottom, examples, chosen, metric, per_query)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Texts in scripts that the font lacks: their boxes show it well enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path)


def description(run: str, about: dict[str, Any], queries: int) -> str:
    """A run in a line: data set, model, checkpoint, step, date, and which queries."""
    if not about.get("test_csv"):
        return f"{run}: {queries} queries; of which model and data nothing is known"
    step = f", step {about['step']}" if about.get("step") is not None else ""
    of = f" of {about['queries_in_file']}, {about['queries_are']}" if queries != about.get("queries_in_file") else ""
    return (
        f"{run}: {about['test_csv']} against {about['doc_meta']} ({about['documents']} documents), {queries} queries{of}; "
        f"{about['model']}, {about['pretrained'] or 'random weights'}{step}; {about.get('date', 'no date')}"
    )


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
    # Above the bars, not on them.
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.06), ncol=2, fontsize=9)
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


if __name__ == "__main__":
    sys.exit(main())
