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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import oracle
from bench.cases import DTYPES, LOGIT_BIAS, Case, Inputs, build
from bench.peers import COMPILED, DENSE_COPIES, Loss, Unsupported, peer, version
from gcl_kernels.backends import settings
from gcl_kernels.losses import ROW_SHARE
from gcl_kernels.testing import relative_error
from gcl_kernels.training.memory import peak_resident_memory, reset_peak_resident_memory, resident_memory

# A step below this is timed in bursts of BURST steps, after one that is not counted: what came before it is no part of its time.
SHORT_SECONDS, BURST = 0.25, 5
LONG_SECONDS = 20.0  # of a step that is measured once
GEMM_SECONDS, GEMM_SECONDS_CUDA = 0.1, 0.02  # the latter: its rate needs no longer, and time on a GPU is lent
REPLAY_SECONDS = 0.01  # of a CUDA graph, at a time
ERROR_LOGITS = {"cpu": 2**26, "cuda": 2**33}  # the float64 oracle is run up to so many: half a minute
SAMPLED_LINES = 64  # beyond: the gradients of so many rows and columns


def cell_rows(case: Case, peers: Sequence[str], turns: int | None, error: bool) -> list[dict[str, Any]]:
    """A row for each peer: times of each turn, rates, ratios, errors, memory; or the reason that there are none."""
    inputs, product = build(case), gemm(case)
    exact = exact_results(case, inputs) if error else None
    sample = sampled_results(case, inputs) if error and exact is None else None
    rows: dict[str, dict[str, Any]] = {}
    tasks: dict[str, Callable[[], float]] = {}
    once: dict[str, float] = {}  # seconds of what is measured once
    slowest = 0.0
    for name in peers:
        row = rows[name] = row_of(case, name, None)
        try:
            fits(case, name)
            loss = peer(name)(case)
            if case.graph:
                captured, results = graph(loss, inputs)
                if exact is not None:
                    row["error"] = errors_of(results, exact)
                tasks[name] = replayed(captured)
                continue
            if exact is not None:
                row["error"] = errors(loss, inputs, exact)
            elif sample is not None:
                row["error"] = sampled_errors(loss, inputs, sample)
            seconds = step(loss, inputs, case)
            if seconds >= LONG_SECONDS:
                once[name] = seconds
            else:
                seconds = step(loss, inputs, case)
                tasks[name] = repeated(loss, inputs, case, BURST if seconds < SHORT_SECONDS else 1)
                slowest = max(slowest, seconds)
            if case.device == "cuda":
                row["extra_mib"] = cuda_extra_mib(loss, inputs, case)
        except Exception as refusal:  # whatever a peer or its compiler raises is its result, never the end of a run
            row["reason"] = reason(refusal)
            tasks.pop(name, None)
            try:
                release(case)
            except Exception as lost:
                raise RuntimeError(f"{name}: {row['reason']}; the device no longer answers") from lost
    times, failures = interleaved({"gemm": product, **tasks}, turns or (31 if slowest < 0.05 else 5))
    per_flop = times.pop("gemm")
    times |= {name: [t] for name, t in once.items()}
    for name, row in rows.items():
        row["gemm_tflops"] = 1e-12 / statistics.median(per_flop)
        if name in failures:
            row["reason"] = reason(failures[name])
        if name not in times:
            continue
        row["seconds"] = times[name]
        row["min_seconds"] = min(times[name])
        row["tflops"] = case.flops / statistics.median(times[name]) / 1e12
        if name not in once:  # it had no turn beside a product, whose rate changes within seconds
            row["of_gemm"] = case.flops * median_ratio(per_flop, times[name])
        if name == "ours":
            row["over"] = {other: median_ratio(times[other], times[name]) for other in times if other != name}
        if case.device == "cpu":
            row["extra_mib"] = cpu_extra_mib(case, name)
    return list(rows.values())


def row_of(case: Case, name: str, why: str | None) -> dict[str, Any]:
    """A peer's row before it has a figure."""
    return {**case.as_dict(), "peer": name, "version": version(name), "seconds": None, "reason": why}


def exact_results(case: Case, inputs: Inputs) -> list[Tensor] | None:
    """What `oracle` says, where it knows the case and finishes in reasonable time."""
    small = case.n * case.m <= ERROR_LOGITS.get(case.device, 2**26)
    plain = case.fields == 1 and not case.ids and not case.option
    if not (case.passes == "both" and plain and case.n <= case.m and small):
        return None
    lhs, rhs, scale = inputs.leaves
    if case.device == "mps":  # has no float64
        lhs, rhs, scale = (x.cpu() for x in (lhs, rhs, scale))
    if case.loss == "sigmoid":
        return oracle.sigmoid_loss_and_gradients(lhs, rhs, scale, LOGIT_BIAS)
    return oracle.loss_and_gradients(lhs, rhs, scale, ROW_SHARE[case.directions])


def errors(loss: Loss, inputs: Inputs, exact: Sequence[Tensor]) -> dict[str, float]:
    return errors_of(results_of(loss, inputs), exact)


def results_of(loss: Loss, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The loss and its gradients."""
    value = loss(inputs)
    return (value, *torch.autograd.grad(value, inputs.leaves, allow_unused=True))  # a constant scale has none


def errors_of(results: Sequence[Tensor | None], exact: Sequence[Tensor]) -> dict[str, float]:
    names = ("loss", "lhs", "rhs", "logit_scale")
    return {
        name: relative_error(got, want)
        for name, got, want in zip(names, results, exact, strict=True)
        if got is not None
    }


def sampled_results(case: Case, inputs: Inputs) -> tuple[Tensor, list[Tensor], dict[str, float]] | None:
    """(lines, the exact [dlhs, drhs] there, errors of what they rest on), where the whole oracle takes too long."""
    known = case.passes == case.directions == "both" and case.fields == 1 and not case.ids and case.n == case.m
    if case.device != "cuda" or not known:
        return None
    lhs, rhs, scale = inputs.leaves
    picked = torch.linspace(0, case.n - 1, min(SAMPLED_LINES, case.n), device=lhs.device).long()
    if case.loss == "sigmoid":
        return picked, oracle.sampled_sigmoid_gradients(lhs, rhs, scale, picked, LOGIT_BIAS), {}
    from gcl_kernels import pairwise_logsumexp

    with torch.no_grad():
        lines = pairwise_logsumexp(lhs, rhs, scale)
    assert lines.row is not None
    assert lines.col is not None
    row, col, *exact = oracle.sampled_gradients(lhs, rhs, scale, picked, 0.5, lines.row, lines.col)
    off = {"row statistics": lines.row[picked], "column statistics": lines.col[picked]}
    wanted = zip(off.items(), (row, col), strict=True)
    return picked, exact, {name: relative_error(got, want) for (name, got), want in wanted}


def sampled_errors(
    loss: Loss, inputs: Inputs, sample: tuple[Tensor, list[Tensor], dict[str, float]]
) -> dict[str, float]:
    picked, exact, off = sample
    _, dlhs, drhs, _ = results_of(loss, inputs)
    assert dlhs is not None
    assert drhs is not None
    lines = {"lhs": relative_error(dlhs[picked], exact[0]), "rhs": relative_error(drhs[picked], exact[1])}
    return {**lines, **off, "sampled lines": len(picked)}


def graph(loss: Loss, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...]]:
    """A step captured after three eager ones, and its results after one replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            results_of(loss, inputs)
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = results_of(loss, inputs)
    captured.replay()
    torch.cuda.synchronize()
    return captured, results


def replayed(captured: torch.cuda.CUDAGraph) -> Callable[[], float]:
    """Seconds of a replay, of as many as take REPLAY_SECONDS."""

    def run(repeats: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            captured.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    run(1)
    repeats = max(1, round(REPLAY_SECONDS / run(3)))
    return lambda: run(repeats)


def fits(case: Case, name: str) -> None:
    """On a CPU, logits that do not fit would not fail: they would take the machine down. On a GPU they would fail after a
    compiler's minute."""
    if case.device not in ("cpu", "cuda") or name not in DENSE_COPIES:
        return
    need = DENSE_COPIES[name] * case.n * case.m * DTYPES[case.dtype].itemsize / 2**30
    free = available_gib() if case.device == "cpu" else torch.cuda.mem_get_info()[0] / 2**30
    if case.device == "cuda":
        need /= (
            2  # copies are counted at a CPU's peak; a GPU refuses what does not fit, so only the hopeless is left out
        )
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
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()


def clock(device: str) -> Callable[[], float]:
    """Seconds. On a CPU that has one thread for a step, that thread's own, in which other processes have no part."""
    return time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def step(loss: Loss, inputs: Inputs, case: Case) -> float:
    """Seconds of the passes that the case asks for; gradients are dropped afterwards, outside the time."""
    now = clock(case.device)
    synchronize(case.device)
    start = now()
    if case.passes == "forward":
        with torch.no_grad():
            loss(inputs)
    else:
        value = loss(inputs)
        if case.passes == "backward":
            synchronize(case.device)
            start = now()
        value.backward()
    synchronize(case.device)
    seconds = now() - start
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
            now = clock(case.device)
            synchronize(case.device)
            start = now()
            for _ in range(repeats):
                torch.mm(a, b.t(), out=out)
            synchronize(case.device)
            return (now() - start) / (repeats * each)

        run(1)
        once = run(1) * 2 * n * m * k
        repeats = max(1, round(0.05 / once))
        best = min(run(repeats) for _ in range(3))
        seconds = GEMM_SECONDS_CUDA if case.device == "cuda" else GEMM_SECONDS
        candidates.append((best, run, max(1, round(seconds / (best * 2 * n * m * k)))))
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


def cpu_extra_mib(case: Case, name: str) -> float | None:
    """Peak resident memory over what inputs and gradients need, MiB, in a fresh process; at least 0. None where that fails, as
    it does without Linux's counters."""
    try:
        return float(in_fresh_process("bench", "--memory-of", name, json.dumps(case.as_dict())))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return None


def print_memory_of(name: str, case: Case) -> None:
    # A step first: libraries and threads are there, for a small batch and for one of several tiles, and a compiler has done its
    # work at this shape.
    first = case if name in COMPILED else replace(case, n=128, m=128)
    loss = peer(name)(first)
    for tile in (None, (64, 64)):
        with settings(tile=tile):
            step(loss, build(first), first)
    loss = loss if first == case else peer(name)(case)
    inputs = build(case)
    gc.collect()
    before = resident_memory()
    gradients = 0 if case.passes == "forward" else sum(x.numel() * x.element_size() for x in inputs.leaves)
    reset_peak_resident_memory()
    step(loss, inputs, case)
    print(max(peak_resident_memory() - before - gradients, 0) / 2**20)


def interleaved(
    tasks: dict[str, Callable[[], float]], turns: int
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """What each task returns, `turns` times, in turns after one warm-up, so that noise meets all alike. A task that fails, in
    whatever turn, is out; the second result says why."""
    results: dict[str, list[float]] = {name: [] for name in tasks}
    failures: dict[str, Exception] = {}
    for turn in range(turns + 1):
        for name in list(results):
            try:
                value = tasks[name]()
            except Exception as failure:
                failures[name] = failure
                del results[name]
                continue
            if turn:
                results[name].append(value)
    return results, failures


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over turns of a / b; what was measured once has one turn."""
    return statistics.median(x / y for x, y in zip(a, b, strict=False))


# Environment of a process whose memory is measured: what it frees goes back to the system. Otherwise glibc keeps some of the
# inputs' temporaries, which a step takes over, uncounted.
FREED_IS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def in_fresh_process(module: str, *arguments: str) -> str:
    """Last line that `python -m module arguments` prints."""
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **FREED_IS_FREED})
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
        "clock": clock("cpu").__name__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
