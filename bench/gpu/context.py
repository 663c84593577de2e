"""What a step of the GPU queue knows: its sizes, where it writes, what ran before it, and how it takes times."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcl_kernels.training.errors import DataError
from gcl_kernels.training.files import read_json, write_json_atomically

Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What a step measures."""

    dimensions: tuple[int, ...]  # bands to tune
    first_n: int  # every candidate
    last_n: int  # the best of them
    finalists: int
    gemm: int
    fields: tuple[int, int]
    screened_d: int
    sanity: tuple[int, int]  # (N, D)
    chunk_rows: tuple[int, ...]  # heights of G whose two products are timed
    chunk_n: int  # of a problem whose chunks they are


REAL = Sizes(
    (768, 512, 256, 1024), 16_384, 65_536, 3, 8192, (65_536, 768), 768,
    (1000, 512), (8192, 8448, 9216, 10_240, 11_008, 11_264, 12_672, 16_896), 65_536,
)  # fmt: skip
TOY = Sizes((32,), 48, 64, 2, 256, (64, 32), 64, (48, 32), (32, 64), 96)


@dataclass
class Context:
    """What a step knows: where it writes, what ran before it."""

    result_path: Path
    out: Path
    dry_run: bool

    @property
    def sizes(self) -> Sizes:
        return TOY if self.dry_run else REAL

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def save(self, result: Result) -> None:
        """May be called as often as there is something new: a step that is stopped keeps what it saved."""
        if self.result_path != Path(os.devnull):
            write_json_atomically(self.result_path, result, indent=1)

    def result_of(self, step: str) -> Result:
        return read(self.out / "summary.json").get("steps", {}).get(step, {}).get("result", {})


def timed(work: Callable[[], object], context: Context, milliseconds: int = 100, *, graph: bool = False) -> list[float]:
    """Seconds of each repeat, by the GPU's own clock: with a cold L2 cache before each; or, `graph`, of replays of a CUDA graph
    of many, so that no host is in the time."""
    if context.dry_run:
        start = time.perf_counter()
        work()
        return [time.perf_counter() - start]
    from triton.testing import do_bench, do_bench_cudagraph

    if graph:
        replays: Any = do_bench_cudagraph(work, rep=milliseconds, return_mode="all")
        return [t / 1e3 for t in replays]
    times: Any = do_bench(work, warmup=milliseconds // 4, rep=milliseconds, return_mode="all")
    return [t / 1e3 for t in times]


def median(times: list[float]) -> float:
    return statistics.median(times)


def read(path: Path) -> Result:
    """What is there; nothing where there is no file, or one that is no JSON."""
    try:
        return read_json(path)
    except DataError:
        return {}
