"""A corpus's vectors in the forms that other programs read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gcl_kernels.training.errors import InputError
from gcl_kernels.training.files import write_atomically, write_json_atomically
from gcl_kernels.training.indexes import Index
from gcl_kernels.training.searching import Searcher

FORMS = {"npz": ".npz", "parquet": ".parquet", "faiss": ".faiss", "hnswlib": ".hnswlib"}
"""Forms and the endings of their files."""


def export(searcher: Searcher, form: str, path: Path) -> list[Path]:
    """Write ids and vectors (N, D), float32 of unit length, in the order of `searcher.document_ids`; returns the files.

    | form | holds |
    |---|---|
    | npz | `ids` (N,) text, `vectors` (N, D): `numpy.load(path)` |
    | parquet | `id`, `vector`, and every column of the documents as text |
    | faiss | an index, the searcher's own if it has one of faiss, else an exact one; ids as a list in PATH.ids.json |
    | hnswlib | an index by inner product; ids as a list in PATH.ids.json |

    Raises:
        InputError: the package of an index, or pyarrow, is not installed.
    """
    vectors, ids = searcher.vectors, searcher.document_ids
    if form == "npz":

        def write_npz(new: Path) -> None:
            with new.open("wb") as file:
                np.savez(file, ids=np.array(ids), vectors=vectors.numpy())

        write_atomically(path, write_npz)
        return [path]
    if form == "parquet":
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise InputError(f"{path}: expected the package pyarrow, got none: pip install pyarrow") from None
        flat = pa.array(vectors.numpy().reshape(-1))
        columns = {"id": pa.array(ids), "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
        for column in searcher.document(0):
            name = column if column not in columns else f"document_{column}"
            columns[name] = pa.array([searcher.documents[identity][column] for identity in ids])
        write_atomically(path, lambda new: parquet.write_table(pa.table(columns), new))
        return [path]
    own = searcher.index if searcher.index is not None and searcher.index.kind == form else None
    index = own or Index.build(form, vectors, flat=form == "faiss")
    write_atomically(path, index.save)
    beside = path.with_name(f"{path.name}.ids.json")
    write_json_atomically(beside, ids)
    return [path, beside]
