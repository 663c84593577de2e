"""How a command of the harness ends: 0, or 2 after one line that says what cannot be used."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from gcl_kernels.training.errors import InputError


def run(work: Callable[[], int | None]) -> int:
    """Do `work`; returns its status, 2 after a message about input that cannot be used, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # Ids and paths may hold what the terminal's encoding does not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who reads the output, as `head` does, has enough; the interpreter would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        print(f"{error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
