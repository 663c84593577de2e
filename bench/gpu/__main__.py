"""Everything that needs a GPU, in calls of under nine minutes: `python -m bench.gpu --out results`.

    machine    the GPU, versions and clocks as found, and what the model predicts, written before anything is measured
    sanity     each loss once in each dtype, beside float64, with the time of its first call
    tests      pytest -m gpu
    ceilings   matrix products and copies, the ceilings of this run; aggregate_fields beside the copy
    gates      the cases that decide: N = 2,048 beside dense losses, N = 65,536 of both losses
    screen     the search space compiled: what spills or does not fit is out before it is launched
    tune       the rest timed by CUDA graph replays: forward, backward and sigmoid tiles apart; tuning.txt is ready to paste
    curves     N = 64 to 65,536, eager and in a CUDA graph, beside dense losses
    peers      every peer that can be imported, or why it has no figure
    chunks     the backward's two matrix products at several heights of a chunk
    ncu        hardware counters of the tile kernels, or why there are none
    large      N = 262,144 and 1,048,576

Each step is a process with a time limit. `summary.json` and `report.md` are written after each, `log.txt` has their output. Run
again, it goes on where it stopped: steps with a result are not repeated. Layout: bench/gpu/README.md. `--dry-run` runs every step
on a CPU, in Triton's interpreter, at toy sizes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.context import Context
from bench.gpu.queue import session
from bench.gpu.steps import STEPS, one_pass
from bench.gpu.targets import targets_table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_session"), help="folder of results")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--limit", type=float, default=530, help="seconds for all steps together")
    parser.add_argument("--step", choices=(*STEPS, "one_pass"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        if options.dry_run:
            from bench.gpu import interpreter as _  # noqa: F401
        step = one_pass if options.step == "one_pass" else STEPS[options.step][0]
        step(Context(options.result, options.out, options.dry_run))
        return 0
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("bench.gpu: expected a CUDA or HIP device, got none; --dry-run needs none")
    summary = session(options.out, options.dry_run, options.limit)
    print(
        f"\n{'Dry run: figures mean nothing.' if options.dry_run else 'Targets'}\n{targets_table(summary.get('targets', []))}"
    )
    return any(step["status"] != "ok" for step in summary["steps"].values())


if __name__ == "__main__":
    sys.exit(main())
