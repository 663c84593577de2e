"""Approximate indexes of faiss and hnswlib, both HNSW graphs, for corpora too large to be searched whole.

pip install "gcl_kernels[search]"
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcl_kernels.training.errors import InputError

KINDS = {"faiss": "faiss-cpu", "hnswlib": "hnswlib"}
"""Kinds of index, and the packages on PyPI that they need."""

NEIGHBOURS, BUILD_BREADTH, SEARCH_BREADTH = 32, 200, 128
"""Of the graph: links of a node, and candidates kept while building and while searching."""


def available() -> str | None:
    """The first kind of index whose package is installed."""
    return next((kind for kind in KINDS if importlib.util.find_spec(kind)), None)


def expect(kind: str) -> None:
    """Raise InputError where the package of an index is not installed."""
    if importlib.util.find_spec(kind) is None:
        raise InputError(f"{kind}: expected the package {KINDS[kind]}, got none: pip install {KINDS[kind]}")


def import_faiss() -> Any:
    with warnings.catch_warnings():
        # SWIG's types, on Python 3.12 and later
        warnings.simplefilter("ignore", DeprecationWarning)
        import faiss  # pyright: ignore[reportMissingImports]
    return faiss


class Index:
    """An index of N vectors of unit length by inner product.

    Args:
        kind: `"faiss"` or `"hnswlib"`.
        content: the library's own object.
    """

    def __init__(self, kind: str, content: Any) -> None:
        self.kind, self.content = kind, content

    @classmethod
    def build(cls, kind: str, vectors: Tensor, *, flat: bool = False) -> Index:
        """Index vectors (N, D); `flat`, of faiss alone, makes an exact one, which compares with all."""
        expect(kind)
        array = np.ascontiguousarray(vectors.numpy(), dtype=np.float32)
        if kind == "faiss":
            faiss = import_faiss()
            inner = faiss.METRIC_INNER_PRODUCT
            content: Any = faiss.IndexFlatIP(array.shape[1])
            if not flat:
                content = faiss.IndexHNSWFlat(array.shape[1], NEIGHBOURS, inner)
                content.hnsw.efConstruction = BUILD_BREADTH
            content.add(array)
        else:
            import hnswlib  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

            content = hnswlib.Index(space="ip", dim=array.shape[1])
            content.init_index(len(array), ef_construction=BUILD_BREADTH, M=NEIGHBOURS, random_seed=0)
            content.add_items(array, np.arange(len(array)), num_threads=torch.get_num_threads())
        return cls(kind, content)

    @classmethod
    def load(cls, kind: str, path: Path, dimension: int) -> Index:
        expect(kind)
        if kind == "faiss":
            return cls(kind, import_faiss().read_index(str(path)))
        import hnswlib  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

        content = hnswlib.Index(space="ip", dim=dimension)
        content.load_index(str(path))
        return cls(kind, content)

    def save(self, path: Path) -> None:
        if self.kind == "faiss":
            import_faiss().write_index(self.content, str(path))
        else:
            self.content.save_index(str(path))

    def search(self, queries: Tensor, k: int) -> list[Tensor]:
        """Positions of about the k best documents of each query (Q, D), in no order that counts."""
        array = np.ascontiguousarray(queries.numpy(), dtype=np.float32)
        breadth = max(SEARCH_BREADTH, 2 * k)
        if self.kind == "faiss":
            if hasattr(self.content, "hnsw"):
                self.content.hnsw.efSearch = breadth
            found = self.content.search(array, min(k, self.content.ntotal))[1]
        else:
            self.content.set_ef(breadth)
            found = self.content.knn_query(array, k=min(k, self.content.get_current_count()))[0]
        return [torch.from_numpy(row[row >= 0].astype(np.int64)) for row in found]
