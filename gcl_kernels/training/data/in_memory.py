"""Rows of tables in memory: a DataFrame, an Arrow table, or mappings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gcl_kernels.training.data.faults import one_line, quoted
from gcl_kernels.training.data.parquet import BATCH, values_of
from gcl_kernels.training.data.rows import Row
from gcl_kernels.training.data.tables import listed
from gcl_kernels.training.errors import DataError, InputError


def table_rows(table: Any, names: list[str], name: str, folder: str) -> Iterator[Row]:
    """The rows of a table, counted from 1; `name` is what messages call it, `folder` where relative image paths start.

    Args:
        table: a pandas DataFrame; what has Arrow's `__arrow_c_stream__`, such as a pyarrow Table or a polars DataFrame; or
            an iterable of mappings `{column: value}`, in which a column that a row lacks is a missing value.

    Raises:
        TypeError: it is none of these.
        DataError: it has not exactly one of each of `names`.
        InputError: pyarrow, which reads Arrow's tables, is not installed.
    """
    if hasattr(table, "iloc") and hasattr(table, "columns"):
        parts = _of_pandas(table, names, name)
    elif hasattr(table, "__arrow_c_stream__"):
        parts = _of_arrow(table, names, name)
    elif isinstance(table, Iterable) and not isinstance(table, (str, bytes, Mapping)):
        yield from _of_mappings(list(table), names, name, folder)
        return
    else:
        raise TypeError(f"{name}: expected a DataFrame, an Arrow table or an iterable of mappings, got "
                        f"{type(table).__name__}")  # fmt: skip
    number = 0
    for columns in parts:
        for values in zip(*columns, strict=True):
            number += 1
            yield Row(f"{name}, row {number}", dict(zip(names, map(_python, values), strict=True)), None, folder)


def _of_pandas(table: Any, names: list[str], name: str) -> Iterator[list[list[Any]]]:
    _expect_columns(list(table.columns), names, name)
    for start in range(0, len(table), BATCH):
        part = table.iloc[start : start + BATCH]
        yield [_of_series(part[key]) for key in names]


def _of_series(series: Any) -> list[Any]:
    there = series.notna().tolist()
    values = series.astype(object).tolist()
    if str(series.dtype).lower() in ("float16", "float32"):
        # The shortest notation of the number as it is stored: 0.1, where the double next to it is 0.10000000149011612.
        values = [float(str(value)) for value in series.to_numpy(str(series.dtype).lower(), na_value=np.nan)]
    return [value if given else None for value, given in zip(values, there, strict=True)]


def _of_arrow(table: Any, names: list[str], name: str) -> Iterator[list[list[Any]]]:
    try:
        import pyarrow as pa
    except ImportError:
        raise InputError(
            f"{name}: expected the package pyarrow for an Arrow table, got none: pip install pyarrow"
        ) from None
    arrow = pa.table(table)
    _expect_columns(arrow.column_names, names, name)
    for batch in arrow.select(names).to_batches(max_chunksize=BATCH):
        yield [values_of(batch.column(key), key) for key in names]


def _of_mappings(rows: list[Any], names: list[str], name: str, folder: str) -> Iterator[Row]:
    mappings = [row for row in rows if isinstance(row, Mapping)]
    for key in names:
        if mappings and not any(key in row for row in mappings):
            _expect_columns(list(dict.fromkeys(found for row in mappings for found in row)), [key], name)
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        if isinstance(row, Mapping):
            yield Row(where, {key: _python(row.get(key)) for key in names}, None, folder)
        else:
            yield Row(where, {}, f"expected a mapping {{column: value}}, got {quoted(row)}", folder)


def _expect_columns(columns: list[Any], names: list[str], name: str) -> None:
    for key in names:
        if columns.count(key) != 1:
            raise DataError(f"{one_line(name)}: expected one column '{key}', got {columns.count(key)} among the columns "
                            f"{listed([str(column) for column in columns])}")  # fmt: skip


def _python(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if type(value) in (np.float16, np.float32):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value
