"""Timing, accuracy and peak memory of one case: ours and its peers in turns, in one process; memory on a CPU in fresh ones."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import oracle
from bench.cases import DIRECTIONS, DTYPES, Case, Inputs, build
from bench.peers import DENSE_COPIES, PEERS, Loss, Unsupported, version

# A step below this is timed in bursts of BURST steps after one that is not counted: what the task before it left in the caches,
# and in what order tasks take turns, is then no part of its time.
SHORT_SECONDS, BURST = 0.25, 5
LONG_SECONDS = 20.0  # of a step that is measured once
GEMM_SECONDS = 0.3
ERROR_LOGITS = {"cpu": 2**26, "cuda": 2**33}  # the float64 oracle is run up to so many: half a minute


def cell_rows(case: Case, peers: Sequence[str], turns: int | None, error: bool) -> list[dict[str, Any]]:
    """A row for each peer: times of each turn, rates, ratios, errors, memory; or the reason that there are none."""
    inputs = build(case)
    rows: dict[str, dict[str, Any]] = {}
    tasks: dict[str, Callable[[], float]] = {}
    seconds: dict[str, float] = {}
    exact = None
    for name in peers:
        row = rows[name] = {**case.as_dict(), "peer": name, "version": version(name), "seconds": None, "reason": None}
        try:
            fits(case, name)
            loss = PEERS[name](case)
            if case.passes == "both" and error and comparable(case):
                exact = exact or oracle.loss_and_gradients(
                    inputs.lhs, inputs.rhs[0], inputs.logit_scale, DIRECTIONS[case.directions]
                )
                row["error"] = errors(loss, inputs, exact)
            else:
                seconds[name] = step(loss, inputs, case)
            if seconds.get(name, 0) < LONG_SECONDS:
                seconds[name] = step(loss, inputs, case)
            tasks[name] = repeated(loss, inputs, case, BURST if seconds[name] < SHORT_SECONDS else 1)
            if case.device == "cuda":
                row["extra_mib"] = cuda_extra_mib(loss, inputs, case)
        except Exception as refusal:  # whatever a peer or its compiler raises is its result, never the end of a run
            row["reason"] = reason(refusal)
            release(case)
    product = gemm(case)
    turns = turns or (31 if max(seconds.values(), default=0) < 0.05 else 5)
    long = {name: t for name, t in seconds.items() if t >= LONG_SECONDS}
    tasks = {name: task for name, task in tasks.items() if name not in long}
    times = interleaved({"gemm": product, **tasks}, turns)
    rate = [1 / t for t in times.pop("gemm")]  # FLOP/s, turn by turn
    times |= {name: [t] for name, t in long.items()}
    for name, row in rows.items():
        row["gemm_tflops"] = statistics.median(rate) / 1e12
        if name not in times:
            continue
        row["seconds"] = times[name]
        row["tflops"] = case.flops / statistics.median(times[name]) / 1e12
        row["of_gemm"] = statistics.median(
            case.flops / t / r for t, r in zip(times[name], rate, strict=name not in long)
        )
        if name == "ours":
            row["over"] = {peer: median_ratio(times[peer], times[name]) for peer in times if peer != name}
        if case.device == "cpu":
            row["extra_mib"] = cpu_extra_mib(case, name)
    return list(rows.values())


def comparable(case: Case) -> bool:
    """Whether ``oracle`` knows the case and finishes in reasonable time."""
    small = case.n * case.m <= ERROR_LOGITS.get(case.device, 2**26)
    return case.fields == 1 and not case.ids and case.n <= case.m and small


def errors(loss: Loss, inputs: Inputs, exact: Sequence[Tensor]) -> dict[str, float]:
    value = loss(inputs)
    gradients = torch.autograd.grad(value, inputs.leaves, allow_unused=True)  # a constant scale has none
    names = ("loss", "lhs", "rhs", "logit_scale")
    return {
        name: oracle.relative_error(got, want)
        for name, got, want in zip(names, (value, *gradients), exact, strict=True)
        if got is not None
    }


def fits(case: Case, peer: str) -> None:
    """On a CPU, logits that do not fit would not fail: they would take the machine down."""
    if case.device != "cpu" or peer not in DENSE_COPIES:
        return
    need = DENSE_COPIES[peer] * case.n * case.m * DTYPES[case.dtype].itemsize / 2**30
    free = available_gib()
    if need > 0.9 * free:
        raise Unsupported(f"out of memory: its logits need about {need:.0f} GiB, {free:.0f} GiB are free")


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return float("inf")


def reason(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = next((line for line in str(error).splitlines() if line.strip()), "no message")[:200]
    return text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text}"


def release(case: Case) -> None:
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step(loss: Loss, inputs: Inputs, case: Case) -> float:
    """Seconds of the passes that the case asks for; gradients are dropped afterwards, outside the time."""
    synchronize(case.device)
    start = time.perf_counter()
    if case.passes == "forward":
        with torch.no_grad():
            loss(inputs)
    else:
        value = loss(inputs)
        if case.passes == "backward":
            synchronize(case.device)
            start = time.perf_counter()
        value.backward()
    synchronize(case.device)
    seconds = time.perf_counter() - start
    for x in inputs.leaves:
        x.grad = None
    return seconds


def repeated(loss: Loss, inputs: Inputs, case: Case, steps: int) -> Callable[[], float]:
    def task() -> float:
        if steps > 1:
            step(loss, inputs, case)
        return sum(step(loss, inputs, case) for _ in range(steps)) / steps

    return task


def gemm(case: Case) -> Callable[[], float]:
    """A function that runs matrix products for about GEMM_SECONDS, in this machine's fastest of three shapes, and returns
    seconds per FLOP. In the case's dtype; float32 on CPUs, whose half-precision products may be slower than widened ones."""
    dtype = torch.float32 if case.device == "cpu" and case.dtype != "fp64" else DTYPES[case.dtype]
    candidates = []
    side = 8192
    for n, m, k in ((2048, 2048, case.d), (side, side, case.d), (1024, case.d, 1024), (4096, 4096, 4096)):
        if case.device == "cpu" and n * m * k > 2**36:
            continue
        a, b = (torch.randn(rows, k, device=case.device, dtype=dtype) for rows in (n, m))
        out = torch.empty(n, m, device=case.device, dtype=dtype)

        def run(repeats: int, a=a, b=b, out=out, each=2 * n * m * k) -> float:
            synchronize(case.device)
            start = time.perf_counter()
            for _ in range(repeats):
                torch.mm(a, b.t(), out=out)
            synchronize(case.device)
            return (time.perf_counter() - start) / (repeats * each)

        run(1)
        once = run(1) * 2 * n * m * k
        repeats = max(1, round(0.05 / once))
        best = min(run(repeats) for _ in range(3))
        candidates.append((best, run, max(1, round(GEMM_SECONDS / (best * 2 * n * m * k)))))
    _, run, repeats = min(candidates, key=lambda c: c[0])
    return lambda: run(repeats)


def cuda_extra_mib(loss: Loss, inputs: Inputs, case: Case) -> float:
    """Peak allocated over what was before the step, less the gradients."""
    release(case)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, inputs, case)
    gradients = 0 if case.passes == "forward" else sum(x.numel() * x.element_size() for x in inputs.leaves)
    return (torch.cuda.max_memory_allocated() - before - gradients) / 2**20


def cpu_extra_mib(case: Case, peer: str) -> float:
    """Peak resident memory over what inputs and gradients need, MiB, in a fresh process; at least 0."""
    return float(in_fresh_process("bench", "--memory-of", peer, json.dumps(case.as_dict())))


def print_memory_of(peer: str, case: Case) -> None:
    loss = PEERS[peer](case)
    small = Case(**{**case.as_dict(), "n": 64, "m": 64})
    step(PEERS[peer](small), build(small), small)  # libraries and threads are there
    inputs = build(case)
    gc.collect()
    before = memory_mib("VmRSS")
    gradients = 0 if case.passes == "forward" else sum(x.numel() * x.element_size() for x in inputs.leaves) / 2**20
    reset_peak()
    value = loss(inputs)
    if case.passes != "forward":
        value.backward()
    print(max(memory_mib("VmHWM") - before - gradients, 0.0))


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
    """Median over turns of a / b; what was measured once has one turn."""
    return statistics.median(x / y for x, y in zip(a, b, strict=False))


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
    # Freed memory goes back to the system: a step would otherwise use again what drawing its inputs has left, uncounted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}: exit {result.returncode}\n{result.stderr[-2000:]}")
    return result.stdout.strip().splitlines()[-1]


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), name)
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
