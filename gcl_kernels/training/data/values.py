"""What a value is, whatever the type of the file it comes from.

| value | meaning |
|---|---|
| null, NaN, a field that is not there, text of nothing but white space | missing |
| text | that text, without white space at its ends |
| a finite number where text is meant | its shortest decimal notation, as pandas writes it to CSV: `3` is "3", `3.0` is "3.0" |
| text where a score is meant | a finite decimal number >= 0: "3", "0.5", "1e2" |
| everything else: true, lists, objects, dates, bytes, infinity | a fault |
| text that UTF-8 cannot hold, text of more than `LONGEST_CELL` characters | a fault |

In CSV and TSV everything is text, so the word "nan" is a word there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from gcl_kernels.training.data.faults import quoted, reason

LONGEST_CELL = 1 << 25
"""Characters of a value, 33 million. The limit bounds what a quote that never ends takes in before it is noticed."""


class Unreadable:
    """A value that its file's reader could not make an object of; `fault` says why."""

    def __init__(self, fault: str) -> None:
        self.fault = fault


def text_of(value: Any, place: str) -> tuple[str, str | None]:
    """The text of a value, "" where it is missing, and what is wrong with it; `place` is `"column 'title'"` or the like."""
    if isinstance(value, str):
        text = value.strip()
        return text, None if len(text) <= LONGEST_CELL else too_long(place)
    if value is None:
        return "", None
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return str(value), None
    if isinstance(value, float):
        if math.isinf(value):
            return "", f"expected text or a finite number in {place}, got {value}"
        return "" if math.isnan(value) else str(value), None
    if isinstance(value, Unreadable):
        return "", value.fault
    return "", f"expected text or a number in {place}, got {type(value).__name__}"


def too_long(place: str) -> str:
    return f"expected at most {LONGEST_CELL:,} characters in {place}, got more"


def texts_of(values: Mapping[str, Any], kind_of_place: str = "column") -> tuple[dict[str, str], list[str]]:
    """The texts of several values by name, and what is wrong with them."""
    texts, faults = {}, []
    for name, value in values.items():
        if type(value) is str and len(value) <= LONGEST_CELL:
            texts[name] = value.strip()  # most cells, of which the words for a fault need not be made
            continue
        texts[name], fault = text_of(value, f"{kind_of_place} '{name}'")
        if fault:
            faults.append(fault)
    try:
        "".join(texts.values()).encode()
    except UnicodeEncodeError:
        faults += [fault for text in texts.values() if (fault := utf8_fault(text))][:1]
    return texts, faults


def utf8_fault(text: str) -> str | None:
    """What UTF-8 cannot hold: half a surrogate pair, or the bytes that decoding has put as one ("surrogateescape")."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            byte = code - 0xDC00
            latin = f", {quoted(chr(byte))} in Latin-1" if byte >= 0xA0 else ""
            return f"expected UTF-8 text, got the byte {byte:#04x}{latin}"
        return f"expected UTF-8 text, got half a surrogate pair, \\u{code:04x}"
    return None


def number_of(text: str) -> float:
    """The number that a text is, NaN if it is none: what `float` takes, but for underscores between digits."""
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


def score_fault(text: str, column: str) -> str | None:
    """What is wrong with a score."""
    score = number_of(text)
    if math.isfinite(score) and score >= 0:
        return None
    return f"expected a finite number >= 0 in column '{column}', got {quoted(text)}"


def image_path(folder: str, cell: str) -> str:
    """The absolute path of an image cell."""
    return str(Path(folder, cell)) if cell else ""


class Repeated(dict):
    """A JSON object some of whose keys, `repeated`, came more than once: their last value, and in `versions` all of them."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.repeated: list[str] = []
        self.versions: dict[str, list[Any]] = {}
        for key, value in pairs:
            if key in self:
                self.repeated.append(key)
                self.versions.setdefault(key, [self[key]]).append(value)
            self[key] = value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    return content if len(content) == len(pairs) else Repeated(pairs)


def parse_json(content: bytes) -> tuple[Any, str | None]:
    """What a JSON text in UTF-8 holds and what is wrong with it: ", line 3: expected JSON, got 'Expecting value'"."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object), None
    except UnicodeDecodeError as error:
        return None, f": expected UTF-8 text, got the byte {error.object[error.start]:#04x}"
    except json.JSONDecodeError as error:
        return None, f", line {error.lineno}: expected JSON, got '{error.msg}'"
    except (ValueError, RecursionError, MemoryError) as error:  # a number of 5,000 digits, a thousand brackets
        return None, f": expected JSON that can be read, got {reason(error)}"


def repeated_fault(content: Mapping[str, Any], names: Any, what: str) -> str | None:
    """A named key that one object has several times: which one is meant?"""
    for key in getattr(content, "repeated", ()):
        if key in names:
            return f"expected each {what} once, got {quoted(key)} again"
    return None
