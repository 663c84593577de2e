"""What queries have found, kept for the report: of a fixed random sample, and the best, median and worst of each metric."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gcl_kernels.training.data import Pairs
from gcl_kernels.training.files import write_json_atomically
from gcl_kernels.training.ranking import Evaluation

SAMPLE, RANKS = 1000, 8
"""Queries drawn for examples.json, and ranks of each."""


def drawn(queries: Sequence[str]) -> list[str]:
    """Queries in an order that is random, the same in every run, and not that of a file: by a hash of the query."""
    return sorted(
        queries, key=lambda query: hashlib.blake2b(query.encode(errors="surrogatepass"), digest_size=8).digest()
    )


def extremes(values: Mapping[str, float]) -> dict[str, str]:
    """The query with the best, the median and the worst value, `{"best": query, ...}`; a query has one place at most."""
    order = sorted(drawn(list(values)), key=lambda query: -values[query])
    places = {"best": 0, "median": (len(order) - 1) // 2, "worst": len(order) - 1}
    named: dict[str, str] = {}
    for name, place in places.items():
        if order and order[place] not in named.values():
            named[name] = order[place]
    return named


def write_examples(
    path: Path,
    evaluation: Evaluation,
    documents: Mapping[str, Mapping[str, str]],
    kinds: Mapping[str, str],
    texts: Sequence[str],
    pairs: Pairs | None,
    *,
    about: Mapping[str, Any],
) -> None:
    """Write the first ranks of some queries, with the cells of the documents.

    `texts` (Q,) are the queries in words. Grades are the scores of `pairs`, as they were given; without pairs those of the
    ground truth. A document that was not judged for the query has the grade null.
    """
    per_query = evaluation.rows()
    kept = dict.fromkeys(drawn(evaluation.query_ids)[:SAMPLE])
    for name in evaluation.per_query:
        kept.update(dict.fromkeys(extremes({query: of_query[name] for query, of_query in per_query.items()}).values()))
    row_of = {query: row for row, query in enumerate(evaluation.query_ids)}
    scores: dict[tuple[str, str], float] = {}
    for query, document, score in zip(pairs.query_ids, pairs.document_ids, pairs.scores, strict=True) if pairs else ():
        if query in kept:
            scores[query, document] = max(score, scores.get((query, document), score))

    examples, shown = [], {}
    for query in kept:
        row, found = row_of[query], []
        places, gains = evaluation.ranking[row, :RANKS].tolist(), evaluation.gains[row, :RANKS].tolist()
        for place, gain in zip(places, gains, strict=True):
            identity = evaluation.document_ids[place]
            shown[identity] = dict(documents[identity])
            grade = scores.get((query, identity), gain) if gain else None
            found.append({"id": identity, "grade": grade, "gain": int(gain)})
        examples.append({"query": query, "text": texts[row], "found": found})
    content = {"kinds": dict(kinds), "about": dict(about), "documents": shown, "examples": examples}
    write_json_atomically(path, content)
