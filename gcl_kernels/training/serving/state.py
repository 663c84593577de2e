"""What the search page is answered from: one corpus, embedded by one or two models, its pictures and its grades."""

from __future__ import annotations

import functools
import io
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import torch
from PIL.Image import Image
from torch import Tensor

from gcl_kernels.training.data import KEY_END, decode_image, load_image
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.searching import Hit, Searcher

KEYS = "ab"
"""What the models are called in requests."""

LONGEST_SHOWN = 500
"""Characters of a title or of a column's value that are sent."""

VALUES_LISTED = 100
"""Values of a column that are offered as a filter; a column with more is not listed."""

SUGGESTED = 12
"""Queries with graded documents of this corpus that the page offers."""

PICTURE_SIDE, PICTURES_KEPT = 384, 512
"""Of a picture as it is sent: pixels of its longer side, and how many are kept in memory."""


@dataclass(frozen=True)
class Asked:
    """A search: of model `"a"` or `"b"`, by a text, "" for none, and the bytes of a picture; weights as `Searcher.search`."""

    model: str
    text: str
    picture: bytes | None = None
    k: int = 10
    weights: Mapping[str, float] | None = None
    query_weights: Mapping[str, float] = field(default_factory=dict)
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def alike(self) -> Any:
        """Equal for searches that differ in the query and k alone."""
        filters = tuple((column, tuple(values)) for column, values in self.where.items())
        return self.model, None if self.weights is None else tuple(self.weights.items()), filters


@dataclass
class Opened:
    """A searcher and what its model is called."""

    name: str
    searcher: Searcher


@dataclass
class State:
    """`models` are one or two; `columns` are shown and filtered by; `grades` maps a query, see `key_of`, to documents' grades."""

    corpus: str
    models: Sequence[Opened]
    columns: Sequence[str] = ()
    judged: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.grades = {key_of(query): grades for query, grades in self.judged.items()}
        self.picture = functools.lru_cache(PICTURES_KEPT)(self._picture)
        self._listed = {column: self._values(column) for column in self.columns}
        here = self.models[0].searcher.documents
        self._suggested = [
            query.replace(KEY_END, "") for query, grades in self.judged.items() if any(map(here.__contains__, grades))
        ][:SUGGESTED]
        self._decoding = threading.Lock()

    def searcher(self, key: str) -> Searcher:
        """The searcher of the model `"a"` or `"b"`.

        Raises:
            InputError: no such model.
        """
        place = KEYS.find(key)
        if len(key) != 1 or not 0 <= place < len(self.models):
            raise InputError(f"model: expected one of {list(KEYS[: len(self.models)])}, got '{key[:20]}'")
        return self.models[place].searcher

    def about(self) -> dict[str, Any]:
        """What `/api/corpus` says."""
        return {
            "name": self.corpus,
            "size": len(self.models[0].searcher),
            "columns": self._listed,
            "models": [
                {
                    "key": key,
                    "name": of.name,
                    "size": len(of.searcher),
                    "dimensions": of.searcher.vectors.shape[1],
                    "fields": of.searcher.model.right[1],
                    "exact": of.searcher.index is None,
                }
                for key, of in zip(KEYS, self.models, strict=False)
            ],
            "judged": len(self.grades),
            "queries": self._suggested,
        }

    def search(self, asked: Sequence[Asked]) -> list[dict[str, Any] | Exception]:
        """What `/api/search` says to each request, or why it cannot be answered: those that differ in the query alone are
        searched together.

        An answer may be an InputError: as of `Searcher.search`, or of a filter by a column that is not among `columns`.
        """
        answers: list[Any] = [None] * len(asked)
        together: dict[Any, list[tuple[int, Tensor, float]]] = {}
        for place, of in enumerate(asked):
            started = time.perf_counter()
            try:
                vector = self._embed(of)
            except InputError as error:
                answers[place] = error
                continue
            together.setdefault(of.alike, []).append((place, vector, 1e3 * (time.perf_counter() - started)))
        for places in together.values():
            first = asked[places[0][0]]
            searcher = self.searcher(first.model)
            started = time.perf_counter()
            try:
                vectors, ks = (
                    torch.stack([vector for _, vector, _ in places]),
                    [asked[place].k for place, _, _ in places],
                )
                found = searcher.search_many(vectors, ks, weights=first.weights, where=first.where or None)
            except InputError as error:
                for place, _, _ in places:
                    answers[place] = error
                continue
            took = 1e3 * (time.perf_counter() - started)
            for (place, _, embedding), hits in zip(places, found, strict=True):
                answers[place] = self._answer(asked[place], searcher, hits)
                answers[place]["milliseconds"] = {"embed": embedding, "search": took}
        return answers

    def _embed(self, asked: Asked) -> Tensor:
        model = self.searcher(asked.model).model
        if unknown := [column[:100] for column in asked.where if column not in self.columns]:
            raise InputError(f"where: expected columns among {list(self.columns)}, got {unknown}")
        names = model.query_keys
        if unknown := [name[:100] for name in asked.query_weights if name not in names]:
            raise InputError(f"query_weights: expected fields among {list(names)}, got {unknown}")
        values: dict[str, str | Image] = {names["text"]: asked.text}
        if asked.picture is not None:
            values[names["image"]] = decode_image(io.BytesIO(asked.picture), "of the request")
        return model.embed_query(values, {names[name]: of for name, of in asked.query_weights.items()})

    def _answer(self, asked: Asked, searcher: Searcher, hits: Sequence[Hit]) -> dict[str, Any]:
        grades = self.grades.get(key_of(asked.text)) if asked.picture is None else None
        results = []
        for rank, hit in enumerate(hits, 1):
            document = searcher.document(hit.position)
            results.append({
                "rank": rank,
                "id": hit.document_id,
                "score": hit.score,
                "title": searcher.title(hit.position)[:LONGEST_SHOWN],
                "image": f"/image/{quote(hit.document_id, safe='')}" if _image_of(searcher, document) else None,
                "columns": {column: document[column][:LONGEST_SHOWN] for column in self.columns if document[column]},
                "grade": grades.get(hit.document_id, 0) if grades is not None else None,
            })  # fmt: skip
        return {"model": asked.model, "judged": grades is not None, "results": results}

    def _picture(self, identity: str) -> tuple[bytes, str] | None:
        """The picture of a document as PNG or JPEG and its content type; None if there is none, or it cannot be read.

        It is decoded and encoded anew, so that nothing but pixels leaves, whatever the file holds.
        """
        for of in self.models:
            document = of.searcher.documents.get(identity)
            path = _image_of(of.searcher, document) if document else ""
            if not path:
                continue
            try:
                with self._decoding:  # a picture may have hundreds of megabytes of pixels
                    picture = load_image(path)
                    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            except InputError:
                continue
            small = max(picture.size) <= PICTURE_SIDE // 2  # drawings and icons, which JPEG would blur
            content = io.BytesIO()
            picture.save(content, "PNG" if small else "JPEG")
            return content.getvalue(), "image/png" if small else "image/jpeg"
        return None

    def _values(self, column: str) -> list[str]:
        values = sorted(filter(None, self.models[0].searcher.values(column)))
        return values if len(values) <= VALUES_LISTED and all(len(of) <= LONGEST_SHOWN for of in values) else []


def key_of(query: str) -> str:
    """A query as grades are looked up by: without the mark that ends an id made of its text, in lower case."""
    return " ".join(query.replace(KEY_END, " ").split()).casefold()


def _image_of(searcher: Searcher, document: Mapping[str, str]) -> str:
    """The path of a document's first image, "" where it has none."""
    kinds = searcher.model.right[0]
    return next((document[name] for name, kind in kinds.items() if kind == "img" and document[name]), "")
