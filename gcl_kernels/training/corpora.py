"""The documents that are searched: from a corpus in JSON, or from the rows of any file that training reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gcl_kernels.training import made_from
from gcl_kernels.training.data import DOCUMENT_IDS, columns_in, first_of, read_documents, read_pairs, shown
from gcl_kernels.training.data.names import data_ending
from gcl_kernels.training.ranking import corpus_of

Documents = dict[str, dict[str, str]]
"""`{id: {field: value}}`; "" is a missing value, and an image is an absolute path."""


def read_corpus(
    path: str,
    fields: Mapping[str, str],
    *,
    columns: Sequence[str] = (),
    document_id_key: str | None = None,
    separator: str | None = None,
    say: Callable[[str], None] = print,
) -> Documents:
    """Read documents; bad ones are left out, and a line says which. Images are looked at when they are embedded.

    Args:
        path: JSON `{id: {field: value}}`, or CSV, TSV, Parquet or webdataset with one document a row.
        fields: `{field: "txt" or "img"}`, what is embedded. A row needs a value in one of them.
        columns: more columns to keep, as text: what results are shown with, or filtered by.
        document_id_key: of a file of rows; None: the first of `DOCUMENT_IDS` that it has. Of several rows with one id the
            fullest counts. A file without ids gets one for each document, made of its cells.

    Raises:
        DataError: as the readers.
    """
    kinds = {**dict.fromkeys(columns, "txt"), **fields}
    if data_ending(Path(path)) == ".json":
        return read_documents(path, kinds, check_images="none", skip_bad_rows=True)
    if document_id_key is None:
        document_id_key = first_of(DOCUMENT_IDS, columns_in(path, separator=separator) or [])
    # A row is bad without a value on the left: there stand the fields that are embedded, and on the right all of them.
    pairs = read_pairs(
        path, fields, kinds, None, document_id_key=document_id_key, separator=separator, check_images="none",
        skip_bad_rows=True,
    )  # fmt: skip
    if pairs.bad_count:
        say("\n  ".join([f"{path}: {pairs.bad_count} bad rows left out:", *shown(pairs.bad_rows, pairs.bad_count)]))
    documents = corpus_of(pairs)
    return documents if document_id_key else {made_from.short_id(key): value for key, value in documents.items()}
