"""Which files a name on the command line means."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from gcl_kernels.training.data.faults import one_line
from gcl_kernels.training.errors import DataError

MOST_FILES = 100_000
"""Files that one name may mean: `{0..999999999}` is a slip."""

TYPES = {"csv": "CSV or TSV files", "parquet": "Parquet files", "webdataset": "webdataset tar files"}
ENDINGS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".tar": "webdataset",
    ".tgz": "webdataset",
}
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|pipe:")
PACKED = (".gz", ".bz2", ".xz")
"""Endings after the one that names the type; what a file is packed with is seen from its content."""


def files_of(name: str | Path, dataset_type: str = "auto") -> tuple[list[Path], str]:
    """The files that a name means, and their one type: `"csv"`, `"parquet"` or `"webdataset"`.

    A name that exists is that file; a folder means the files of the type in it, by name, those in folders of its own left out.
    Else the name may be several with `::` between them, may have braces (`shard-{000..123}.tar`, `{a,b}.csv`), as open_clip
    takes them, and may be a pattern (`*`, `?`, `[0-9]`). A file named twice is read twice.

    Raises:
        DataError: a URL, a pattern or folder without a file, files of several types, more than `MOST_FILES`. A single file
            that is not there is for its reader to notice.
    """
    wanted = None if dataset_type == "auto" else dataset_type
    text = str(name)
    try:
        files = list(itertools.islice(_files(text, wanted), MOST_FILES + 1))
    except RecursionError:
        raise DataError(f"{one_line(text[:100])}...: expected fewer braces") from None
    if len(files) > MOST_FILES:
        raise DataError(f"{one_line(text)}: expected at most {MOST_FILES:,} files, got more")
    types = {wanted} if wanted else {type_of(path) for path in files}
    if len(types) != 1:
        found = " and ".join(sorted(TYPES[each] for each in types))
        raise DataError(f"{one_line(text)}: expected files of one type, got {found}: --dataset-type chooses")
    return files, types.pop()


def type_of(path: Path) -> str:
    """The type that a file's ending names; what has no ending of ours is CSV."""
    return ENDINGS.get(data_ending(path), "csv")


def data_ending(path: Path) -> str:
    """A file's ending in lower case, without those of compression: `.tsv` of `PAIRS.TSV.gz`."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _files(text: str, wanted: str | None) -> Iterator[Path]:
    if os.path.exists(text) or "::" not in text:
        yield from _matches(text, wanted)
        return
    for part in text.split("::"):
        yield from _matches(part, wanted)


def _matches(text: str, wanted: str | None) -> Iterator[Path]:
    if not text.strip():
        raise DataError("expected the name of a file, got ''")
    if os.path.exists(text):
        yield from _in_folder(Path(text), wanted) if os.path.isdir(text) else [Path(text)]
        return
    if URL.match(text):
        raise DataError(f"{one_line(text)}: expected files, got a URL, which is not fetched: download it first")
    for name in braces(text):
        if os.path.exists(name) or not glob.has_magic(name):
            yield from _in_folder(Path(name), wanted) if os.path.isdir(name) else [Path(name)]
            continue
        if not (found := sorted(glob.glob(name))):
            raise DataError(f"{one_line(name)}: expected {TYPES[wanted or type_of(Path(name))]}, got none")
        yield from map(Path, found)


def _in_folder(folder: Path, wanted: str | None) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{one_line(str(folder))}: expected a readable folder, got '{error.strerror}'") from None
    types = {path: ENDINGS.get(data_ending(path)) for path in entries if path.name[0] not in "._" and not path.is_dir()}
    found = [path for path, kind in types.items() if kind and kind == (wanted or kind)]
    if not found:
        words = TYPES[wanted] if wanted else "CSV, TSV, Parquet or webdataset tar files"
        raise DataError(f"{one_line(str(folder))}: expected {words} in the folder, got none")
    return found


_NUMBERS = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])")


def braces(text: str) -> Iterator[str]:
    """Bash's brace expansion, as webdataset and open_clip have it: `{a,b}`, `{000..123}`, `{0..10..2}`, `{a..e}`, nested."""
    start = text.find("{")
    end = _closing(text, start)
    if end < 0:
        yield text
        return
    inner = text[start + 1 : end]
    for middle, rest in itertools.product(
        _options(inner), list(itertools.islice(braces(text[end + 1 :]), MOST_FILES + 1))
    ):
        yield text[:start] + middle + rest


def _options(inner: str) -> Iterable[str]:
    parts = _split(inner)
    if len(parts) > 1:
        return itertools.chain.from_iterable(map(braces, parts))
    if match := _NUMBERS.fullmatch(inner):
        first, last, step = int(match[1]), int(match[2]), max(int(match[3] or 1), 1)
        ends = match[1].lstrip("-"), match[2].lstrip("-")
        padded = any(len(end) > 1 and end[0] == "0" for end in ends)
        width = max(len(match[1]), len(match[2])) if padded else 0
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return (f"{number:0{width}d}" for number in itertools.islice(numbers, MOST_FILES + 1))
    if match := _LETTERS.fullmatch(inner):
        first, last = ord(match[1]), ord(match[2])
        codes = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return map(chr, codes)
    return (f"{{{name}}}" for name in braces(inner))


def _closing(text: str, start: int) -> int:
    """Where the brace opened at `start` closes; -1 if it does not, or there is none."""
    depth = 0
    for place in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return -1


def _split(inner: str) -> list[str]:
    """The parts between the commas that stand in no braces of their own."""
    parts, depth = [""], 0
    for char in inner:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts
