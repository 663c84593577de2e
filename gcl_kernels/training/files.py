"""Files that are whole or not there, and JSON. Imports neither torch nor a reader of data."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gcl_kernels.training.errors import DataError

PAUSES = (0.05, 0.2, 1.0)
"""Seconds between attempts to put a file where another program may just be reading the one before."""


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a file beside `path` and put it there in one step, once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".tmp")
    try:
        write(new)
        # Windows flushes no file that is open for reading alone.
        with new.open("r+b") as file:
            os.fsync(file.fileno())
        replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    # The new name is on the disk when its folder is; where folders cannot be synced (Windows) there is nothing to do.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace(new: Path, path: Path) -> None:
    """`os.replace`, which Windows refuses for as long as another program has `path` open."""
    for pause in (*PAUSES, None):
        try:
            os.replace(new, path)
            return
        except PermissionError:
            if pause is None:
                raise
            time.sleep(pause)


def write_json_atomically(path: Path, content: Any, *, indent: int | None = None) -> None:
    """JSON in UTF-8, ending with a newline."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
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
