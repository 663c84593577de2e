"""Peak memory of a step on the CPU beside what `gcl_kernels.plan` predicts: `python -m bench.memory` (two minutes).

Each figure comes from a fresh process: peak resident memory over what is resident once the inputs are there, less the gradients.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bench.cases import DTYPES
from bench.measure import in_fresh_process
from gcl_kernels import ClipLoss, plan
from gcl_kernels.backends import settings
from gcl_kernels.chips import Chip, this_cpu
from gcl_kernels.training.memory import peak_resident_memory, reset_peak_resident_memory, resident_memory
from gcl_kernels.training.openclip import import_open_clip


@dataclass(frozen=True)
class Case:
    loss: str  # ours or dense
    n: int
    d: int
    dtype: str = "fp32"
    budget_mib: int = 256

    def __str__(self) -> str:
        return f"{self.loss:6}{self.n:>7,} x {self.d:<5}{self.dtype:6}{self.budget_mib:>4} MiB"


SWEEP = (
    *(
        Case("ours", n, d, "fp32", budget)
        for n, d in ((2048, 512), (4096, 128), (8192, 64))
        for budget in (16, 64, 256)
    ),
    Case("ours", 1024, 512),
    Case("ours", 4096, 1024),
    Case("ours", 4096, 2048),
    Case("ours", 8192, 512),
    Case("ours", 16_384, 64, "fp32", 64),
    Case("ours", 16_384, 128),
    Case("ours", 4096, 512, "bf16"),
    Case("ours", 4096, 512, "bf16", 16),
    Case("ours", 8192, 512, "fp16", 64),
    *(Case("dense", n, d) for n, d in ((2048, 512), (4096, 128), (4096, 1024), (8192, 512))),
)


def measured(case: Case) -> float:
    """Extra MiB, in a fresh process."""
    arguments = "--of", case.loss, str(case.n), str(case.d), case.dtype
    return float(in_fresh_process("bench.memory", *arguments))


def measure_here(name: str, n: int, d: int, dtype: str) -> float:
    """Extra MiB of one step in this process, which should have done nothing else."""
    if name == "ours":
        loss = ClipLoss()
    else:
        loss = import_open_clip().ClipLoss()

    def inputs(rows: int):
        unit = torch.nn.functional.normalize
        x, y = (unit(torch.randn(rows, d)).to(DTYPES[dtype]).requires_grad_() for _ in range(2))
        return x, y, torch.tensor(100 / 7).requires_grad_()

    for tile in (None, (64, 64)):  # libraries and threads are there, for a small batch and for one of several tiles
        with settings(tile=tile):
            loss(*inputs(128)).backward()
    tensors = inputs(n)
    before = resident_memory()
    reset_peak_resident_memory()
    loss(*tensors).backward()
    peak = peak_resident_memory()
    return (peak - before - sum(x.grad.nbytes for x in tensors if x.grad is not None)) / 2**20


def predicted(case: Case, chip: Chip) -> float:
    """Extra MiB; reads the budget from the environment, as the backend does."""
    predict = plan.ours if case.loss == "ours" else plan.dense
    return predict(plan.Sizes.of_batch(case.n, case.d, case.dtype), chip).extra_memory / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs=4, metavar=("LOSS", "N", "D", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of:
        torch.set_num_threads(1)  # beside other work, threads that wait for each other take a hundred times as long
        name, n, d, dtype = options.of
        print(measure_here(name, int(n), int(d), dtype))
        return 0
    chip, worst = this_cpu(), 0.0
    print(f"{'':35}{'measured':>10}{'model':>10}")
    for case in tqdm(SWEEP, unit="case"):
        os.environ["GCL_KERNELS_WORKSPACE_MIB"] = str(case.budget_mib)
        actual, expected = measured(case), predicted(case, chip)
        off = expected / actual - 1
        worst = max(worst, abs(off))
        tqdm.write(f"{case!s:35}{actual:>10.1f}{expected:>10.1f} MiB {off:+.0%}")
    print(f"the model is off by at most {worst:.0%}")
    return worst > 0.15


if __name__ == "__main__":
    sys.exit(main())
