"""Reading scored pairs and document metadata, and saying what is wrong with them by file and line number.

A file of pairs is read once from end to end. What stays in memory of a row is where it is, its score and two numbers that
stand for its ids: some 40 bytes. Its cells are read again when a batch needs them, so that millions of rows can be drawn
in a truly random order.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import tarfile
import tempfile
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image

from gcl_kernels.training.errors import DataError, EmptyError, InputError

KEY_END = "_{!@#~}_"
"""What the GCL evaluator writes after each left column to make a query's key of them."""

LINES_SHOWN = 10
"""Bad rows quoted in an error or a report; the rest are counted."""


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
        return 1.0 if self.weight_key is None else float(row[self.weight_key])

    def query_id(self, row: Mapping[str, str]) -> str:
        return row[self.query_id_key] if self.query_id_key else "".join(row[key] + KEY_END for key in self.left)

    def document_id(self, row: Mapping[str, str]) -> str:
        return row[self.document_id_key] if self.document_id_key else "".join(row[key] + KEY_END for key in self.right)


class PairFile:
    """The N good rows of a file of pairs, read when they are asked for.

    `scores` (N,) float64; `query_numbers` and `document_numbers` (N,) int64 >= 0, equal where the ids are (63 bits of
    a hash: two of a hundred million ids meet with a chance of 1 in 2,000). `bad_rows` describes the first of the
    `bad_count` rows that were skipped.

    Args:
        path: a UTF-8 CSV or TSV file with a header line, whose cells may be quoted and may hold line breaks, blank lines
            passed over; a Parquet file; or webdataset tar files: one, a pattern, or a folder of them. In a sample of those
            a column is a key of the `json` member, else the member with that name as its ending (an image is read from
            within the tar file when it is needed).
        separator: one character; None is a tab for `.tsv` and a comma otherwise.
        dataset_type: `"csv"`, `"parquet"`, `"webdataset"`, or `"auto"`, by the ending.
        check_images: `"decode"` every image once, ask whether it `"exists"`, or `"none"`.
        skip_bad_rows: leave bad rows out instead of refusing the file.

    Raises:
        DataError: a missing file or column, an empty file, no row at all or no good one; and, unless they are skipped,
            bad rows: too few or too many cells, a score that is no finite number >= 0, a missing or unreadable image,
            a side without any value, an empty id, a quoted cell that never ends, bytes that are no UTF-8.
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
    ) -> None:
        self.path, self.columns = Path(path), columns
        self.bad_rows: list[str] = []
        self.bad_count = 0
        if dataset_type == "auto":
            dataset_type = _type_of(self.path)
        if separator is None:
            separator = "\t" if self.path.suffix.lower() == ".tsv" else ","
        self._folder = self.path.parent.resolve()
        self._separator = separator
        if dataset_type == "csv":
            self._header, records, self._file = _open_csv(self.path, separator, columns.names)
        else:
            # Their rows are copied into a file of this reader's own, where one row can be read at a time.
            self._separator, self._header, self._file = ",", columns.names, tempfile.TemporaryFile()  # noqa: SIM115
            read = _parquet_rows if dataset_type == "parquet" else _webdataset_rows
            records = _copied(read(self.path, columns), self._file)
        self._offsets, self._lengths = array("q"), array("l")
        scores, queries, documents = array("d"), array("q"), array("q")
        images = ImageCheck(check_images)
        found_rows = False
        for where, offset, length, cells, fault in records:
            found_rows = True
            faults = [fault] if fault else []
            if not fault and len(cells) != len(self._header):
                faults = [f"expected {len(self._header)} cells as in the header, got {len(cells)}"]
            row = {}
            if not faults:
                row = self._row(cells)
                faults = _row_faults(row, columns, self._folder, images)
            if faults:
                self.bad_count += 1
                if len(self.bad_rows) < LINES_SHOWN:
                    self.bad_rows.append(f"{where}: {'; '.join(faults)}")
                continue
            self._offsets.append(offset)
            self._lengths.append(length)
            scores.append(columns.score(row))
            queries.append(_number(columns.query_id(row)))
            documents.append(_number(columns.document_id(row)))

        if not found_rows:
            raise EmptyError(f"{path}, line 2: expected at least one row after the header, got none")
        if self.bad_count and not skip_bad_rows:
            raise DataError("\n".join(shown(self.bad_rows, self.bad_count)))
        if not scores:
            bad = shown(self.bad_rows, self.bad_count)
            raise DataError("\n".join([f"{path}: expected at least one good row, got none", *bad]))
        self.scores = torch.frombuffer(scores, dtype=torch.float64)
        self.query_numbers = torch.frombuffer(queries, dtype=torch.int64)
        self.document_numbers = torch.frombuffer(documents, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.scores)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def take(self, rows: Iterable[int] | None = None) -> Pairs:
        """Read some rows, by number from 0 to N - 1, in the order given; None: all."""
        columns = self.columns
        pairs = Pairs(self.path, {key: [] for key in columns.left}, {key: [] for key in columns.right},
                      bad_rows=self.bad_rows, bad_count=self.bad_count)  # fmt: skip
        for number in range(len(self)) if rows is None else rows:
            self._file.seek(self._offsets[number])
            text = self._file.read(self._lengths[number]).decode()
            row = self._row(next(csv.reader([text], delimiter=self._separator, strict=True)))
            for kinds, cells in ((columns.left, pairs.left), (columns.right, pairs.right)):
                for key, kind in kinds.items():
                    cells[key].append(str(self._folder / row[key]) if kind == "img" and row[key] else row[key])
            pairs.scores.append(columns.score(row))
            pairs.query_ids.append(columns.query_id(row))
            pairs.document_ids.append(columns.document_id(row))
        return pairs

    def _row(self, cells: list[str]) -> dict[str, str]:
        return {key: cell.strip() for key, cell in zip(self._header, cells, strict=True)}


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


class _Object(dict):
    """A JSON object that remembers which keys came twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


def read_documents(
    path: str | Path, fields: Mapping[str, str], *, check_images: str = "decode"
) -> dict[str, dict[str, str]]:
    """Read document metadata, a JSON object `{document id: {field: value}}`, keeping the named fields.

    Image values become absolute paths; a field that a document lacks is "". Documents without any of the fields are
    kept: what to do with them is for the caller to say. Ids that come twice are counted in a printed line.

    Raises:
        DataError: a missing file, text that is no JSON (with its line), another structure, an unreadable image.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_Object)
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got '{error.strerror}'") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got the byte {error.object[error.start]:#04x}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: expected JSON, got '{error.msg}'") from None
    if not isinstance(content, dict) or not all(isinstance(document, dict) for document in content.values()):
        raise DataError(
            f"{path}, line 1: expected a JSON object {{document id: {{field: value}}}}, got another structure"
        )

    if isinstance(content, _Object) and content.repeated:
        print(
            f"{path}: expected each document id once, got {len(content.repeated)} ids again, first "
            f"'{content.repeated[0]}'; the last document of an id counts"
        )
    folder = path.parent.resolve()
    images = ImageCheck(check_images)
    documents = {}
    faults = []
    for identity, document in content.items():
        values = {key: str(document[key]).strip() if document.get(key) is not None else "" for key in fields}
        for key, kind in fields.items():
            if kind == "img" and values[key]:
                values[key] = str(folder / values[key])
                if fault := images(values[key]):
                    faults.append(
                        f"{path}, document '{identity}': expected a readable image in field '{key}', got {fault}"
                    )
        documents[identity] = values
    if faults:
        raise DataError("\n".join(shown(faults)))
    return documents


def load_image(path: str | Path) -> Image.Image:
    """Open an image as RGB; what is transparent becomes white, as on a page.

    `FILE.tar@OFFSET+SIZE` is that part of an uncompressed tar file.
    """
    part = _TAR_PART.fullmatch(str(path))
    source: Any = path
    if part:
        with open(part[1], "rb") as archive:
            archive.seek(int(part[2]))
            source = BytesIO(archive.read(int(part[3])))
    with Image.open(source) as image:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


_TAR_PART = re.compile(r"(.+)@(\d+)\+(\d+)", re.DOTALL)


def image_fault(path: str | Path) -> str | None:
    """What is wrong with an image file, None when it can be decoded."""
    try:
        load_image(path)
    except FileNotFoundError:
        return f"no file '{path}'"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        # Pillow's own words for a damaged file differ by format, and SyntaxError is one of them.
        return f"a file that cannot be decoded, '{path}'"
    return None


class ImageCheck:
    """Says what is wrong with an image file, looking at each once however many rows name it.

    `check`: `"decode"` it, ask whether it `"exists"`, or `"none"`.
    """

    def __init__(self, check: str = "decode") -> None:
        self._check = check
        self._faults: dict[str, str | None] = {}

    def __call__(self, path: str | Path) -> str | None:
        if self._check == "none":
            return None
        key = str(path)
        if key not in self._faults:
            if len(self._faults) >= _IMAGES_REMEMBERED:
                self._faults.clear()
            if self._check == "decode":
                self._faults[key] = image_fault(key)
            else:
                part = _TAR_PART.fullmatch(key)
                self._faults[key] = None if Path(part[1] if part else key).is_file() else f"no file '{key}'"
        return self._faults[key]


_IMAGES_REMEMBERED = 200_000


def shown(lines: list[str], count: int | None = None) -> list[str]:
    """The first `LINES_SHOWN` lines, and one that counts the others of `count` in all."""
    first = lines[:LINES_SHOWN]
    rest = (len(lines) if count is None else count) - len(first)
    return first if rest <= 0 else [*first, f"and {rest} more bad rows"]


def _number(identity: str) -> int:
    """63 bits of a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little") >> 1


def _row_faults(row: Mapping[str, str], columns: Columns, folder: Path, images: ImageCheck) -> list[str]:
    try:
        "".join(row.values()).encode()
    except UnicodeEncodeError:
        return ["expected UTF-8 text, got other bytes"]
    faults = []
    try:
        score = columns.score(row)
    except ValueError:
        score = math.nan
    if not (math.isfinite(score) and score >= 0):
        faults.append(
            f"expected a finite number >= 0 in column '{columns.weight_key}', got '{row.get(str(columns.weight_key))}'"
        )
    for fields in (columns.left, columns.right):
        if not any(row[key] for key in fields):
            faults.append(f"expected a value in at least one of the columns {list(fields)}, got none")
        for key, kind in fields.items():
            if kind == "img" and row[key] and (fault := images(folder / row[key])):
                faults.append(f"expected a readable image in column '{key}', got {fault}")
    ids = columns.query_id_key, columns.document_id_key
    faults += [f"expected an id in column '{key}', got an empty cell" for key in ids if key and not row[key]]
    return faults


class _Lines:
    """The physical lines of a file, remembering those of the record being read so that they can be given back."""

    def __init__(self, file: Iterator[str]) -> None:
        self._file = file
        self._returned: deque[str] = deque()
        self.record: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else next(self._file)
        self.record.append(line)
        return line

    def keep_first(self) -> None:
        """Give back every line of the current record but its first."""
        self._returned.extendleft(reversed(self.record[1:]))
        self.record = self.record[:1]


Record = tuple[str, int, int, list[str], str | None]
"""Where a row is in words, its first byte and their number in the file that holds it, its cells, what is wrong with it."""


def _type_of(path: Path) -> str:
    if path.suffix.lower() in (".parquet", ".pq"):
        return "parquet"
    return "webdataset" if path.suffix.lower() == ".tar" or path.is_dir() else "csv"


def _open_csv(path: Path, separator: str, names: list[str]) -> tuple[list[str], Iterator[Record], IO[bytes]]:
    """The header, the records, and the file for reading them again."""
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got '{error.strerror}'") from None
    start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
    lines = _records(_text_lines(path), separator, start)
    try:
        _, _, _, header, fault = next(lines, (1, 0, 0, [], None))
        return _header(path, header, fault, names), _placed(path, lines), file
    except DataError:
        file.close()
        raise


def _text_lines(path: Path) -> Iterator[str]:
    # A byte that is no UTF-8 becomes a lone surrogate here, so that one bad row does not stop the whole file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from file


def _placed(path: Path, lines: Iterator[tuple[int, int, int, list[str], str | None]]) -> Iterator[Record]:
    for line, offset, length, cells, fault in lines:
        yield f"{path}, line {line}", offset, length, cells, fault


def _header(path: Path, header: list[str], fault: str | None, names: list[str]) -> list[str]:
    header = [name.strip() for name in header]
    if fault or not header:
        raise DataError(f"{path}, line 1: expected a header with the columns {names}, got {fault or 'an empty file'}")
    for column in names:
        if header.count(column) != 1:
            raise DataError(
                f"{path}, line 1: expected one column '{column}', got {header.count(column)} among the columns {header}"
            )
    return header


Row = tuple[str, dict[str, str], str | None]
"""Where a row is in words, its cells by column, what is wrong with it."""


def _copied(rows: Iterator[Row], file: IO[bytes]) -> Iterator[Record]:
    """Write each row to `file` as CSV and say where."""
    offset = 0
    for where, row, fault in rows:
        buffer = StringIO()
        csv.writer(buffer).writerow(row.values())
        content = buffer.getvalue().encode(errors="surrogateescape")
        file.write(content)
        yield where, offset, len(content), list(row.values()), fault
        offset += len(content)
    file.flush()


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a Parquet file, one batch in memory at a time; null is a missing value."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(
            f"{path}: expected the package pyarrow for a Parquet file, got none: pip install pyarrow"
        ) from None
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: expected a readable Parquet file, got '{str(error).splitlines()[0]}'") from None
    names = columns.names
    if missing := [name for name in names if file.schema_arrow.names.count(name) != 1]:
        raise DataError(
            f"{path}: expected one column '{missing[0]}', got {file.schema_arrow.names.count(missing[0])} among the columns "
            f"{file.schema_arrow.names}"
        )
    number = 0
    for batch in file.iter_batches(batch_size=8192, columns=names):
        cells = {name: batch.column(name).to_pylist() for name in names}
        for place in range(batch.num_rows):
            number += 1
            row = {name: "" if cells[name][place] is None else cells[name][place] for name in names}
            wrong = [name for name in names if not isinstance(row[name], (str, int, float))]
            fault = (
                f"expected text or a number in column '{wrong[0]}', got {type(row[wrong[0]]).__name__}"
                if wrong
                else None
            )
            yield f"{path}, row {number}", {name: str(value) for name, value in row.items()}, fault


def _webdataset_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The samples of webdataset tar files: the members that share a name up to its first dot, one after the other."""
    shards = sorted(path.glob("*.tar")) if path.is_dir() else sorted(path.parent.glob(path.name))
    if not shards:
        raise DataError(f"{path}: expected webdataset tar files, got none")
    kinds = {**columns.left, **columns.right}
    for shard in shards:
        resolved = shard.resolve()

        def read(
            name: str,
            members: dict[str, tarfile.TarInfo],
            archive: tarfile.TarFile,
            where: Path = shard,
            resolved: Path = resolved,
        ) -> Row:
            place, fault, content = f"{where}, sample '{name}'", None, {}
            try:
                if "json" in members:
                    content = json.load(archive.extractfile(members["json"]))  # pyright: ignore[reportArgumentType]
            except (ValueError, UnicodeDecodeError):
                fault = "expected JSON in its json member, got another text"
            if not isinstance(content, dict):
                content, fault = {}, "expected a JSON object in its json member, got another structure"
            row = {}
            for column in columns.names:
                member = members.get(column)
                if content.get(column) is not None:
                    row[column] = str(content[column])
                elif member is None:
                    row[column] = ""
                elif kinds.get(column) == "img":
                    row[column] = f"{resolved}@{member.offset_data}+{member.size}"
                else:
                    row[column] = archive.extractfile(member).read().decode(errors="surrogateescape")  # pyright: ignore
            return place, row, fault

        try:
            # "r:" refuses compressed files, in which no image could be found by its offset.
            with tarfile.open(shard, "r:") as archive:
                name, members = None, {}
                for member in archive:
                    # The list of all members, which tarfile keeps for later questions, would grow with the file.
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    if not member.isfile():
                        continue
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if key != name:
                        if name is not None:
                            yield read(name, members, archive)
                        name, members = key, {}
                    members[ending] = member
                if name is not None:
                    yield read(name, members, archive)
        except (OSError, tarfile.TarError) as error:
            yield f"{shard}", dict.fromkeys(columns.names, ""), f"expected a whole uncompressed tar file, got '{error}'"


def _records(
    file: Iterator[str], separator: str, offset: int = 0
) -> Iterator[tuple[int, int, int, list[str], str | None]]:
    """Yield (number of the first physical line, first byte, number of bytes, cells, fault) for each record.

    Blank lines are passed over; `offset` is where the first line starts.

    A stray quote opens a cell that takes in the following lines up to the next quote or the end of the file. Such a
    record costs only its first line: the lines after it are read again on their own. It is known by a cell that
    never ends, by text after a closing quote, or by a wrong number of cells when one of the lines taken in has the
    right number on its own.
    """
    lines = _Lines(file)
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
            cells, fault = [], f"expected well-formed quotes, got {_QUOTE_FAULTS.get(str(error), error)}"
        if fault or (len(cells) != width and any(_width(line, separator) == width for line in lines.record[1:])):
            lines.keep_first()
            reader = csv.reader(lines, delimiter=separator, strict=True)
        width = width or len(cells)
        # Counting characters is right for most lines and much faster than encoding them again.
        length = sum(
            len(line) if line.isascii() else len(line.encode(errors="surrogateescape")) for line in lines.record
        )
        if cells or fault:
            yield number, offset, length, cells, fault
        number += len(lines.record)
        offset += length


_QUOTE_FAULTS = {"unexpected end of data": "a quoted cell that never ends"}


def _width(line: str, separator: str) -> int:
    return len(next(csv.reader([line], delimiter=separator), []))
