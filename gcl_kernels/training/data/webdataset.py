"""Webdataset tar files: the samples in them, and what is damaged by the sample that it costs."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from gcl_kernels.training.data.faults import one_line, quoted, reason
from gcl_kernels.training.data.rows import Row
from gcl_kernels.training.data.streams import open_plain
from gcl_kernels.training.data.tables import listed
from gcl_kernels.training.data.values import parse_json, repeated_fault, text_of
from gcl_kernels.training.errors import DataError

MEMBER = re.compile(r"((?:.*/|)[^/.]+)\.([^/]*)", re.DOTALL)
"""A member's sample and ending, as webdataset has them: up to the first dot of the last part, and what follows in lower case."""

META = re.compile(r"__[^/]*__(?:$|/)")
"""Members that are no part of any sample, as webdataset has them."""

BLOCK = 512
NAMES_KEPT = 200_000
"""Samples of one file whose names are kept in memory, to find those whose members stand apart."""


class Samples:
    """Reads the samples of webdataset tar files, and remembers which columns there were.

    `images` are the columns of images: their members are read from within the tar file when they are needed.
    """

    def __init__(self, names: list[str], images: set[str]) -> None:
        self._names, self._images = names, images
        self._seen: set[str] = set()
        self._others: dict[str, None] = {}  # endings and keys that nobody asked for, in order
        self._read = 0

    def check(self, name: str) -> None:
        """Raise `DataError` if no sample of the files that `name` means had one of the columns."""
        for column in self._names:
            if self._read and column not in self._seen:
                found = [*sorted(self._seen), *self._others]
                raise DataError(
                    f"{one_line(name)}: expected a member or a JSON key '{column}' in at least one sample, got {listed(found)}"
                )

    def rows(self, path: Path) -> Iterator[Row]:
        """The samples of one file; members of a sample stand side by side."""
        folder = str(path.parent.resolve())
        try:
            file = open_plain(path)
        except OSError as error:
            raise DataError(f"{one_line(str(path))}: expected a readable file, got {reason(error)}") from None
        with file:
            name, members, faults = None, {}, []
            passed: set[int] = set()
            members_of_file = _Members(file)
            for member in members_of_file:
                match = MEMBER.fullmatch(member.name)
                if member.isdir() or META.match(member.name) or not match:
                    continue
                if match[1] != name:
                    if name is not None:
                        yield self._row(path, folder, file, name, members, faults)
                    name, members, faults = match[1], {}, []
                    if hash(name) in passed:
                        faults.append("expected the members of a sample side by side, got this one again")
                    if len(passed) < NAMES_KEPT:
                        passed.add(hash(name))
                ending = match[2].lower()
                if not member.isfile() or member.issparse():
                    faults.append(f"expected plain files, got {quoted(match[2])}, a link or another special file")
                if ending in members:
                    faults.append(f"expected each member once, got {quoted(ending)} again")
                members[ending] = member
            lost = "what follows is lost"
            if name is not None:
                if members_of_file.fault and not members_of_file.last_is_whole:
                    lost = f"sample '{name}' and {lost}"
                else:
                    yield self._row(path, folder, file, name, members, faults)
            if members_of_file.fault:
                yield Row(f"{path}", {}, f"{members_of_file.fault}; {lost}", folder)

    def _row(
        self,
        path: Path,
        folder: str,
        file: BinaryIO,
        name: str,
        members: Mapping[str, tarfile.TarInfo],
        faults: list[str],
    ) -> Row:
        where = f"{path}, sample '{name}'"
        content: Any = {}
        if "json" in members and not faults:
            content, fault = parse_json(_content(file, members["json"]))
            if fault:
                faults = [f"expected JSON in its json member, got another text{fault}"]
            elif not isinstance(content, dict):
                faults = [f"expected a JSON object in its json member, got {type(content).__name__}"]
            elif fault := repeated_fault(content, self._names, "key"):
                faults = [fault]
        if faults:
            return Row(where, {}, "; ".join(faults), folder)
        self._read += 1
        for other in (*members, *content):
            if other not in self._names and len(self._others) < 100:
                self._others[other] = None
        row: dict[str, Any] = {}
        for column in self._names:
            member = members.get(column.lower())
            if column in content or member:
                self._seen.add(column)
            row[column] = content.get(column)
            if member and text_of(row[column], "") == ("", None):
                if column in self._images:
                    row[column] = f"{path.resolve()}@{member.offset_data}+{member.size}"
                else:
                    row[column] = _content(file, member).decode("utf-8-sig", errors="surrogateescape")
        return Row(where, row, None, folder)


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


class _Members:
    """The members of an uncompressed tar file, in order.

    After the last, `fault` says what is wrong with the file, None if it is whole: its members end in two blocks of zeros, and
    nothing else follows them. `last_is_whole` says whether the last member, and with it its sample, is known to be complete.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.fault: str | None = None
        self.last_is_whole = False

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        size = self._file.seek(0, 2)
        self._file.seek(0)
        end = 0  # of the last member
        try:
            # "r:" refuses compressed files, in which no image could be found by its offset.
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    # The list of all members, which tarfile keeps for later questions, would grow with the file.
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    data = member.size if member.isfile() else 0
                    # A negative size would lead back to a member that has been read.
                    if data < 0 or archive.offset <= end:
                        self._broken(f"a member of {member.size} bytes at byte {member.offset} of {size}")
                        return
                    yield member
                    if member.offset_data + data > size:
                        self._broken(f"a member of {data} bytes at byte {member.offset_data} of {size}")
                        return
                    end = archive.offset
                end = archive.offset
        except Exception as error:  # tarfile raises whatever reading a damaged header runs into
            self._broken(reason(error))
            return
        self._check_end(end, size)

    def _check_end(self, end: int, size: int) -> None:
        self._file.seek(min(end, size))
        closing = self._file.read(2 * BLOCK)
        self.last_is_whole = bool(closing) and not any(closing)
        if len(closing) < 2 * BLOCK and not any(closing):
            self._broken(f"an end at byte {size} without the two blocks of zeros that close one")
        elif any(closing):
            self._broken(f"something that is no member at byte {end} of {size}")
        else:
            while rest := self._file.read(1 << 20):
                if any(rest):
                    self._broken("more data after its end; tar files that have been joined have to be joined as such")
                    return

    def _broken(self, words: str) -> None:
        self.fault = f"expected a whole uncompressed tar file, got {words}"
