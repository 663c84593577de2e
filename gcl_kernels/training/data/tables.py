"""CSV and TSV files: their rows by physical line number, and none lost to a stray quote or a damaged end."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gcl_kernels.training.data.faults import one_line, quoted
from gcl_kernels.training.data.names import data_ending
from gcl_kernels.training.data.rows import Row
from gcl_kernels.training.data.streams import TextStream
from gcl_kernels.training.data.values import LONGEST_CELL, too_long, utf8_fault
from gcl_kernels.training.errors import DataError

csv.field_size_limit(LONGEST_CELL)  # of the whole process; Python's own limit, 131,072, is less than a long document

COLUMNS_SHOWN = 30
"""Columns of a header that a message repeats."""


def separator_of(path: Path) -> str:
    """A tab for `.tsv`, packed or not, else a comma."""
    return "\t" if data_ending(path) == ".tsv" else ","


class Table:
    """A CSV or TSV file: its `header`, and its rows.

    `in_place` says whether a row can be read again from the file itself, by `Row.place` and `cells_of`.

    Raises:
        DataError: what cannot be opened or is no UTF-8 text, and a header without exactly one of each of `names`.
    """

    def __init__(self, path: Path, separator: str, names: list[str]) -> None:
        self.path, self._separator = path, separator
        self._stream = TextStream(path)
        self.in_place = self._stream.in_place
        try:
            self._lines = _Lines(self._stream)
            # A byte order mark is no part of the first line, and yet three bytes of the file.
            start = 3 if self._stream.file.peek(3)[:3] == b"\xef\xbb\xbf" else 0
            self._records = _records(self._lines, separator, start)
            first = next(self._records, _Record(1, 0, 0, [], None))
            self._places = self._checked(first, names)
            self.header = [name.strip() for name in first.cells]
            self._width = len(first.cells)
        except BaseException:
            self._stream.close()
            raise

    def rows(self) -> Iterator[Row]:
        """The rows, one at a time, blank lines passed over; the file is closed after the last."""
        folder = str(self.path.parent.resolve())
        try:
            for number, offset, length, cells, fault in self._records:
                named = {}
                if not fault and len(cells) != self._width:
                    fault = f"expected {self._width} cells as in the header, got {len(cells)}"
                if not fault:
                    named = {name: cells[place] for name, place in self._places.items()}
                yield Row(f"{self.path}, line {number}", named, fault, folder, (offset, length))
            if self._stream.damage:
                fault = f"{self._stream.damage}; what follows the last whole line is lost"
                yield Row(f"{self.path}", {}, fault, folder)
        finally:
            self._stream.close()

    def close(self) -> None:
        """Close a file whose rows are not read to the end."""
        self._stream.close()

    def cells_of(self, content: bytes) -> dict[str, str]:
        """The cells of a good row whose bytes have been read again."""
        cells = next(csv.reader([content.decode()], delimiter=self._separator, strict=True))
        return {name: cells[place] for name, place in self._places.items()}

    def _checked(self, record: _Record, names: list[str]) -> dict[str, int]:
        header, place = [name.strip() for name in record.cells], f"{one_line(str(self.path))}, line 1"
        if self._stream.damage and not header:
            raise DataError(f"{one_line(str(self.path))}: {self._stream.damage}")
        if record.fault or not header:
            raise DataError(
                f"{place}: expected a header with the columns {names}, got {record.fault or 'an empty file'}"
            )
        if fault := next(filter(None, map(utf8_fault, header)), None):
            raise DataError(f"{place}: {fault}")
        for name in names:
            if header.count(name) != 1:
                raise DataError(
                    f"{place}: expected one column '{name}', got {header.count(name)} among the columns {listed(header)}"
                )
        return {name: header.index(name) for name in names}


def listed(names: list[str]) -> str:
    """Names as a message shows them."""
    more = f" and {len(names) - COLUMNS_SHOWN} more" if len(names) > COLUMNS_SHOWN else ""
    return f"[{', '.join(quoted(name) for name in names[:COLUMNS_SHOWN])}]{more}"


class _Record(NamedTuple):
    """The number of the first physical line, the first byte and their number, the cells, what is wrong."""

    line: int
    offset: int
    length: int
    cells: list[str]
    fault: str | None


class _Lines:
    """The physical lines of a file, remembering those of the record being read so that they can be given back."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        # A byte that is no UTF-8 becomes a lone surrogate here, so that one bad row does not stop the whole file.
        self._file = io.TextIOWrapper(stream.file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._returned: deque[str] = deque()
        self.record: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._file)
        if self._stream.damage and not line.endswith(("\n", "\r")):
            raise StopIteration  # the file breaks off within this line, and where its last cell ends is not known
        self.record.append(line)
        return line

    def keep_first(self) -> None:
        """Give back every line of the current record but its first."""
        self._returned.extendleft(reversed(self.record[1:]))
        self.record = self.record[:1]


def _records(lines: _Lines, separator: str, offset: int = 0) -> Iterator[_Record]:
    """Each record; blank lines are passed over, and `offset` is where the first line starts.

    A stray quote opens a cell that takes in the following lines up to the next quote or the end of the file. Such a
    record costs only its first line: the lines after it are read again on their own. It is known by a cell that
    never ends, by text after a closing quote, or by a wrong number of cells when one of the lines taken in has the
    right number on its own.
    """
    reader = csv.reader(lines, delimiter=separator, strict=True)
    number, width = 1, 0
    while True:
        lines.record = []
        fault = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells, fault = [], _fault_of(str(error))
        if fault or (len(cells) != width and any(_width(line, separator) == width for line in lines.record[1:])):
            lines.keep_first()
            reader = csv.reader(lines, delimiter=separator, strict=True)
        width = width or len(cells)
        # Counting characters is right for most lines and much faster than encoding them again.
        length = sum(
            len(line) if line.isascii() else len(line.encode(errors="surrogateescape")) for line in lines.record
        )
        if cells or fault:
            yield _Record(number, offset, length, cells, fault)
        number += len(lines.record)
        offset += length


def _fault_of(words: str) -> str:
    """What Python's csv module says, in ours."""
    if words == "unexpected end of data":
        return "expected well-formed quotes, got a quoted cell that never ends"
    if words.startswith("field larger than field limit"):
        return f"{too_long('a cell')}, or a quote that never ends"
    if "NUL" in words:  # Python 3.10
        return "expected text, got a NUL character"
    return f"expected well-formed quotes, got {words}"


def _width(line: str, separator: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=separator), []))
    except csv.Error:
        return -1
