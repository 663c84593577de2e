"""The folder of a run: made and tried before anything is read, held by one process, and never a second run's."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from typing import IO

from gcl_kernels.training.errors import InputError
from gcl_kernels.training.files import room

WINDOWS = os.name == "nt"
NOT_IN_NAMES = '<>:"|?*'
"""What Windows allows in no name of a file, or reads otherwise."""
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}

HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}
"""What locking answers where another process holds the file; other errors mean that there are no locks."""


class RunFolder:
    """`LOGS/NAME`, with its checkpoints in a folder of their own.

    Args:
        logs, name: as on the command line.

    `begun` is to be set when the first step is taken: from then on `close` leaves what is there.
    """

    def __init__(self, logs: str, name: str) -> None:
        if WINDOWS and not portable(name):
            raise InputError(f"--name: expected a name that Windows allows for a folder, got '{name}'")
        self.logs, self.name = logs, name
        self.path = Path(logs) / name
        self.checkpoints = self.path / "checkpoints"
        self.results = self.path / "results.json"
        self.begun = False
        self._lock: IO[str] | None = None

    def hold(self, *, resumed: bool) -> None:
        """Make the folder, write into it, and hold it until `close` or the end of the process, however it ends.

        Raises:
            InputError: it cannot be written to; another process works in it; unless `resumed`, it has a run already.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe(self.checkpoints)
            self._lock = locked(self.path / "lock")
        except OSError as error:
            raise InputError(f"--logs: expected a folder that can be written to, got '{self.path}': "
                             f"{error.strerror or error}") from None  # fmt: skip
        if self._lock is None:
            raise InputError(f"--name {self.name}: expected a run that no process works on, got one that another process "
                             f"works on now, in '{self.path}'")  # fmt: skip
        if not resumed and self.used:
            self.close()
            raise InputError(f"--name {self.name}: expected a new name, got that of a run in '{self.path}'; --resume latest "
                             f"goes on with it")  # fmt: skip

    def look(self) -> None:
        """Ask whether `hold` could write, and leave nothing behind.

        Raises:
            InputError: it could not.
        """
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if os.path.lexists(folder))
        try:
            probe(existing)
        except OSError as error:
            raise InputError(f"--logs: expected a folder that can be written to, got '{self.path}': "
                             f"{error.strerror or error}") from None  # fmt: skip

    @property
    def used(self) -> bool:
        return finished(self.results) or any(self.checkpoints.glob("*.pt"))

    def expect_room(self, size: int) -> None:
        """Raise InputError where a checkpoint of `size` bytes does not fit on the disk."""
        free = room(self.checkpoints)
        if free < size:
            raise InputError(f"--logs: expected room for a checkpoint of {size / 2**20:.0f} MiB in '{self.checkpoints}', got "
                             f"{free / 2**20:.0f} MiB")  # fmt: skip

    def close(self) -> None:
        """Let go of the folder; one in which no run has begun is taken away again."""
        if self._lock is None:
            return
        lock = self.path / "lock"
        # Before another process can take it; Windows deletes no open file, nor one that another process has opened since.
        with contextlib.suppress(OSError):
            lock.unlink()
        self._lock.close()
        self._lock = None
        with contextlib.suppress(OSError):
            lock.unlink()
        if not (self.used or self.begun):
            with contextlib.suppress(OSError):
                (self.path / "out.log").unlink()
        for folder in (self.checkpoints, self.path, Path(self.logs)):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def finished(results: Path) -> bool:
    """Whether a results.json is that of a run which has done its last step; one that goes, or was killed, says so."""
    try:
        with results.open(encoding="utf-8", errors="replace") as file:
            return '"finished": false' not in file.read(100)
    except OSError:
        return results.exists()


def portable(name: str) -> bool:
    """Whether every platform takes `name` for a file or folder, with folders of its own before slashes."""
    parts = name.replace("\\", "/").split("/")
    return all(
        part
        and not set(part) & set(NOT_IN_NAMES)
        and min(map(ord, part)) >= 32
        and part[-1] not in " ."
        and part.split(".")[0].strip().lower() not in RESERVED
        for part in parts
    )


def probe(folder: Path) -> None:
    """Write a file in the folder and take it away again; an OSError says why that cannot be."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".probe")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(b"probe" * 1000)
    finally:
        os.unlink(name)


def locked(path: Path) -> IO[str] | None:
    """The file, open and locked until it is closed or its process ends; None where another process holds it.

    The operating system forgets a lock with the process that held it, so none is ever stale. A file system without
    locks gives the file unlocked.
    """
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            if not _lock(file):
                file.close()
                return None
            # Between opening and locking, the process before may have taken the file away.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[str]) -> bool:
    try:
        try:
            import fcntl
        except ImportError:
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True
    except OSError as error:
        return error.errno not in HELD
    return True
