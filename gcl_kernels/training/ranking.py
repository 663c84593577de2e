"""Evaluation after the GCL protocol: embed queries and documents, search exactly, grade the ranking.

No result depends on the order in which a file lists documents or judged pairs. Each distinct document is embedded once, in
an order of its own, so that equal documents have equal scores to the last bit. Equal scores are ordered by document id,
descending, which is trec_eval's rule.

The command line, with the flags and files of the GCL authors' evaluator, is `gcl_kernels.training.evaluate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gcl_kernels
from gcl_kernels.training.data import Pairs
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.errors import DataError, InputError
from gcl_kernels.training.metrics import all_metrics
from gcl_kernels.training.progress import Progress


@dataclass
class Evaluation:
    """The ranking of every query and how good it is.

    `ranking` (Q, K) holds positions in `document_ids`, best first; `gains` (Q, K) the grades of those documents,
    0 where not judged; `judged` (Q, J) every grade of a query, padded with 0; `holes` (Q, K) bool, documents that were
    judged for no query at all; `scores` (Q, K) the similarities; `per_query` the metrics, (Q,) each; `means` their means.
    """

    query_ids: list[str]
    document_ids: list[str]
    ranking: Tensor
    gains: Tensor
    judged: Tensor
    holes: Tensor
    per_query: dict[str, Tensor]
    means: dict[str, float]
    scores: Tensor | None = None

    def rows(self) -> dict[str, dict[str, float]]:
        """The metrics of each query, `{query id: {metric: value}}`."""
        columns = {name: values.tolist() for name, values in self.per_query.items()}
        return {
            query: {name: values[row] for name, values in columns.items()} for row, query in enumerate(self.query_ids)
        }


def minmax_grades(scores: Sequence[float]) -> list[int]:
    """The grades 1 to 100 of the GCL protocol: `int((s - min) / (max - min) * 99 + 1)`, or all 1 for one single score.

    The lowest score given gets 1, not 0: 0 is for documents that nobody judged.
    """
    return minmax(torch.tensor(scores, dtype=torch.float64)).tolist()


def minmax(scores: Tensor) -> Tensor:
    """`minmax_grades` of a float64 tensor, as int64."""
    low, high = scores.min(), scores.max()
    if low == high:
        return torch.ones_like(scores, dtype=torch.int64)
    return ((scores - low) / (high - low) * 99 + 1).long()


@torch.no_grad()
def embed(
    encoder: FieldEncoder,
    fields: Mapping[str, Sequence[str]],
    kinds: Mapping[str, str],
    weights: Mapping[str, float],
    *,
    batch_size: int = 512,
    progress: str = "queries",
) -> Tensor:
    """Embed one side, batch by batch: encode each field, then `gcl_kernels.aggregate_fields`.

    Rows with the same cells are embedded once, and batches are made in the order of the cells: what a batched encoder
    makes of a row differs in the last bits by the rows beside it, so the order of the rows would show otherwise.

    Args:
        fields: `{field: N cells}`; a row needs at least one value.
        kinds, weights: `{field: "txt" or "img"}` and `{field: weight}`.
        progress: what the rows are, in the line that says how far the work is.

    Returns:
        (N, D) of unit length, float32.
    """
    columns = list(fields.values())
    row_of = lambda number: tuple(column[number] for column in columns)  # noqa: E731
    order = sorted(range(len(columns[0])), key=row_of)
    new = [place == 0 or row_of(order[place - 1]) != row_of(row) for place, row in enumerate(order)]
    rows = torch.tensor(order)
    group = torch.tensor(new).cumsum(0) - 1  # of each place in the order, the number of its distinct row
    distinct: list[int] = rows[torch.tensor(new)].tolist()
    was_training = encoder.model.training
    encoder.model.eval()
    embeddings = torch.empty(0)
    with Progress(progress, len(distinct)) as done:
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            cells = {key: [column[row] for row in batch] for key, column in fields.items()}
            encoded, mask = encoder(cells, kinds)
            vectors = gcl_kernels.aggregate_fields(encoded, weights, mask=mask).float()
            if start == 0:
                embeddings = vectors.new_empty(len(order), vectors.shape[1])
            first, last = torch.searchsorted(group, torch.tensor([start, start + len(batch)])).tolist()
            embeddings[rows[first:last].to(vectors.device)] = vectors[(group[first:last] - start).to(vectors.device)]
            done.add(len(batch))
    encoder.model.train(was_training)
    return embeddings


def search(
    queries: Tensor, documents: Tensor, k: int, *, query_chunk: int = 256, document_chunk: int = 16_384
) -> tuple[Tensor, Tensor]:
    """Exact search by inner product: positions and scores of the k best documents of each query, (Q, min(k, M)) each.

    Best first; equal scores are ordered by position. queries (Q, D) and documents (M, D) are finite. At most `query_chunk` x
    (k + `document_chunk`) scores exist at a time, never Q x M. They are computed in float64 and rounded to the queries'
    type: in float32 the last bits of equal documents' scores differ by where they lie in a chunk.
    """
    if not (queries.isfinite().all() and documents.isfinite().all()):
        raise InputError("expected finite embeddings, got NaN or infinity: training has probably diverged")
    found, found_scores = [], []
    for part in queries.split(query_chunk):
        scores = part.new_empty(len(part), 0)
        positions = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
        for start in range(0, len(documents), document_chunk):
            chunk = documents[start : start + document_chunk]
            here = torch.arange(start, start + len(chunk), device=part.device).expand(len(part), -1)
            scores = torch.cat([scores, (part.double() @ chunk.double().T).to(part.dtype)], dim=1)
            positions = torch.cat([positions, here], dim=1)
            # topk does not say how it orders equal scores; a stable sort keeps the earlier document first.
            best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
            scores, positions = scores.gather(1, best), positions.gather(1, best)
        found.append(positions)
        found_scores.append(scores)
    return torch.cat(found), torch.cat(found_scores)


Side = tuple[Mapping[str, str], Mapping[str, float]]
"""(kinds, weights) of the fields of a side: `{field: "txt" or "img"}` and `{field: weight}`."""


@dataclass
class Corpus:
    """The M documents that can be found: their ids and their embeddings (M, D) of unit length.

    Documents of equal scores are ranked in this order; `embed_corpus` sorts them by id, descending.
    """

    document_ids: list[str]
    embeddings: Tensor


def embed_corpus(
    encoder: FieldEncoder, documents: Mapping[str, Mapping[str, str]], right: Side, *, batch_size: int = 512
) -> Corpus:
    """Embed documents `{id: {field: value}}`. One without any value cannot be embedded, and so cannot be found."""
    found_ids = (identity for identity, values in documents.items() if any(values[key] for key in right[0]))
    document_ids = sorted(found_ids, reverse=True)
    if not document_ids:
        raise DataError(f"expected a document with a value in one of {list(right[0])}, got none among {len(documents)}")
    cells = {key: [documents[identity][key] for identity in document_ids] for key in right[0]}
    embeddings = embed(encoder, cells, *right, batch_size=batch_size, progress="documents")
    # One whose only value is an image that could not be read has no direction either.
    found = (embeddings != 0).any(dim=1)
    if not found.all():
        document_ids = [identity for identity, there in zip(document_ids, found.tolist(), strict=True) if there]
    return Corpus(document_ids, embeddings[found])


def evaluate(
    encoder: FieldEncoder, pairs: Pairs, corpus: Corpus, left: Side, *, top_k: int = 1000, batch_size: int = 512
) -> Evaluation:
    """Rank a corpus for the queries of `pairs` and grade the rankings.

    Args:
        pairs: the judged pairs; their scores become grades by `minmax_grades`, over the whole file. Of a pair
            that occurs twice the highest score counts.
        corpus: see `embed_corpus`; for the documents of `pairs` themselves, of `corpus_of`.
    """
    query_rows = fullest_rows(pairs.query_ids, pairs.left)
    queries = {key: [cells[row] for row in query_rows.values()] for key, cells in pairs.left.items()}
    found, scores = search(embed(encoder, queries, *left, batch_size=batch_size), corpus.embeddings, top_k)
    return grade(grades_of(pairs, list(query_rows)), corpus.document_ids, found.cpu(), scores.cpu())


def fullest_rows(ids: Sequence[str], fields: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The row that stands for each id, `{id: row}`, by the id's first row: the one with the most values.

    Of several such rows it is that with the smallest cells, so that the order of the rows does not matter.
    """

    def place(row: int) -> tuple[int, list[str]]:
        cells = [column[row] for column in fields.values()]
        return sum(not cell for cell in cells), cells

    rows: dict[str, int] = {}
    for row, identity in enumerate(ids):
        if identity not in rows or place(row) < place(rows[identity]):
            rows[identity] = row
    return rows


def say_contradictions(path: str, pairs: Pairs, say: Callable[[str], None] = print) -> None:
    """Say in one line each: pairs with several scores, and queries whose rows have several texts."""
    scores: dict[tuple[str, str], float] = {}
    several: dict[tuple[str, str], None] = {}
    for query, document, score in zip(pairs.query_ids, pairs.document_ids, pairs.scores, strict=True):
        if scores.setdefault((query, document), score) != score:
            several[query, document] = None
    if several:
        first = " and ".join(f"'{identity}'" for identity in min(several))
        say(f"{path}: expected one score for a pair, got more for {len(several)}, first {first}; the highest counts")
    texts: dict[str, set[tuple[str, ...]]] = {}
    for query, cells in zip(pairs.query_ids, zip(*pairs.left.values(), strict=True), strict=True):
        texts.setdefault(query, set()).add(cells)
    if different := [query for query, cells in texts.items() if len(cells) > 1]:
        say(
            f"{path}: expected the same cells in all rows of a query, got others for {len(different)}, first "
            f"'{min(different)}'; the fullest row counts"
        )


def known_documents(path: str, pairs: Pairs, corpus: Mapping[str, object], say: Callable[[str], None] = print) -> None:
    """Say in one line how many judged documents the corpus lacks: they stay in the ground truth and are never found.

    Raises:
        DataError: the corpus has none of them; ids and corpus do not belong together.
    """
    judged = dict.fromkeys(pairs.document_ids)
    missing = [identity for identity in judged if identity not in corpus]
    if not missing:
        return
    counts = f"{len(missing)} of {len(judged)}"
    message = f"{path}: expected all documents in the corpus, got {counts} that are not, first '{missing[0]}'"
    if len(missing) == len(judged):
        raise DataError(message)
    say(f"{message}; they count as not found")


def corpus_of(pairs: Pairs) -> dict[str, dict[str, str]]:
    """The documents of the pairs themselves, `{id: {field: value}}`, each of its fullest row."""
    rows = fullest_rows(pairs.document_ids, pairs.right)
    return {identity: {key: cells[row] for key, cells in pairs.right.items()} for identity, row in rows.items()}


Grades = Mapping[str, Mapping[str, int]]
"""`{query id: {document id: grade}}`, the ground truth."""


def grades_of(pairs: Pairs, query_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """The ground truth of pairs for some of their queries: `minmax_grades` over the whole file, the highest of a pair."""
    grades: dict[str, dict[str, int]] = {identity: {} for identity in query_ids}
    for query, document, gain in zip(pairs.query_ids, pairs.document_ids, minmax_grades(pairs.scores), strict=True):
        if query in grades:
            grades[query][document] = max(gain, grades[query].get(document, 0))
    return grades


NOTHING = ""
"""The id that fills rankings of fewer documents than others; never judged, and no document."""


def grade(grades: Grades, document_ids: list[str], ranking: Tensor, scores: Tensor | None = None) -> Evaluation:
    """Look up the grade of every ranked document and compute all metrics; ranking (Q, K) as in `Evaluation`."""
    gains = torch.tensor(
        [
            [of_query.get(document_ids[position], 0) for position in positions]
            for of_query, positions in zip(grades.values(), ranking.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    judged = torch.zeros(len(grades), max(1, *(len(of_query) for of_query in grades.values())), dtype=torch.float64)
    for row, of_query in enumerate(grades.values()):
        judged[row, : len(of_query)] = torch.tensor(list(of_query.values()), dtype=torch.float64)
    known = {document for of_query in grades.values() for document in of_query} | {NOTHING}
    holes = torch.tensor([document not in known for document in document_ids])[ranking]
    per_query = all_metrics(gains, judged)
    means = {name: mean(values) for name, values in per_query.items()}
    return Evaluation(list(grades), document_ids, ranking, gains, judged, holes, per_query, means, scores)


def mean(values: Tensor) -> float:
    """The mean of (Q,) values, rounded once, so that it is the same in whatever order they come."""
    return math.fsum(values.tolist()) / len(values)


def random_ranking(pairs: Pairs, document_ids: list[str], *, top_k: int = 1000, seed: int = 0) -> Evaluation:
    """Every query's documents in a random order: the level below which nothing has been learnt."""
    generator = torch.Generator().manual_seed(seed)
    query_ids = sorted(set(pairs.query_ids))
    order = [torch.randperm(len(document_ids), generator=generator)[:top_k] for _ in query_ids]
    return grade(grades_of(pairs, query_ids), document_ids, torch.stack(order))
