"""`python -m gcl_kernels.training`: see `gcl_kernels.training.run`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from gcl_kernels.training.errors import ElsewhereError, InputError
from gcl_kernels.training.options import parse_args
from gcl_kernels.training.run import train
from gcl_kernels.training.stopping import Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Returns 0, or 2 after a message about input or options that cannot be used, or 128 and the number of the signal that
    has ended the run.
    """
    for stream in (sys.stdout, sys.stderr):
        # Ids and paths may hold what the terminal's encoding does not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        train(parse_args(argv))
    except ElsewhereError:
        return 2
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(stopped, file=sys.stderr)
        return 128 + stopped.number
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        print(f"{error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
