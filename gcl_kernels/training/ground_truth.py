"""The grades that the evaluation command holds a ranking against: read from a file, or made of the judged pairs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gcl_kernels.training.data import Pairs
from gcl_kernels.training.errors import DataError
from gcl_kernels.training.files import read_json, write_json_atomically
from gcl_kernels.training.ranking import grades_of, minmax_grades


def ground_truth(args: argparse.Namespace, pairs: Pairs) -> dict[str, dict[str, int]]:
    """The grades given in a file, or those of the pairs, of `--top-q` queries and their `--top-k` best documents."""
    path: Path = args.gt_results_path
    if path.exists():
        grades = read_grades(path)
        known = set(pairs.query_ids)
        if missing := [query for query in grades if query not in known]:
            counts = f"{len(missing)} of {len(grades)}"
            message = (
                f"{path}: expected queries of {args.test_csv}, got {counts} that it does not have, first '{missing[0]}'"
            )
            if len(missing) == len(grades):
                raise DataError(message)
            print(f"{message}; left out")
        return {query: of_query for query, of_query in grades.items() if query in known}
    weight: dict[str, float] = {}
    for query, gain in zip(pairs.query_ids, minmax_grades(pairs.scores), strict=True):
        weight[query] = weight.get(query, 0) + gain
    queries = sorted(draw_queries(weight, args.top_q), key=lambda query: -weight[query])
    grades = {
        query: dict(sorted(of_query.items(), key=lambda item: -item[1])[: args.top_k])
        for query, of_query in grades_of(pairs, queries).items()
    }
    write_json_atomically(path, grades)
    return grades


def draw_queries(weight: Mapping[str, float], count: int) -> list[str]:
    """`count` of the queries, drawn by weight without replacement; all of them where `count` is -1 or they are fewer.

    The draw is the authors': pandas' `sample(n=count, weights=..., random_state=1)` from queries in alphabetical order.
    """
    queries = sorted(weight)
    if count < 0 or count >= len(queries):
        return queries
    chances = np.array([weight[query] for query in queries], dtype=np.float64)
    drawn = np.random.RandomState(1).choice(len(queries), count, replace=False, p=chances / chances.sum())
    return [queries[place] for place in drawn]


def read_grades(path: Path) -> dict[str, dict[str, int]]:
    """A ground-truth file `{query: {document: whole grade >= 0}}`."""
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(of_query, dict)
        and of_query
        and all(isinstance(gain, int) and gain >= 0 for gain in of_query.values())
        for of_query in content.values()
    ):
        raise DataError(f"{path}: expected JSON {{query: {{document: whole grade >= 0}}}}, got another structure")
    if not content:
        raise DataError(f"{path}: expected at least one query, got none")
    return content
