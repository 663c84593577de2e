"""The four test sets of the GCL protocol: writing judged queries and their documents into them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SPLITS = {
    "in-domain": "train queries, train documents",
    "novel query": "novel queries, train documents",
    "novel document": "train queries, novel documents",
    "zero-shot": "novel queries, novel documents",
}
"""The four test sets of the GCL protocol; the training set is the first."""

AUTHORS_FILES = {
    "in-domain": ("query_0_product_id_0.csv", "corpus_1.json"),
    "novel query": ("query_1_product_id_0.csv", "corpus_1.json"),
    "novel document": ("query_0_product_id_1.csv", "corpus_2.json"),
    "zero-shot": ("query_1_product_id_1.csv", "corpus_2.json"),
}
"""The same test sets as the GCL authors name them: (pairs, corpus)."""


@dataclass(frozen=True)
class Judged:
    """A query, the grades of its judged documents `{document id: grade}`, and whether training does not see it."""

    text: str
    grades: Mapping[str, int]
    novel: bool


def write_splits(
    folder: str | Path, documents: Mapping[str, Mapping[str, str]], novel: Iterable[str], queries: Iterable[Judged]
) -> dict[str, tuple[Path, Path]]:
    """Write, for each of `SPLITS`, the pairs as CSV and the corpus as JSON.

    Args:
        documents: `{id: {field: value}}`, every document with the same fields.
        novel: ids of the documents that training does not see.
        queries: in any number; those of a split are written in this order.

    Returns:
        `{split: (CSV, JSON)}`. The columns are query, document, the documents' fields and score.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    novel, queries = set(novel), list(queries)
    fields = list(next(iter(documents.values())))
    files = {}
    for split in SPLITS:
        novel_query = split in ("novel query", "zero-shot")
        novel_document = split in ("novel document", "zero-shot")
        stem = folder / split.replace(" ", "_").replace("-", "_")
        with stem.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["query", "document", *fields, "score"])
            for query in queries:
                for identity, grade in query.grades.items() if query.novel == novel_query else ():
                    if (identity in novel) == novel_document:
                        writer.writerow([query.text, identity, *documents[identity].values(), grade])
        corpus = {identity: row for identity, row in documents.items() if (identity in novel) == novel_document}
        stem.with_suffix(".json").write_text(json.dumps(corpus, indent=0), encoding="utf-8")
        files[split] = stem.with_suffix(".csv"), stem.with_suffix(".json")
    return files
