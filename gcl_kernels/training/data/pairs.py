"""Reading scored pairs and document metadata, and saying what is wrong with them by file and line number.

A file of pairs is read once from end to end. What stays in memory of a row is where it is, its score and two numbers that
stand for its ids: some 40 bytes. Its cells are read again when a batch needs them, so that millions of rows can be drawn
in a truly random order.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gcl_kernels.training.data.faults import LINES_SHOWN, one_line, shown
from gcl_kernels.training.data.images import ImageCheck
from gcl_kernels.training.data.in_memory import table_rows
from gcl_kernels.training.data.names import files_of
from gcl_kernels.training.data.parquet import parquet_rows
from gcl_kernels.training.data.rows import Row
from gcl_kernels.training.data.streams import open_plain
from gcl_kernels.training.data.tables import Table, separator_of
from gcl_kernels.training.data.values import image_path, number_of, score_fault, texts_of, utf8_fault
from gcl_kernels.training.data.webdataset import Samples
from gcl_kernels.training.errors import DataError, EmptyError, InputError

KEY_END = "_{!@#~}_"
"""What the GCL evaluator writes after each left column to make a query's key of them."""


@dataclass
class Pairs:
    """N good rows of a file, in memory: a query, a document and a score each, as the cells were written.

    `left` and `right` map each field to its N cells; "" is a missing value, and image cells are absolute paths.
    `bad_rows` describes the first of the `bad_count` rows of the file that were skipped, one line each.
    """

    path: Path
    left: dict[str, list[str]]
    right: dict[str, list[str]]
    scores: list[float] = field(default_factory=list)
    query_ids: list[str] = field(default_factory=list)
    document_ids: list[str] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)
    bad_count: int = 0

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Columns:
    """What the columns of a file of pairs mean.

    Args:
        left, right: the columns of the query and of the document, each `"txt"` or `"img"`. An image cell is a path,
            relative to the file's own folder.
        weight_key: the column of the score, a finite number >= 0; None: every score is 1.
        query_id_key, document_id_key: columns that identify query and document. Without them the id is made of the
            side's own cells, each followed by `KEY_END`.
    """

    left: Mapping[str, str]
    right: Mapping[str, str]
    weight_key: str | None
    query_id_key: str | None = None
    document_id_key: str | None = None

    @property
    def names(self) -> list[str]:
        """Every column that is read, each once."""
        others = [key for key in (self.weight_key, self.query_id_key, self.document_id_key) if key]
        return list(dict.fromkeys([*self.left, *self.right, *others]))

    def score(self, row: Mapping[str, str]) -> float:
        return 1.0 if self.weight_key is None else number_of(row[self.weight_key])

    def query_id(self, row: Mapping[str, str]) -> str:
        return row[self.query_id_key] if self.query_id_key else "".join(row[key] + KEY_END for key in self.left)

    def document_id(self, row: Mapping[str, str]) -> str:
        return row[self.document_id_key] if self.document_id_key else "".join(row[key] + KEY_END for key in self.right)


class PairFile:
    """The N good rows of files of pairs, read when they are asked for.

    `scores` (N,) float64; `query_numbers` and `document_numbers` (N,) int64 >= 0, equal where the ids are (63 bits of
    a hash: two of a hundred million ids meet with a chance of 1 in 2,000). `bad_rows` describes the first of the
    `bad_count` rows that were skipped.

    Args:
        path: the name of a file, or of several of one type, as `files_of` reads names: a UTF-8 CSV or TSV file with a header
            line, plain or packed with gzip, bzip2 or xz, or a pipe of such text, whose cells may be quoted and may hold line
            breaks, blank lines passed over; a Parquet file; or a webdataset tar file. In a sample of that a column is a
            key of the `json` member, else the member with that name as its ending, in lower case (an image is read from
            within the tar file when it is needed). What a value is follows the same rules in all: `data.values`.
        separator: one character; None is a tab for `.tsv` and a comma otherwise.
        dataset_type: `"csv"`, `"parquet"`, `"webdataset"`, or `"auto"`, by the ending.
        check_images: `"decode"` every image once, ask whether it `"exists"`, or `"none"`.
        skip_bad_rows: leave bad rows out instead of refusing the file.
        image_root: the folder that relative image paths start from, instead of the file's own; for a table that is the
            current one.
        table: rows in memory in the place of files, as `table_rows` takes them; `path` is then its name in messages.

    Raises:
        TypeError: a table of a kind that is not read.
        DataError: a missing file or column, an empty file, no row at all or no good one; and, unless they are skipped,
            bad rows: too few or too many cells, a score that is no finite number >= 0, a value that is neither text nor a
            number, a missing or unreadable image, a side without any value, an empty id, a quoted cell that never ends,
            text that is no UTF-8, a file that breaks off or is damaged.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Columns,
        *,
        separator: str | None = None,
        dataset_type: str = "auto",
        check_images: str = "decode",
        skip_bad_rows: bool = False,
        image_root: str | Path | None = None,
        table: Any = None,
    ) -> None:
        self.path, self.columns = Path(path), columns
        self.bad_rows: list[str] = []
        self.bad_count = 0
        if separator is not None and (len(separator) != 1 or separator in '"\r\n\0'):
            raise InputError(f"expected one character that separates cells, no quote or line end, got {separator!r}")
        self._files, dataset_type = ([], "table") if table is not None else files_of(path, dataset_type)
        own = self._files[0].parent if self._files else Path()
        self._root = None if image_root is None else str(Path(image_root).resolve())
        self._folder = self._root or str(own.resolve())
        self._one_folder = self._root is not None or len({file.parent for file in self._files}) <= 1
        self._store: _InPlace | _Copy | None = None
        self._offsets, self._lengths = array("q"), array("l")
        scores, queries, documents = array("d"), array("q"), array("q")
        images = ImageCheck(check_images)
        found_rows = False
        rows = (
            self._rows(str(path), dataset_type, separator)
            if table is None
            else table_rows(table, columns.names, str(path), self._folder)
        )
        for where, values, fault, folder, place in rows:
            found_rows = True
            folder = self._root or folder
            row, faults = ({}, [fault]) if fault else self._texts(values, folder)
            faults = faults or _row_faults(row, columns, folder, images)
            if faults:
                self.bad_count += 1
                if len(self.bad_rows) < LINES_SHOWN:
                    self.bad_rows.append(one_line(f"{where}: {'; '.join(faults)}"))
                continue
            offset, length = self._kept(row, place)
            self._offsets.append(offset)
            self._lengths.append(length)
            scores.append(columns.score(row))
            queries.append(_number(columns.query_id(row)))
            documents.append(_number(columns.document_id(row)))

        name = one_line(str(path))
        if not found_rows:
            place = f"{name}, line 2" if dataset_type == "csv" else name
            after = " after the header" if dataset_type == "csv" else ""
            raise EmptyError(f"{place}: expected at least one row{after}, got none")
        if self.bad_count and not skip_bad_rows:
            raise DataError("\n".join(shown(self.bad_rows, self.bad_count)))
        if not scores:
            bad = shown(self.bad_rows, self.bad_count)
            raise DataError("\n".join([f"{name}: expected at least one good row, got none", *bad]))
        self.scores = torch.frombuffer(scores, dtype=torch.float64)
        self.query_numbers = torch.frombuffer(queries, dtype=torch.int64)
        self.document_numbers = torch.frombuffer(documents, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.scores)

    def __del__(self) -> None:
        if getattr(self, "_store", None) is not None:
            self._store.close()  # pyright: ignore[reportOptionalMemberAccess]

    def take(self, rows: Iterable[int] | None = None) -> Pairs:
        """Read some rows, by number from 0 to N - 1, in the order given; None: all."""
        columns = self.columns
        pairs = Pairs(self.path, {key: [] for key in columns.left}, {key: [] for key in columns.right},
                      bad_rows=self.bad_rows, bad_count=self.bad_count)  # fmt: skip
        for number in range(len(self)) if rows is None else rows:
            row = self._store.read(self._offsets[number], self._lengths[number])  # pyright: ignore[reportOptionalMemberAccess]
            for kinds, cells in ((columns.left, pairs.left), (columns.right, pairs.right)):
                for key, kind in kinds.items():
                    cells[key].append(image_path(self._folder, row[key]) if kind == "img" else row[key])
            pairs.scores.append(columns.score(row))
            pairs.query_ids.append(columns.query_id(row))
            pairs.document_ids.append(columns.document_id(row))
        return pairs

    def _rows(self, name: str, dataset_type: str, separator: str | None) -> Iterator[Row]:
        """The rows of all files, one after the other; where they are kept is known before the first comes."""
        names = self.columns.names
        kinds = {**self.columns.left, **self.columns.right}
        samples = Samples(names, {key for key, kind in kinds.items() if kind == "img"})
        for file in self._files:
            if dataset_type == "csv":
                table = Table(file, separator or separator_of(file), names)
                if table.in_place and len(self._files) == 1:
                    self._store = _InPlace(table)
                yield from table.rows()
            else:
                yield from parquet_rows(file, names) if dataset_type == "parquet" else samples.rows(file)
        samples.check(name)

    def _texts(self, values: Mapping[str, Any], folder: str) -> tuple[dict[str, str], list[str]]:
        row, faults = texts_of(values)
        if not self._one_folder:
            # One relative path means another image in each folder.
            kinds = {**self.columns.left, **self.columns.right}
            row.update({key: image_path(folder, row[key]) for key, kind in kinds.items() if kind == "img"})
            if fault := utf8_fault(folder):
                faults.append(fault)
        return row, faults

    def _kept(self, row: Mapping[str, str], place: tuple[int, int] | None) -> tuple[int, int]:
        """Where a good row can be read again."""
        if isinstance(self._store, _InPlace) and place:
            return place
        if not isinstance(self._store, _Copy):
            self._store = _Copy(self.columns.names)
        return self._store.write(row)


class _InPlace:
    """Reads rows of a plain CSV file again where they are."""

    def __init__(self, table: Table) -> None:
        self._table, self._file = table, open_plain(table.path)

    def read(self, offset: int, length: int) -> dict[str, str]:
        self._file.seek(offset)
        return texts_of(self._table.cells_of(self._file.read(length)))[0]

    def close(self) -> None:
        self._file.close()


class _Copy:
    """A file of this reader's own, deleted with it, for rows that their own file does not give one at a time."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._end, self._file = names, 0, tempfile.TemporaryFile()  # noqa: SIM115

    def write(self, row: Mapping[str, str]) -> tuple[int, int]:
        content = json.dumps([row[name] for name in self._names], ensure_ascii=False).encode()
        try:
            self._file.write(content)
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: expected room for a copy of the rows, got '{error.strerror}'"
            ) from None
        self._end += len(content)
        return self._end - len(content), len(content)

    def read(self, offset: int, length: int) -> dict[str, str]:
        self._file.seek(offset)
        return dict(zip(self._names, json.loads(self._file.read(length)), strict=True))

    def close(self) -> None:
        self._file.close()


def read_pairs(
    path: str | Path,
    left: Mapping[str, str],
    right: Mapping[str, str],
    weight_key: str | None,
    *,
    query_id_key: str | None = None,
    document_id_key: str | None = None,
    **options: Any,
) -> Pairs:
    """All good rows of a file in memory; arguments and errors as in `Columns` and `PairFile`."""
    return PairFile(path, Columns(left, right, weight_key, query_id_key, document_id_key), **options).take()


def _number(identity: str) -> int:
    """63 bits of a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little") >> 1


def _row_faults(row: Mapping[str, str], columns: Columns, folder: str, images: ImageCheck) -> list[str]:
    faults = []
    if columns.weight_key and (fault := score_fault(row[columns.weight_key], columns.weight_key)):
        faults.append(fault)
    for fields in (columns.left, columns.right):
        if not any(row[key] for key in fields):
            faults.append(f"expected a value in at least one of the columns {list(fields)}, got none")
        for key, kind in fields.items():
            if kind == "img" and row[key] and (fault := images(image_path(folder, row[key]))):
                faults.append(f"expected a readable image in column '{key}', got {fault}")
    ids = columns.query_id_key, columns.document_id_key
    faults += [f"expected an id in column '{key}', got an empty cell" for key in ids if key and not row[key]]
    return faults
