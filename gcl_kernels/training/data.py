"""Reading pairs from CSV or TSV, document metadata from JSON, and saying what is wrong with them by line number."""

from __future__ import annotations

import csv
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

KEY_END = "_{!@#~}_"
"""What the GCL evaluator writes after each left column to make a query's key of them."""

LINES_SHOWN = 10
"""Bad rows quoted in an error or a report; the rest are counted."""


class InputError(ValueError):
    """What the user gave, files or options, cannot be used; the message says why in one line per fault."""


class DataError(InputError):
    """Input files that cannot be used; the message has one line per fault: file, line number, what was expected."""


@dataclass
class Pairs:
    """The N good rows of a file: a query, a document and a score each, as the cells were written.

    ``left`` and ``right`` map each field to its N cells; "" is a missing value, and image cells are absolute paths.
    ``bad_rows`` describes the rows that were skipped, one line each.
    """

    path: Path
    left: dict[str, list[str]]
    right: dict[str, list[str]]
    scores: list[float] = field(default_factory=list)
    query_ids: list[str] = field(default_factory=list)
    document_ids: list[str] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scores)


def read_pairs(
    path: str | Path,
    left: Mapping[str, str],
    right: Mapping[str, str],
    weight_key: str,
    *,
    separator: str | None = None,
    query_id_key: str | None = None,
    document_id_key: str | None = None,
    skip_bad_rows: bool = False,
) -> Pairs:
    """Read (query, document, score) rows from a UTF-8 CSV or TSV file with a header line.

    Args:
        path: the file; cells may be quoted and may hold line breaks. Blank lines are passed over.
        left, right: the columns of the query and of the document, each ``"txt"`` or ``"img"``. An image cell is a
            path, relative to the file's own folder.
        weight_key: the column of the score, a finite number >= 0.
        separator: one character; None is a tab for ``.tsv`` and a comma otherwise.
        query_id_key, document_id_key: columns that identify query and document. Without them the id is made of the
            side's own cells, each followed by ``KEY_END``.
        skip_bad_rows: leave bad rows out and describe them in ``Pairs.bad_rows`` instead of refusing the file.

    Raises:
        DataError: a missing file or column, an empty file, no row at all or no good one; and, unless they are skipped,
            bad rows: too few or too many cells, a score that is no finite number >= 0, a missing or unreadable image,
            a side without any value, an empty id, a quoted cell that never ends, bytes that are no UTF-8.
    """
    path = Path(path)
    folder = path.parent.resolve()
    if separator is None:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
    ids = [key for key in (query_id_key, document_id_key) if key]
    images = ImageCheck()
    pairs = Pairs(path, {key: [] for key in left}, {key: [] for key in right})
    try:
        # A byte that is no UTF-8 becomes a lone surrogate here, so that one bad row does not stop the whole file.
        file = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got '{error.strerror}'") from None

    with file:
        records = _records(file, separator)
        _, header, fault = next(records, (1, [], None))
        header = [name.strip() for name in header]
        columns = list(dict.fromkeys([*left, *right, weight_key, *ids]))
        if fault or not header:
            raise DataError(
                f"{path}, line 1: expected a header with the columns {columns}, got {fault or 'an empty file'}"
            )
        for column in columns:
            if header.count(column) != 1:
                raise DataError(
                    f"{path}, line 1: expected one column '{column}', got {header.count(column)} among the columns {header}"
                )

        found_rows = False
        for line, cells, fault in records:
            found_rows = True
            faults = [fault] if fault else []
            if not fault and len(cells) != len(header):
                faults = [f"expected {len(header)} cells as in the header, got {len(cells)}"]
            if not faults:
                row = {key: cell.strip() for key, cell in zip(header, cells, strict=True)}
                faults = _row_faults(row, left, right, weight_key, ids, folder, images)
            if faults:
                pairs.bad_rows.append(f"{path}, line {line}: {'; '.join(faults)}")
                continue
            for kinds, cells_read in ((left, pairs.left), (right, pairs.right)):
                for key, kind in kinds.items():
                    cells_read[key].append(str(folder / row[key]) if kind == "img" and row[key] else row[key])
            pairs.scores.append(float(row[weight_key]))
            pairs.query_ids.append(row[query_id_key] if query_id_key else "".join(row[key] + KEY_END for key in left))
            pairs.document_ids.append(
                row[document_id_key] if document_id_key else "".join(row[key] + KEY_END for key in right)
            )

    if not found_rows:
        raise DataError(f"{path}, line 2: expected at least one row after the header, got none")
    if pairs.bad_rows and not skip_bad_rows:
        raise DataError("\n".join(shown(pairs.bad_rows)))
    if not pairs.scores:
        raise DataError("\n".join([f"{path}: expected at least one good row, got none", *shown(pairs.bad_rows)]))
    return pairs


def read_documents(path: str | Path, fields: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Read document metadata, a JSON object ``{document id: {field: value}}``, keeping the named fields.

    Image values become absolute paths; a field that a document lacks is "". Documents without any of the fields are
    kept: what to do with them is for the caller to say.

    Raises:
        DataError: a missing file, text that is no JSON (with its line), another structure, an unreadable image.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
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

    folder = path.parent.resolve()
    images = ImageCheck()
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
    """Open an image as RGB; what is transparent becomes white, as on a page."""
    with Image.open(path) as image:
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class ImageCheck:
    """Says what is wrong with an image file, decoding each file once however many rows name it."""

    def __init__(self) -> None:
        self._faults: dict[str, str | None] = {}

    def __call__(self, path: str | Path) -> str | None:
        key = str(path)
        if key not in self._faults:
            try:
                load_image(key)
                self._faults[key] = None
            except FileNotFoundError:
                self._faults[key] = f"no file '{key}'"
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                # Pillow's own words for a damaged file differ by format, and SyntaxError is one of them.
                self._faults[key] = f"a file that cannot be decoded, '{key}'"
        return self._faults[key]


def shown(lines: list[str]) -> list[str]:
    """The first ``LINES_SHOWN`` lines, and one that counts the others."""
    rest = len(lines) - LINES_SHOWN
    return lines if rest <= 0 else [*lines[:LINES_SHOWN], f"and {rest} more bad rows"]


def _row_faults(
    row: Mapping[str, str],
    left: Mapping[str, str],
    right: Mapping[str, str],
    weight_key: str,
    ids: Iterable[str],
    folder: Path,
    images: ImageCheck,
) -> list[str]:
    try:
        "".join(row.values()).encode()
    except UnicodeEncodeError:
        return ["expected UTF-8 text, got other bytes"]
    faults = []
    try:
        score = float(row[weight_key])
    except ValueError:
        score = math.nan
    if not (math.isfinite(score) and score >= 0):
        faults.append(f"expected a finite number >= 0 in column '{weight_key}', got '{row[weight_key]}'")
    for fields in (left, right):
        if not any(row[key] for key in fields):
            faults.append(f"expected a value in at least one of the columns {list(fields)}, got none")
        for key, kind in fields.items():
            if kind == "img" and row[key] and (fault := images(folder / row[key])):
                faults.append(f"expected a readable image in column '{key}', got {fault}")
    faults += [f"expected an id in column '{key}', got an empty cell" for key in ids if not row[key]]
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


def _records(file: Iterator[str], separator: str) -> Iterator[tuple[int, list[str], str | None]]:
    """Yield (number of the first physical line, cells, fault) for each record; blank lines are passed over.

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
        if cells or fault:
            yield number, cells, fault
        number += len(lines.record)


_QUOTE_FAULTS = {"unexpected end of data": "a quoted cell that never ends"}


def _width(line: str, separator: str) -> int:
    return len(next(csv.reader([line], delimiter=separator), []))
