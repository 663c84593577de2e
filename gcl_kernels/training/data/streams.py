"""Opening what a name leads to: plain and packed files and pipes, never what would wait for ever or lead elsewhere."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import select
import stat
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from gcl_kernels.training.data.faults import one_line, reason
from gcl_kernels.training.errors import DataError

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises, from the disk or from a decompressor."""

WAIT_FOR_WRITER = 10.0
"""Seconds until a pipe that nobody writes to is given up."""

_HEAD = 512  # bytes looked at before anything is read: a tar file's name is in its first 262

_SPECIAL = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
            stat.S_IFSOCK: "a socket"}  # fmt: skip

_PACKERS = {b"\x1f\x8b": ("gzip", gzip.open), b"BZh": ("bzip2", bz2.open), b"\xfd7zXZ\0": ("xz", lzma.open)}

_NOT_TEXT = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: decompress it first",
    b"\xff\xfe\0\0": "UTF-32 text",
    b"\0\0\xfe\xff": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite file",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF file",
    b"\x1f\x8b": "a gzip file in another",
    b"BZh9": "a bzip2 file in another",
    b"\xfd7zXZ": "an xz file in another",
}


class SpecialFileError(OSError):
    """A folder, device, socket, or a pipe where none is taken; `strerror` says which."""

    def __init__(self, words: str) -> None:
        super().__init__(0, words)


def open_plain(path: str | Path, *, pipes: bool = False) -> BinaryIO:
    """Open a file for reading without ever waiting: regular files, and pipes if `pipes`.

    Raises:
        OSError: what cannot be opened; `SpecialFileError` for what is no file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a NUL in the name
        raise OSError(0, str(error)) from None
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG and not (pipes and kind == stat.S_IFIFO):
            raise SpecialFileError(_SPECIAL.get(kind, "no file"))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


class TextStream:
    """The bytes of a text file from its start, unpacked.

    `file` is read from; `in_place` says whether those bytes are the file's own, so that each can be found again by its
    offset. After the last byte, `damage` says what was wrong with the file beyond it, None if nothing was.

    Raises:
        DataError: what cannot be opened, or is no text.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._packed = ""
        self.damage: str | None = None
        try:
            self._raw = open_plain(path, pipes=True)
        except OSError as error:
            raise DataError(f"{one_line(str(path))}: expected a readable file, got {reason(error)}") from None
        try:
            piped = stat.S_ISFIFO(os.fstat(self._raw.fileno()).st_mode)
            file, head = self._with_head(self._raw, self._of_pipe() if piped else b"")
            for magic, (name, unpack) in _PACKERS.items():
                if head.startswith(magic):
                    self._packed = f"{name} "
                    file, head = self._with_head(unpack(file), b"")
                    break
            if words := looks_like(head):
                raise DataError(f"{one_line(str(path))}: expected UTF-8 text, got {words}")
        except BaseException:
            self._raw.close()
            raise
        self.in_place = not piped and not self._packed
        self.file = io.BufferedReader(file)

    def close(self) -> None:
        self.file.close()
        self._raw.close()

    def _of_pipe(self) -> bytes:
        """The first bytes of a pipe, once somebody has it open for writing."""
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise DataError(
                f"{one_line(str(self._path))}: expected a file that each process can read whole, got a pipe"
            )
        descriptor, until = self._raw.fileno(), time.monotonic() + WAIT_FOR_WRITER
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        head = b""
        while True:
            try:
                head = os.read(descriptor, _HEAD)
            except BlockingIOError:
                break  # somebody will write
            if head or any(events & select.POLLHUP for _, events in poll.poll(20)):
                break
            if time.monotonic() > until:
                raise DataError(f"{one_line(str(self._path))}: expected a program that writes into the pipe, got none")
        os.set_blocking(descriptor, True)
        return head

    def _with_head(self, file: Any, head: bytes) -> tuple[_Rejoined, bytes]:
        """The same bytes, the first `_HEAD` of which are known."""
        ended = False
        try:
            while len(head) < _HEAD and (more := file.read1(_HEAD - len(head))):
                head += more
        except DAMAGE as error:
            self._note(error)
            ended = True
        return _Rejoined(head, None if ended else file, self._note), head

    def _note(self, error: BaseException) -> None:
        # The first cause counts: what cannot be read from the disk ends too early for the decompressor, too.
        self.damage = self.damage or f"expected a whole {self._packed}file, got {reason(error)}"


class _Rejoined(io.RawIOBase):
    """A file whose first bytes, `head`, have been read before; damage is noted and ends it."""

    def __init__(self, head: bytes, rest: Any, note: Callable[[BaseException], None]) -> None:
        self._head, self._rest, self._note = head, rest, note

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._head[: len(buffer)]
        self._head = self._head[len(part) :]
        if not part and self._rest is not None:
            try:
                part = self._rest.read1(len(buffer))
            except DAMAGE as error:
                self._note(error)
                self._rest = None
        buffer[: len(part)] = part
        return len(part)


def looks_like(head: bytes) -> str | None:
    """What bytes that are no UTF-8 text look like, by how they begin."""
    for magic, words in _NOT_TEXT.items():
        if head.startswith(magic):
            return words
    if head[257:262] == b"ustar":
        return "a tar file"
    if head and not any(head):
        return "NUL bytes"
    for start in (0, 1):
        every_other = head[start:64:2]
        if len(every_other) > 3 and not any(every_other):
            return "UTF-16 text"
    return None
