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


def step(loss: Loss, inputs: Sequence[Tensor]) -> float:
    """Seconds of one forward and backward; gradients are dropped afterwards, outside the time."""
    start = time.perf_counter()
    loss(*inputs).backward()
    seconds = time.perf_counter() - start
    for x in inputs:
        x.grad = None
    return seconds


def gemm_rate(shapes: Sequence[tuple[int, int, int]], repeats: int = 5) -> float:
    """This machine's float32 matrix-product rate now: FLOP/s of the fastest shape (n, m, k), median of repeats."""
    best = 0.0
    for n, m, k in shapes:
        a, b, out = torch.randn(n, k), torch.randn(m, k), torch.empty(n, m)
        torch.mm(a, b.t(), out=out)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            torch.mm(a, b.t(), out=out)
            seconds.append(time.perf_counter() - start)
        best = max(best, 2 * n * m * k / statistics.median(seconds))
    return best


def interleaved(losses: dict[str, Loss], inputs: Sequence[Tensor], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of ``repeats`` steps of each loss, in turns after one warm-up each, so that noise meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(repeats + 1):
        for name, loss in losses.items():
            seconds = step(loss, inputs)
            if turn:
                times[name].append(seconds)
    return times


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
