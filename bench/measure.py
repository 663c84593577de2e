"""Timing and peak memory of one training step of a loss, each memory figure in a process of its own."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor


def embeddings(n: int, d: int, seed: int = 0, cosine: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors as a half-trained model gives them: positives at a cosine around ``cosine``; logit_scale 100 / 7."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, d, generator=g))
    noise = torch.nn.functional.normalize(torch.randn(n, d, generator=g))
    y = torch.nn.functional.normalize(cosine * x + (1 - cosine**2) ** 0.5 * noise)
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(100 / 7).requires_grad_()


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def burst(loss: Loss, inputs: Sequence[Tensor], steps: int) -> float:
    """Mean seconds of ``steps`` steps after one that is not counted: what the task before it left in the caches, and in what
    order tasks take turns, is then no part of a small batch's time."""
    step(loss, inputs)
    return sum(step(loss, inputs) for _ in range(steps)) / steps


def step(loss: Loss, inputs: Sequence[Tensor]) -> float:
    """Seconds of one forward and backward; gradients are dropped afterwards, outside the time."""
    start = time.perf_counter()
    loss(*inputs).backward()
    seconds = time.perf_counter() - start
    for x in inputs:
        x.grad = None
    return seconds


def gemm(flops: float, d: int) -> Callable[[], float]:
    """A function that runs about ``flops`` of float32 matrix products, in this machine's fastest of three shapes, and returns
    seconds per FLOP."""
    candidates = []
    for n, m, k in ((2048, 2048, d), (8192, 8192, d), (1024, d, 1024)):
        a, b, out = torch.randn(n, k), torch.randn(m, k), torch.empty(n, m)

        def run(repeats, a=a, b=b, out=out, each=2 * n * m * k):
            start = time.perf_counter()
            for _ in range(repeats):
                torch.mm(a, b.t(), out=out)
            return (time.perf_counter() - start) / (repeats * each)

        run(1)
        each = 2 * n * m * k
        candidates.append((min(run(max(1, round(1e10 / each))) for _ in range(5)), run, max(1, round(flops / each))))
    _, run, repeats = min(candidates, key=lambda c: c[0])
    return lambda: run(repeats)


def interleaved(tasks: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """What each task returns, ``turns`` times, in turns after one warm-up, so that noise meets all alike."""
    results: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(turns + 1):
        for name, task in tasks.items():
            value = task()
            if turn:
                results[name].append(value)
    return results


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over turns of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def memory_mib(field: str) -> float:
    """Linux: VmRSS (resident now) or VmHWM (its peak since :func:`reset_peak`) of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"memory_mib: expected {field} in /proc/self/status, got none")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def in_fresh_process(module: str, *arguments: str) -> str:
    """Last line that ``python -m module arguments`` prints."""
    result = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}: exit {result.returncode}\n{result.stderr[-2000:]}")
    return result.stdout.strip().splitlines()[-1]


def machine() -> dict[str, str | int]:
    """What a figure must be read with."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), name)
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
