"""Parquet files: their rows by number, and what is damaged by the rows that it costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gcl_kernels.training.data.faults import one_line, reason
from gcl_kernels.training.data.rows import Row
from gcl_kernels.training.data.streams import open_plain
from gcl_kernels.training.data.tables import listed
from gcl_kernels.training.data.values import Unreadable
from gcl_kernels.training.errors import DataError, InputError

BATCH = 8192
"""Rows in memory at a time."""


def parquet_rows(path: Path, names: list[str]) -> Iterator[Row]:
    """The rows of a file, `BATCH` in memory at a time. A row group that cannot be read costs its own rows.

    Raises:
        DataError: what is no Parquet file, and a file without exactly one of each of `names`.
        InputError: pyarrow is not installed.
    """
    parquet = _pyarrow(path)
    shown = one_line(str(path))
    try:
        handle = open_plain(path)
    except OSError as error:
        raise DataError(f"{shown}: expected a readable file, got {reason(error)}") from None
    with handle:
        try:
            file = parquet.ParquetFile(handle, page_checksum_verification=True)
            columns = file.schema_arrow.names
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:
                raise ValueError(f"{file.metadata.num_rows} rows in groups of {groups[:10]}")
        except Exception as error:  # Arrow's own classes, and what Python makes of a damaged schema
            raise DataError(f"{shown}: expected a readable Parquet file, got {reason(error)}") from None
        for name in names:
            if columns.count(name) != 1:
                raise DataError(
                    f"{shown}: expected one column '{name}', got {columns.count(name)} among the columns {listed(columns)}"
                )
        folder, before = str(path.parent.resolve()), 0
        for group, size in enumerate(groups):
            done = 0
            try:
                for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=names):
                    cells = {name: values_of(batch.column(name), name) for name in names}
                    for place in range(min(batch.num_rows, size - done)):
                        done += 1
                        row = {name: cells[name][place] for name in names}
                        yield Row(f"{path}, row {before + done}", row, None, folder)
                fault = "fewer rows than its group has"
            except Exception as error:
                fault = reason(error)
            for number in range(done + 1, size + 1):
                yield Row(f"{path}, row {before + number}", {}, f"expected readable pages, got {fault}", folder)
            before += size


def parquet_columns(path: Path) -> list[str]:
    """The names of a file's columns; errors as `parquet_rows`."""
    parquet = _pyarrow(path)
    try:
        with open_plain(path) as file:
            return list(parquet.read_schema(file).names)
    except Exception as error:  # of the system, and Arrow's own classes
        raise DataError(f"{one_line(str(path))}: expected a readable Parquet file, got {reason(error)}") from None


def _pyarrow(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path}: expected the package pyarrow for a Parquet file, got none: pip install pyarrow"
        ) from None
    return parquet


def values_of(column: Any, name: str) -> list[Any]:
    """The values of a column as Python has them; what is no UTF-8 as a CSV file would give it, with surrogates."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_float16(column.type) or pa.types.is_float32(column.type):
        # The shortest notation of the number as it is stored: 0.1, where the double next to it is 0.10000000149011612.
        return [None if value is None else float(str(value)) for value in _singles(column)]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
        return [None if value is None else value.decode(errors="surrogateescape") for value in binary.to_pylist()]
    except Exception as error:  # a date that Python does not have, an extension without a Python type
        fault = Unreadable(f"expected text or a number in column '{name}', got {column.type}: {reason(error)}")
        return [fault if column.is_valid()[place].as_py() else None for place in range(len(column))]


def _singles(column: Any) -> list[Any]:
    import numpy as np

    kind = np.float16 if str(column.type) == "halffloat" else np.float32
    return [None if value is None else kind(value) for value in column.to_pylist()]
