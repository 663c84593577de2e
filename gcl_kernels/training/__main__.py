"""`python -m gcl_kernels.training`: see `gcl_kernels.training.train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from gcl_kernels.training.errors import InputError
from gcl_kernels.training.options import parse_args
from gcl_kernels.training.train import metrics_table, train


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; input or options that cannot be used give their message and status 2."""
    args = parse_args(argv)
    try:
        run = train(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if run.evaluations:
        rows = []
        for path, evaluation in run.evaluations.items():
            rows += [(path, args.score_to_weight, evaluation), ("", "random ranking", run.random[path])]
        print(metrics_table(rows))
    if run.checkpoint and int(os.environ.get("RANK", 0)) == 0:
        print(f"{run.seconds:.0f} s, peak memory {run.peak_bytes / 2**20:.0f} MiB, checkpoint {run.checkpoint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
