"""What the cells of a comparison say: means over seeds, and paired differences to its first variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gcl_kernels.training.significance import bootstrap_interval, paired_test

METRICS = ("NDCG@10", "ERR", "RBP.9", "recall@10")

Cells = dict[int, dict[str, dict[str, float]]]
"""`{seed: {query: {metric: value}}}` of a variant on one test set."""


@dataclass(frozen=True)
class Difference:
    """A variant beside the baseline on one test set, by the first metric of each query, averaged over `seeds`.

    Args:
        seeds: those that both have.
        mean: of the paired differences.
        interval: their 95% bootstrap interval over queries.
        relative: of the mean to the baseline's, in %; NaN where that is 0.
        p: of Fisher's paired randomisation test.
    """

    seeds: list[int]
    mean: float
    interval: tuple[float, float]
    relative: float
    p: float


def differences_to_first(cells: Mapping[str, Cells]) -> dict[str, Difference]:
    """Of every variant that shares a seed with the first one; the first differs from itself by nothing and is left out."""
    (_, baseline), *others = cells.items()
    differences = {}
    for variant, found in others:
        if seeds := sorted(found.keys() & baseline.keys()):
            ours, theirs = (mean_over_seeds(of_run, seeds) for of_run in (found, baseline))
            relative = (ours.mean() / theirs.mean() - 1) * 100 if theirs.mean() else math.nan
            differences[variant] = Difference(
                seeds, (ours - theirs).mean(), bootstrap_interval(ours - theirs), relative, paired_test(ours, theirs)
            )
    return differences


def mean_over_seeds(cells: Cells, seeds: Sequence[int]) -> np.ndarray:
    """The first metric of every query, in order of the query's id, averaged over the seeds."""
    queries = sorted(cells[seeds[0]])
    return np.mean([[cells[seed][query][METRICS[0]] for query in queries] for seed in seeds], axis=0)


def summary_row(test: tuple[str, str], cells: Mapping[str, Cells], differences: Mapping[str, Difference]) -> str:
    """The relative difference of every variant on one test set."""
    first, *others = cells
    columns = [f"{mean_over_seeds(cells[first], sorted(cells[first])).mean():.3f} ({len(cells[first])})"]
    for variant in others:
        if difference := differences.get(variant):
            change = "–" if math.isnan(difference.relative) else f"{difference.relative:+.1f}%"
            bold = "**" if difference.p < 0.05 else ""
            columns.append(f"{bold}{change}{bold} ({len(difference.seeds)})")
        else:
            columns.append("")
    return f"| {', '.join(test)} | {' | '.join(columns)} |"


def table_of_test(cells: Mapping[str, Cells], differences: Mapping[str, Difference]) -> list[str]:
    """The rows of one test set, by the seeds that both the variant and the baseline have."""
    first = next(iter(cells))
    rows = [
        f"{len(next(iter(cells[first].values())))} queries.",
        "",
        f"| variant | seeds | {' | '.join(METRICS)} | difference in {METRICS[0]} | relative | p |",
        "|---" * (len(METRICS) + 5) + "|",
    ]
    for variant in (first, *differences):
        difference = differences.get(variant)
        seeds = difference.seeds if difference else sorted(cells[first])
        values = []
        for metric in METRICS:
            of_seeds = [np.mean([of_query[metric] for of_query in cells[variant][seed].values()]) for seed in seeds]
            spread = f" ± {np.std(of_seeds, ddof=1):.3f}" if len(seeds) > 1 else ""
            values.append(f"{np.mean(of_seeds):.3f}{spread}")
        compared = " | | "
        if difference:
            low, high = difference.interval
            compared = (
                f"{difference.mean:+.3f} [{low:+.3f}, {high:+.3f}] | {difference.relative:+.1f}% | {difference.p:.4f}"
            )
        rows.append(f"| {variant} | {len(seeds)} | {' | '.join(values)} | {compared} |")
    return rows
