"""The grades that the evaluation command holds a ranking against: read from a file, or made of the judged pairs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gcl_kernels.training import made_from
from gcl_kernels.training.data import Pairs
from gcl_kernels.training.errors import DataError
from gcl_kernels.training.files import read_json, write_json_atomically
from gcl_kernels.training.ranking import Grades, grades_of, minmax_grades

NAME = "gt_results.json"


class GroundTruth(NamedTuple):
    """Grades, whether they were given in a file, and which queries these are, in words."""

    grades: Grades
    given: bool
    queries: str


def ground_truth(args: argparse.Namespace, pairs: Pairs) -> GroundTruth:
    """The grades given in a file, or those of the pairs, which are made again each time, and written.

    Raises:
        DataError: a given file that this evaluator wrote for other pairs or options, or that is no ground truth; a file that
            is not this evaluator's where it would write its own.
    """
    fresh = graded(pairs, args.top_q, args.top_k)
    path = args.gt_results_path or args.output_dir / NAME
    parts = {
        "--weight-key": args.weight_key,
        "--score-scaling": args.score_scaling,
        "--top-q": args.top_q,
        "--top-k": args.top_k,
        "judged pairs": made_from.digest(sorted(map(list, zip(pairs.query_ids, pairs.document_ids, pairs.scores, strict=True)))),
        "grades": made_from.digest([fresh]),
    }  # fmt: skip
    if path.exists():
        then = made_from.recorded(path)
        other = "" if then is None else made_from.difference(then, parts)
        if args.gt_results_path:
            if other:
                raise DataError(
                    f"{path}: expected a ground truth of the same pairs and options, got one that differs in {other}; another "
                    f"--gt-results-path keeps both"
                )
            return GroundTruth(given_grades(path, args.test_csv, fresh, set(pairs.query_ids)), True, f"those of {path}")
        if then is None and read_json(path) != fresh:
            raise DataError(
                f"{path}: expected a ground truth that this evaluator wrote for the same pairs, got another; to use it give "
                f"--gt-results-path, to replace it remove it"
            )
        if other:
            print(f"{path}: made again, as {other.replace(', grades', '')} differ")
    write_json_atomically(path, fresh)
    made_from.record(path, parts)
    drawn = len(fresh) < len(set(pairs.query_ids))
    return GroundTruth(fresh, False, "drawn by weight; --top-q -1 takes all" if drawn else "all")


def given_grades(path: Path, test_csv: str, fresh: Grades, known: set[str]) -> Grades:
    """The grades of a file given by hand, of the queries that the test file has, and a line that says so."""
    grades = read_grades(path)
    if missing := [query for query in grades if query not in known]:
        message = (
            f"{path}: expected queries of {test_csv}, got {len(missing)} of {len(grades)} that it does not have, first "
            f"'{missing[0]}'"
        )
        if len(missing) == len(grades):
            raise DataError(message)
        print(f"{message}; left out")
        grades = {query: of_query for query, of_query in grades.items() if query in known}
    different = sum(of_query != fresh.get(query) for query, of_query in grades.items())
    print(
        f"{path}: ground truth as given, {len(grades)} queries; "
        + (f"{different} have other grades than {test_csv} gives" if different else f"the grades of {test_csv}")
    )
    return grades


def graded(pairs: Pairs, top_q: int, top_k: int) -> Grades:
    """The grades of `top_q` queries and their `top_k` best documents, most relevant queries first."""
    weight = weight_of_queries(pairs)
    queries = sorted(draw_queries(weight, top_q), key=lambda query: -weight[query])
    return {
        query: dict(sorted(of_query.items(), key=lambda item: (-item[1], item[0]))[:top_k])
        for query, of_query in grades_of(pairs, queries).items()
    }


def weight_of_queries(pairs: Pairs) -> dict[str, int]:
    """The sum of the grades of each query's rows."""
    weight: dict[str, int] = {}
    for query, gain in zip(pairs.query_ids, minmax_grades(pairs.scores), strict=True):
        weight[query] = weight.get(query, 0) + gain
    return weight


def draw_queries(weight: Mapping[str, float], count: int) -> list[str]:
    """`count` of the queries, drawn by weight without replacement; all of them where `count` is -1 or they are fewer.

    The draw is the authors': pandas' `sample(n=count, weights=..., random_state=1)` from queries in alphabetical order, so
    that the order of the file does not matter.
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
