"""The names of a file's columns, and what they mean by custom."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gcl_kernels.training.data.names import files_of
from gcl_kernels.training.data.parquet import parquet_columns
from gcl_kernels.training.data.tables import Table, separator_of

DOCUMENT_IDS = ("document", "document_id", "doc_id", "product_id", "docid", "doc-id", "item_id", "id")
"""Columns that identify a document by custom, the first that is there."""


def columns_in(path: str | Path, *, separator: str | None = None, dataset_type: str = "auto") -> list[str] | None:
    """The columns of a file, of several of the first; None where they cannot be known before it is read: tar files, pipes.

    Raises:
        DataError: as the readers of rows.
    """
    files, kind = files_of(path, dataset_type)
    first = files[0]
    if kind == "parquet":
        return parquet_columns(first)
    if kind == "webdataset" or (os.path.exists(first) and not os.path.isfile(first)):
        return None
    table = Table(first, separator or separator_of(first), [])
    table.close()
    return table.header


def first_of(names: Iterable[str], columns: list[str]) -> str | None:
    """The first of `names` that is among `columns`."""
    return next((name for name in names if name in columns), None)
