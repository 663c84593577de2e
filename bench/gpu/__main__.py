"""Everything that needs a GPU, in one command and under nine minutes: `python -m bench.gpu --out results`.

    machine    the GPU, versions and clocks as found, and what the model predicts, written before anything is measured
    ceilings   matrix products and copies, the ceilings of this run; aggregate_fields beside the copy
    tests      pytest -m gpu
    bench_*    python -m bench: ours beside every peer that can be imported, errors to float64
    screen     the search space compiled: what spills or does not fit is out before it is timed
    tune       the rest timed, forward and backward tile kernels apart; tuning.txt is ready to paste into the configuration table
    ncu        hardware counters of both tile kernels, or why there are none

Each step is a process with a time limit. `summary.json` is written after each, `log.txt` has their output. Run again, it goes
on where it stopped: steps with a result are not repeated. `--dry-run` runs every step on a CPU, in Triton's interpreter, at toy
sizes; its figures mean nothing.
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
