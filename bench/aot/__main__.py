"""What the kernels compile to, without a GPU: `python -m bench.aot [--family sm_90] [--dtype bfloat16] [--d 768]`.

Every kernel of the configuration table is compiled ahead of time, for chips that need not be present, and its machine code is
read: registers, stack frame, spills, shared memory against the chip's limit, matrix and copy instructions, access widths, and
how many integer instructions the loop over D spends on each matrix instruction. Exits with 1 where a default configuration
spills, needs a stack frame, does not fit, misses the chip's matrix, copy or exponential unit, or reads in narrow pieces.

The table goes to `bench/results/aot.txt`; a run over a part of the grid renews its part.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from tqdm import tqdm

from bench.aot.grid import DIMENSIONS, DTYPES, GRID_FAMILIES, Case, cases, same_code
from bench.aot.machine_code import inspect
from bench.aot.table import HEADER, line, save, title


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", choices=GRID_FAMILIES, default=GRID_FAMILIES)
    parser.add_argument(
        "--dtype", nargs="*", choices=[str(t)[6:] for t in DTYPES], default=[str(t)[6:] for t in DTYPES]
    )
    parser.add_argument("--d", nargs="*", type=int, default=DIMENSIONS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    grid: dict[Case, list[Case]] = {}
    for case in cases(options.family, [getattr(torch, name) for name in options.dtype], sorted(options.d)):
        grid.setdefault(same_code(case), []).append(case)
    tqdm.write(HEADER)
    failures, lines = 0, {}
    with ProcessPoolExecutor(options.processes) as pool:
        for compiled, report in tqdm(zip(grid, pool.map(inspect, grid), strict=True), total=len(grid), unit="kernel"):
            for case in grid[compiled]:
                lines[title(case)] = line(replace(report, case=case))
                failures += bool(report.complaints())
                tqdm.write(lines[title(case)])
            save(lines)
    print(f"{failures} kernel(s) with complaints")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
