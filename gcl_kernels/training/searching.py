"""Search with a trained model: a corpus embedded once and kept on disk, exact or by an index, field weights set anew each time.

    model = SearchModel.load("logs/first/checkpoints/best.pt")
    searcher = Searcher.load(model, "corpus.json", folder="embedded", columns=["brand"])
    for hit in searcher.search("red shoe", 10, where={"brand": ["acme"]}):
        print(hit.score, hit.document_id, searcher.title(hit.position))

The `SearchModel` is in `gcl_kernels.training.search_model`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from gcl_kernels.training import made_from
from gcl_kernels.training.corpora import Documents, read_corpus
from gcl_kernels.training.errors import DataError, InputError
from gcl_kernels.training.exact import best, error_bound
from gcl_kernels.training.files import make_folder, write_atomically
from gcl_kernels.training.indexes import Index
from gcl_kernels.training.kept_vectors import keep, read_kept
from gcl_kernels.training.ranking import embed
from gcl_kernels.training.search_model import SearchModel

AT_ONCE = 65_536
"""Documents whose vectors are added up at a time."""

SCORES_AT_ONCE = 1 << 24
"""Scores in memory at a time, where several queries are searched together."""

SAMPLE = 200
"""Queries on which the recall of an index is measured."""


class Hit(NamedTuple):
    """A document found: its id, its similarity to the query (a cosine, -1 to 1), and its position in the corpus."""

    document_id: str
    score: float
    position: int


class Searcher:
    """The N documents of a corpus, embedded by one model.

    `document_ids` are sorted descending, the order of equal scores, as in evaluation; `documents` maps an id to its values.
    `fields` maps each field of the documents to its vectors (N, D), float32 of unit length, 0 where a document lacks it;
    `vectors` (N, D) are those of the documents, with the fields weighted as the model was trained. Everything is on the CPU.
    Searching is safe from several threads.
    """

    def __init__(
        self, model: SearchModel, documents: Documents, document_ids: list[str], fields: dict[str, Tensor]
    ) -> None:
        self.model, self.documents, self.document_ids, self.fields = model, documents, document_ids, fields
        self.index: Index | None = None
        self._values: dict[str, dict[str, Tensor]] = {}
        self._products = self._inner_products()
        self.vectors = self._weighted(model.right[1])
        self._nowhere = ~(self.vectors != 0).any(dim=1)

    # ---- making one

    @classmethod
    def load(
        cls,
        model: SearchModel,
        corpus: str | Path,
        *,
        folder: str | Path | None = None,
        columns: Sequence[str] = (),
        document_id_key: str | None = None,
        separator: str | None = None,
        batch_size: int = 256,
        say: Callable[[str], None] = print,
    ) -> Searcher:
        """Read a corpus, and its vectors from a folder if they are of this model and corpus; else embed it, and keep them.

        Args:
            corpus, columns, document_id_key, separator: as in `corpora.read_corpus`.
            folder, batch_size, say: as in `of_documents`.

        Raises:
            InputError: a corpus that cannot be read; as `of_documents`.
        """
        documents = read_corpus(
            str(corpus), model.right[0], columns=columns, document_id_key=document_id_key, separator=separator, say=say
        )
        return cls.of_documents(model, documents, name=str(corpus), folder=folder, batch_size=batch_size, say=say)

    @classmethod
    def of_documents(
        cls,
        model: SearchModel,
        documents: Documents,
        *,
        name: str = "corpus",
        folder: str | Path | None = None,
        batch_size: int = 256,
        say: Callable[[str], None] = print,
    ) -> Searcher:
        """`load` of documents that have been read, which several models may share.

        Args:
            documents: `{id: {field: value}}`, all with the same fields, those of the model among them.
            name: what messages call them.
            folder: where vectors are kept, one for each model and corpus; None: nowhere.

        Raises:
            InputError: no document has a value of the model's fields, or one is embedded as NaN.
        """
        kinds = model.right[0]
        document_ids = sorted((key for key, values in documents.items() if any(values[f] for f in kinds)), reverse=True)
        if not document_ids:
            raise DataError(
                f"{name}: expected a document with a value in one of {list(kinds)}, got none among {len(documents)}"
            )
        parts = made_from.corpus_parts(model.encoder.model, model.tokenizer, model.preprocess, documents, kinds)
        path = Path(folder) if folder is not None else None
        if path is not None:
            make_folder(path)
            if kept := read_kept(path, model, parts, say):
                return cls(model, documents, *kept)
        encoder = model.encoder
        before = set(encoder.lost)
        fields = {
            key: embed(
                encoder, {key: [documents[identity][key] for identity in document_ids]}, {key: kind}, {key: 1.0},
                batch_size=batch_size, progress=f"documents, {key}",
            ).cpu()
            for key, kind in kinds.items()
        }  # fmt: skip
        if not all(vectors.isfinite().all() for vectors in fields.values()):
            raise InputError(f"{name}: expected finite embeddings, got NaN or infinity: training has probably diverged")
        # One whose only value is an image that could not be read has no direction.
        there = torch.stack([(vectors != 0).any(dim=1) for vectors in fields.values()]).any(dim=0)
        if not there.any():
            raise DataError(f"{name}: expected a document that can be embedded, got none among {len(documents)}")
        if not there.all():
            document_ids = [key for key, found in zip(document_ids, there.tolist(), strict=True) if found]
            fields = {key: vectors[there] for key, vectors in fields.items()}
        lost = {image: fault for image, fault in encoder.lost.items() if image not in before}
        if lost:
            say(f"{name}: {len(lost)} images could not be read and are missing values")
        if path is not None:
            keep(path, parts, document_ids, fields, lost)
        return cls(model, documents, document_ids, fields)

    def use_index(
        self, kind: str, *, folder: str | Path | None = None, k: int = 10, say: Callable[[str], None] = print
    ) -> float:
        """Search by an index, `"faiss"` or `"hnswlib"`, from now on, where neither weights nor filters differ.

        It is read from the folder if it was made of the same vectors. Returns its recall at k, see `recall`, of `SAMPLE`
        documents as queries; a line says it.
        """
        parts = {"vectors": made_from.digest(part.numpy().tobytes() for part in self.vectors.split(AT_ONCE))}
        path = Path(folder) / f"index.{kind}" if folder is not None else None
        if path is not None and path.exists() and made_from.recorded(path) == parts:
            self.index = Index.load(kind, path, self.vectors.shape[1])
        else:
            self.index = Index.build(kind, self.vectors)
            if path is not None:
                write_atomically(path, self.index.save)
                made_from.record(path, parts)
        places = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        recall = self.recall(self.vectors[places], k)
        say(f"index of {kind}: recall@{k} {recall:.3f} of the exact search, over {len(places)} documents as queries")
        return recall

    # ---- searching

    def __len__(self) -> int:
        return len(self.document_ids)

    def search(
        self,
        query: str | Mapping[str, str | Image] | Tensor,
        k: int = 10,
        *,
        query_weights: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
        where: Mapping[str, Sequence[str]] | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """The k documents most similar to a query, best first; equal scores by document id, descending.

        Args:
            query: a text or fields, as in `SearchModel.embed_query`, or its vector (D,).
            query_weights: of the query's fields.
            weights: of the documents' fields; default: as trained. A document without any field of weight > 0 is not found.
            where: `{column: values}`: documents that have one of the values in each of the columns. Columns are those
                that the corpus was opened with.
            exact: without the index, if there is one.

        Raises:
            InputError: as `embed_query`; unknown fields or columns, weights that are no numbers >= 0 or all 0.
        """
        vector = query if isinstance(query, Tensor) else self.model.embed_query(query, query_weights)
        return self.search_many(vector[None], [k], weights=weights, where=where, exact=exact)[0]

    def search_many(
        self,
        queries: Tensor,
        ks: Sequence[int],
        *,
        weights: Mapping[str, float] | None = None,
        where: Mapping[str, Sequence[str]] | None = None,
        exact: bool = False,
    ) -> list[list[Hit]]:
        """`search` of Q vectors (Q, D) at once, each for its own k: the documents' vectors are read once for all."""
        if any(k < 1 for k in ks):
            raise InputError(f"k: expected a number > 0, got {min(ks)}")
        weights = self._checked(weights)
        allowed = self.matching(where) if where else None
        usual = weights == self.model.right[1]
        found: list[list[Hit]] = []
        if self.index is not None and usual and allowed is None and not exact:
            for vector, k in zip(queries, ks, strict=True):
                positions = self.index.search(vector[None], k)[0].sort().values
                positions = positions[~self._nowhere[positions]]
                scores = self._rescored(vector, weights, positions).float()
                order = scores.sort(descending=True, stable=True).indices
                found.append(self._hits(positions[order], scores[order]))
            return found
        at_once = max(1, SCORES_AT_ONCE // len(self))
        for start in range(0, len(queries), at_once):
            part = slice(start, start + at_once)
            all_scores, error = self._rough(queries[part], weights)
            for vector, rough, k in zip(queries[part], all_scores, ks[part], strict=True):
                rescore = functools.partial(self._rescored, vector, weights)
                found.append(self._hits(*best(rough, k, rescore, error=error, allowed=allowed)))
        return found

    def _hits(self, positions: Tensor, scores: Tensor) -> list[Hit]:
        return [
            Hit(self.document_ids[position], score, position)
            for position, score in zip(positions.tolist(), scores.tolist(), strict=True)
        ]

    def recall(self, queries: Tensor, k: int = 10) -> float:
        """The share of the k best documents that the index finds, over vectors (Q, D) of queries."""
        found = total = 0
        for query in queries:
            right = {hit.position for hit in self.search(query, k, exact=True)}
            found += len(right & {hit.position for hit in self.search(query, k)})
            total += len(right)
        return found / total

    def matching(self, where: Mapping[str, Sequence[str]]) -> Tensor:
        """(N,) bool: which documents have one of the values in each of the columns `{column: values}`."""
        allowed = torch.ones(len(self), dtype=torch.bool)
        for column, values in where.items():
            places = self.values(column)
            chosen = torch.zeros(len(self), dtype=torch.bool)
            for value in values:
                chosen[places.get(value, torch.empty(0, dtype=torch.int64))] = True
            allowed &= chosen
        return allowed

    def values(self, column: str) -> dict[str, Tensor]:
        """`{value: positions}` of a column.

        Raises:
            InputError: a column that the corpus was not opened with.
        """
        if column not in self._values:
            known = list(self.documents[self.document_ids[0]])
            if column not in known:
                raise InputError(f"where: expected a column among {known}, got '{column}'")
            places: dict[str, list[int]] = {}
            for position, identity in enumerate(self.document_ids):
                places.setdefault(self.documents[identity][column], []).append(position)
            self._values[column] = {value: torch.tensor(of) for value, of in places.items()}
        return self._values[column]

    def document(self, position: int) -> dict[str, str]:
        """The values of the document at a position, `{field: value}`; an image is an absolute path."""
        return self.documents[self.document_ids[position]]

    def title(self, position: int) -> str:
        """What a document is called: its first text, else the name of its first image, else its id."""
        kinds, document = self.model.right[0], self.document(position)
        texts = (document[key] for key, kind in kinds.items() if kind == "txt")
        images = (Path(document[key]).name for key, kind in kinds.items() if kind == "img")
        return next(filter(None, [*texts, *images]), self.document_ids[position])

    # ---- arithmetic

    def _checked(self, weights: Mapping[str, float] | None) -> Mapping[str, float]:
        usual = self.model.right[1]
        if weights is None:
            return usual
        if weights.keys() - usual.keys():
            raise InputError(f"weights: expected fields among {list(usual)}, got {list(weights)}")
        chosen = {key: float(weights.get(key, 0.0)) for key in usual}
        if not all(0 <= weight < torch.inf for weight in chosen.values()) or not any(chosen.values()):
            raise InputError(f"weights: expected numbers >= 0, not all 0, got {chosen}")
        total, share = sum(usual.values()), sum(chosen.values())
        chosen = {key: weight / share for key, weight in chosen.items()}
        same = all(abs(chosen[key] - usual[key] / total) < 1e-9 for key in usual)
        return usual if same else chosen

    def _inner_products(self) -> dict[tuple[str, str], Tensor]:
        """(N,) of each two fields of a document: what the length of any weighted sum is made of."""
        keys = list(self.fields)
        return {
            (a, b): torch.cat([
                (x * y).sum(dim=1)
                for x, y in zip(self.fields[a].split(AT_ONCE), self.fields[b].split(AT_ONCE), strict=True)
            ])
            for place, a in enumerate(keys)
            for b in keys[place:]
        }  # fmt: skip

    def _lengths(self, weights: Mapping[str, float]) -> Tensor:
        """Of the weighted sums of the documents' fields, (N,)."""
        squares: Any = sum((1 if a == b else 2) * weights[a] * weights[b] * of for (a, b), of in self._products.items())
        return squares.clamp_min(0).sqrt()

    def _rough(self, queries: Tensor, weights: Mapping[str, float]) -> tuple[Tensor, Tensor | float]:
        """Scores (Q, N) in float32, -inf for documents without any of the weighted fields, and how exact they are."""
        error = error_bound(queries.shape[1])
        if weights == self.model.right[1]:
            scores = _products(self.vectors, queries)
            return (scores.masked_fill(self._nowhere, -torch.inf) if self._nowhere.any() else scores), error
        sums: Any = sum(
            weights[key] * _products(vectors, queries) for key, vectors in self.fields.items() if weights[key]
        )
        lengths = self._lengths(weights)
        # Both the sum and the square of its length are off by eps.
        scores = torch.where(lengths > TINY, sums / lengths.clamp_min(TINY), -torch.inf)
        return scores, error * (1 / lengths.clamp_min(TINY) + 1 / lengths.square().clamp_min(TINY))

    def _rescored(self, query: Tensor, weights: Mapping[str, float], positions: Tensor) -> Tensor:
        """Scores (C,) in float64 of some documents."""
        if weights == self.model.right[1]:
            return self.vectors[positions].double() @ query.double()
        sums: Any = sum(
            weights[key] * vectors[positions].double() for key, vectors in self.fields.items() if weights[key]
        )
        return torch.nn.functional.normalize(sums, dim=1) @ query.double()

    def _weighted(self, weights: Mapping[str, float]) -> Tensor:
        """Vectors (N, D) of the documents for the given weights of their fields."""
        first = next(iter(self.fields.values()))
        vectors = torch.empty_like(first)
        for start in range(0, len(first), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            sums: Any = sum(weights[key] * field[part].double() for key, field in self.fields.items())
            vectors[part] = torch.nn.functional.normalize(sums, dim=1)
        return vectors


def _products(vectors: Tensor, queries: Tensor) -> Tensor:
    """(Q, N) of vectors (N, D) and queries (Q, D)."""
    # MKL takes two to eight queries in a half to a quarter of the time in this order; the other reads the vectors slowly.
    return (vectors @ queries.T).T.contiguous()


TINY = 1e-4
"""A sum of fields, the weights of which add up to 1, that is shorter has no direction: they are missing, or opposite."""
