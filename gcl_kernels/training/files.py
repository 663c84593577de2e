"""Files that are whole or not there, and JSON. Imports neither torch nor a reader of data."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gcl_kernels.training.errors import DataError, InputError


def make_folder(path: Path) -> None:
    """Make a folder and see whether a file can be written there, before hours of work that end in one.

    Raises:
        InputError: it cannot.
    """
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"?")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path}: expected a folder to write to, got '{error.strerror or error}'") from None


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a file beside `path` and put it there in one step, once it is on the disk.

    Raises:
        InputError: there is no room for it; the half that was written is removed, and the file that was there is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".tmp")
    try:
        write(new)
        # Windows flushes no file that is open for reading alone.
        with new.open("r+b") as file:
            os.fsync(file.fileno())
    except Exception as error:
        free = room(path.parent)
        with contextlib.suppress(OSError):
            new.unlink()
        # torch.save says "unexpected pos" where the disk is full.
        if free < LITTLE_ROOM or (isinstance(error, OSError) and error.errno in FULL):
            raise InputError(f"{path}: expected room for it on the disk, got {free / 2**20:.1f} MiB left") from error
        raise
    replace(new, path)
    # The new name is on the disk when its folder is; where folders cannot be synced (Windows) there is nothing to do.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


LITTLE_ROOM = 1 << 20
"""Bytes: a write that fails with less than this left on the disk has failed for it."""


FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""What writing answers where there is no room; Windows has no quota's own number."""

PAUSES = (0.05, 0.2, 1.0)
"""Seconds between attempts to put a file where another program may just be reading the one before."""


def room(folder: Path) -> float:
    """Bytes left on a folder's disk; infinity where the system does not tell."""
    try:
        return shutil.disk_usage(folder).free
    except (OSError, AttributeError):
        return math.inf


def replace(new: Path, path: Path) -> None:
    """`os.replace`, which Windows refuses for as long as another program has `path` open.

    Where it is refused for longer, `new` is removed.
    """
    for pause in (*PAUSES, None):
        try:
            os.replace(new, path)
            return
        except PermissionError:
            if pause is None:
                new.unlink(missing_ok=True)
                raise
            time.sleep(pause)


def write_json_atomically(path: Path, content: Any, *, indent: int | None = None) -> None:
    """JSON in UTF-8, ending with a newline. Half a surrogate pair, which UTF-8 has not, is escaped, as JSON may."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    text = re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
    write_atomically(path, lambda new: new.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: no such file, or one that is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got '{error.strerror}'") from None
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got '{error}'") from None
