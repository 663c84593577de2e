"""The four test sets of the GCL protocol: writing judged queries and their documents into them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gcl_kernels.training.files import write_atomically

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


CORPORA = {False: "train_documents.json", True: "novel_documents.json"}
"""The corpora of a folder written by `gcl_kernels.training.split`: of training's documents, and of those new to it."""

MANIFEST = "split.json"
"""What such a folder holds: `{"sets": {split: {"file", "corpus", "rows", "queries", "documents"}}, ...}`."""


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
    novel, queries = set(novel), list(queries)
    fields = list(next(iter(documents.values())))
    files = {}
    for split in SPLITS:
        novel_query, novel_document = novelty(split)
        stem = folder / stem_of(split)
        rows = (
            [query.text, identity, *documents[identity].values(), grade]
            for query in queries
            if query.novel == novel_query
            for identity, grade in query.grades.items()
            if (identity in novel) == novel_document
        )
        corpus = {identity: row for identity, row in documents.items() if (identity in novel) == novel_document}
        files[split] = stem.with_suffix(".csv"), stem.with_suffix(".json")
        write_pairs(files[split][0], ["query", "document", *fields, "score"], rows)
        write_corpus(files[split][1], corpus)
    return files


def novelty(split: str) -> tuple[bool, bool]:
    """Whether the queries of one of `SPLITS`, and whether its documents, are new to training."""
    return split in ("novel query", "zero-shot"), split in ("novel document", "zero-shot")


def stem_of(split: str) -> str:
    """The name of a split's files without their ending."""
    return split.replace(" ", "_").replace("-", "_")


def write_pairs(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Judged pairs as CSV."""

    def write(new: Path) -> None:
        with new.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    write_atomically(path, write)


def write_corpus(path: Path, documents: Mapping[str, Mapping[str, str]]) -> None:
    """Documents as JSON `{id: {field: value}}`, one field a line."""
    write_atomically(path, lambda new: new.write_text(json.dumps(documents, indent=0), encoding="utf-8"))
