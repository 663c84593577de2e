"""Everything that needs a GPU, in one command and under nine minutes: ``python -m bench.gpu_session --out results``.

    machine    the GPU, versions and clocks as found, and what the model predicts, written before anything is measured
    ceilings   matrix products and copies, the ceilings of this run; aggregate_fields beside the copy
    tests      pytest -m gpu
    bench_*    python -m bench: ours beside every peer that can be imported, errors to float64
    screen     the search space compiled: what spills or does not fit is out before it is timed
    tune       the rest timed, forward and backward tile kernels apart; tuning.txt is ready to paste into the configuration table
    ncu        hardware counters of both tile kernels, or why there are none

Each step is a process with a time limit. ``summary.json`` is written after each, ``log.txt`` has their output. Run again, it goes
on where it stopped: steps with a result are not repeated. ``--dry-run`` runs every step on a CPU, in Triton's interpreter, at toy
sizes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]

# Targets: on one GPU, bf16, forward and backward.
FRACTION_OF_GEMM, SPEEDUP, SPEEDUP_OVER_INF_CL, EXTRA_MIB, FRACTION_OF_COPY = 0.70, 1.5, 5.0, 600e6 / 2**20, 0.80


@dataclass(frozen=True)
class Sizes:
    """What a step measures."""

    bench: dict[str, tuple[int, int]]  # step: (N, D)
    dimensions: tuple[int, ...]  # bands to tune
    first_n: int  # every candidate
    last_n: int  # the best of them
    finalists: int
    gemm: int
    fields: tuple[int, int]
    screened_d: int


REAL = Sizes(
    {"bench_65536": (65_536, 768), "bench_4096": (4096, 768), "bench_1048576": (2**20, 512)},
    (256, 512, 768, 1024), 16_384, 65_536, 3, 8192, (65_536, 768), 768,
)  # fmt: skip
TOY = Sizes({"bench_65536": (96, 32)}, (32,), 48, 64, 2, 256, (64, 32), 64)

# ``python -m bench`` without the products that give a CPU's rate: ten seconds of a dry run.
WITHOUT_CEILING = "from bench import __main__, measure; measure.gemm = lambda case: lambda: 1e-9; __main__.main()"

# Rows from which ours is measured alone: dense logits do not fit, the float64 oracle and the other peers take minutes.
ALONE_ABOVE = 2**18

# The search space: (rows, columns, warps), pipeline stages, and for the backward its epilogue whole or in halves. Bands of the
# finalists are then tried in two other heights.
SHAPES = ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
STAGES = (3, 4)
GROUPS = (4, 16)
TOY_SHAPES, TOY_STAGES = ((128, 128, 8),), (3,)

NCU_METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.sum.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "dram__bytes.sum",
    "lts__t_sector_hit_rate.pct",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "launch__registers_per_thread",
    "launch__occupancy_limit_shared_mem",
)


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
        write_json(self.result_path, result)

    def result_of(self, step: str) -> Result:
        return read_json(self.out / "summary.json").get("steps", {}).get(step, {}).get("result", {})


# Steps. Each runs in a process of its own and saves its result.


def machine(context: Context) -> None:
    import torch

    from bench import roofline
    from gcl_kernels import env
    from gcl_kernels.chips import CHIPS
    from gcl_kernels.plan import Problem

    name = "a CPU" if context.dry_run else torch.cuda.get_device_name()
    # The last chip whose name is in the device's; a card that is not in the table is compared with an H100.
    chip = next((c for k, c in reversed(CHIPS.items()) if k.upper() in name.upper()), CHIPS["h100"])
    cases = [Problem(n, n, d, "bf16") for n, d in REAL.bench.values()]
    context.save(
        {
            "gpu": name,
            "nvidia_smi": nvidia_smi(),
            "environment": list(env.report()),
            "predictions": [roofline.predictions(p, chip) for p in cases],
        }
    )
    print("\n".join(env.report()))


def nvidia_smi() -> Result:
    """Clocks, power and temperature as found."""
    fields = (
        "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,clocks_throttle_reasons.active,"
        "power.draw,power.limit,temperature.gpu,memory.used,memory.total,mig.mode.current"
    )
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"reason": "nvidia-smi is not installed"}
    found = subprocess.run([tool, f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True, check=False)
    rows = list(csv.reader(io.StringIO(found.stdout), skipinitialspace=True))
    if found.returncode or len(rows) < 2:
        return {"reason": (found.stdout + found.stderr).strip()[-500:]}
    return dict(zip(rows[0], rows[1], strict=False))


def ceilings(context: Context) -> None:
    """Rates that everything else of this run is read against."""
    import torch

    from gcl_kernels import aggregate_fields

    k, device = context.sizes.gemm, context.device
    a, b = (torch.randn(k, k, device=device, dtype=torch.bfloat16) for _ in range(2))
    gemm = timed(lambda: a @ b, context)
    source = torch.randn(64 * k * k if not context.dry_run else k * k, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), context)
    n, d = context.sizes.fields
    fields = {
        name: torch.randn(n, d, device=device, dtype=torch.bfloat16).requires_grad_() for name in ("image", "title")
    }
    weights = {"image": 0.9, "title": 0.1}
    joined = aggregate_fields(fields, weights)
    upstream = torch.randn_like(joined)
    with torch.no_grad():
        forward = timed(lambda: aggregate_fields(fields, weights), context)
    both = timed(
        lambda: torch.autograd.grad(aggregate_fields(fields, weights), list(fields.values()), upstream), context
    )
    one = joined.numel() * joined.element_size()
    copy_rate = 2 * source.numel() * source.element_size() / median(copy)
    context.save(
        {
            "gemm": {"n": k, "dtype": "bf16", "seconds": gemm, "tflops": 2 * k**3 / median(gemm) / 1e12},
            "copy": {"bytes": source.numel() * source.element_size(), "seconds": copy, "bytes_per_second": copy_rate},
            "aggregate_fields": {
                "n": n,
                "d": d,
                "fields": 2,
                "dtype": "bf16",
                "forward_seconds": forward,
                "forward_and_backward_seconds": both,
                # each input read once, each output written once: forward 2 + 1, backward 3 + 2
                "forward_of_copy": 3 * one / median(forward) / copy_rate,
                "forward_and_backward_of_copy": 8 * one / median(both) / copy_rate,
            },
        }
    )


def timed(work: Callable[[], object], context: Context, milliseconds: int = 100) -> list[float]:
    """Seconds of each repeat: on a GPU with a cold L2 cache before each, by its own clock."""
    if context.dry_run:
        start = time.perf_counter()
        work()
        return [time.perf_counter() - start]
    from triton.testing import do_bench

    times: Any = do_bench(work, warmup=milliseconds // 4, rep=milliseconds, return_mode="all")
    return [t / 1e3 for t in times]


def tests(context: Context) -> None:
    where = "tests/test_gpu.py" if context.dry_run else "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", where, "--no-header"]
    if context.dry_run:
        command += ["-k", "bits or (plain and bfloat16)"]
    returncode, output = shown(command)
    context.save(
        {"exit": returncode, "last_line": (output.strip().splitlines() or [""])[-1], "passed": returncode == 0}
    )
    if returncode:
        sys.exit(returncode)


def bench_step(name: str) -> Callable[[Context], None]:
    def bench(context: Context) -> None:
        n, d = context.sizes.bench[name]
        path = context.out / f"{name}.json"
        run = ["-c", WITHOUT_CEILING] if context.dry_run else ["-m", "bench"]
        command = [sys.executable, *run, "--device", context.device, "--dtype", "bf16", "--n", str(n), "--d", str(d)]
        command += ["--logit-scale", str(100 / 7), "--json", str(path), "--resume"]
        if n > ALONE_ABOVE:
            command += ["--peers", "none", "--no-error", "--turns", "1"]
        if context.dry_run:
            command += ["--peers", "none", "--turns", "1"]
        returncode, output = shown(command)
        if returncode or not path.exists():
            context.save({"reason": output.strip()[-500:]})
            sys.exit(returncode or 1)
        context.save({"n": n, "d": d, "file": path.name})

    return bench


def shown(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output, which is passed on line by line."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def candidates(context: Context) -> list[tuple[str, Any]]:
    """(kernel, tile) of the search space."""
    from gcl_kernels.backends.triton.config import Tile

    shapes, stages = (TOY_SHAPES, TOY_STAGES) if context.dry_run else (SHAPES, STAGES)
    halves_or_whole = (True,) if context.dry_run else (False, True)
    found = []
    for rows, cols, warps in shapes:
        for n_stages in stages:
            found.append(("forward_tile", Tile(rows, cols, 64, warps, n_stages)))
            found += [
                ("backward_tile", Tile(rows, cols, 64, warps, n_stages, halves=halves)) for halves in halves_or_whole
            ]
    return found


def family(context: Context):
    import torch

    from gcl_kernels import backends
    from gcl_kernels.backends.triton.config import FAMILIES, family_of

    return FAMILIES["sm_90" if context.dry_run else family_of(backends.architecture(torch.device("cuda")))]


def screen(context: Context) -> None:
    """Compiles the whole space ahead of time, on every core."""
    from concurrent.futures import ProcessPoolExecutor

    space, chip = candidates(context), family(context)
    result: Result = {"family": chip.name, "candidates": []}
    jobs = [(chip.name, kernel, tile, context.sizes.screened_d) for kernel, tile in space]
    with ProcessPoolExecutor(2 if context.dry_run else os.cpu_count()) as pool:
        for (kernel, tile), report in zip(space, pool.map(compiled, jobs), strict=True):
            result["candidates"].append({"kernel": kernel, "tile": asdict(tile), **report})
            print(kernel, literal(tile), report, flush=True)
            context.save(result)


def compiled(job: tuple[str, str, Any, int]) -> Result:
    """What a candidate compiles to; ``complaints`` is why it is out."""
    from dataclasses import replace

    import torch

    from bench import aot
    from gcl_kernels.backends.triton.config import FAMILIES, everywhere

    family_name, kernel, tile, d = job
    chip = FAMILIES[family_name]
    descriptors = chip.config(torch.bfloat16, d, "ieee").descriptors
    case = aot.Case(replace(chip, half=everywhere(tile, descriptors)), kernel, torch.bfloat16, d)
    try:
        report = aot.inspect(case)
    except Exception as error:  # a candidate that the compiler refuses is out, and says why
        return {"complaints": [f"{type(error).__name__}: {str(error)[-300:]}"]}
    usage = {name: getattr(report, name) for name in ("registers", "stack", "spills", "shared")}
    return {**usage, "complaints": report.complaints()}


def tune(context: Context) -> None:
    """The fastest tile of each kernel at each D: all at one N; the best, in bands of other heights too, at a larger one."""
    from dataclasses import replace

    import torch

    from gcl_kernels.backends.triton.config import Tile

    chip, sizes = family(context), context.sizes
    fitting = [c for c in context.result_of("screen")["candidates"] if not c["complaints"]]
    result: Result = {"times": [], "chosen": {}}
    for d in sizes.dimensions:
        default = chip.config(torch.bfloat16, d, "ieee")
        chosen = {}
        for kernel in ("forward_tile", "backward_tile"):
            space = [Tile(**c["tile"]) for c in fitting if c["kernel"] == kernel]
            space = list(dict.fromkeys([default.tile(kernel == "backward_tile", masked=False), *space]))

            def times(tiles: Iterable[Tile], n: int, d=d, kernel=kernel, default=default) -> list[tuple[float, Tile]]:
                problem, rows = TileProblem.of(n, d, context.device, default), []
                for tile in tiles:
                    row = {
                        "kernel": kernel,
                        "n": n,
                        "d": d,
                        "tile": asdict(tile),
                        **problem.try_tile(kernel, tile, context),
                    }
                    result["times"].append(row)
                    context.save(result)
                    seconds = row.get("median_seconds")
                    print(kernel, n, d, literal(tile), row.get("reason", f"{1e3 * (seconds or 0):.3f} ms"), flush=True)
                    if seconds is not None:
                        rows.append((seconds, tile))
                return sorted(rows, key=lambda row: row[0])

            best = [tile for _, tile in times(space, sizes.first_n)[: sizes.finalists]]
            best += [replace(tile, group=group) for tile in best[:1] for group in GROUPS]
            ranked = times(best, sizes.last_n)
            if ranked:
                chosen[kernel] = asdict(ranked[0][1])
        result["chosen"][str(d)] = chosen
        context.save(result)
        (context.out / "tuning.txt").write_text(table(chip, result["chosen"]))
    result["whole_step"] = whole_step(context, chip, result["chosen"])
    context.save(result)


@dataclass
class TileProblem:
    """Inputs, and the default configuration's results, which every other must repeat."""

    inputs: tuple[Any, Any, Any]
    default: Any
    statistics: tuple[Any, Any, Any]

    @classmethod
    def of(cls, n: int, d: int, device: str, default) -> TileProblem:
        import torch

        from gcl_kernels.backends.triton import launch

        unit = torch.nn.functional.normalize
        x, y = (unit(torch.randn(n, d, device=device)).to(torch.bfloat16) for _ in range(2))
        inputs = x, y, torch.tensor(100 / 7, device=device)
        return cls(inputs, default, launch.forward(*inputs, None, None, None, True, True, default))

    def try_tile(self, kernel: str, tile, context: Context) -> Result:
        """Times, or the reason that there are none. The backward is asked for no product: what is left is its tile kernel."""
        import torch

        from gcl_kernels.backends.triton import launch
        from gcl_kernels.backends.triton.config import Config

        config = Config(tile, tile, tile, tile, self.default.descriptors)
        row, col, positive = self.statistics
        g = torch.full_like(row, 1 / len(row))

        def forward():
            return launch.forward(*self.inputs, None, None, None, True, True, config)

        def backward():
            upstream = g, g, -2 * g[:, None]
            return launch.backward(
                *self.inputs, None, None, None, row, col, positive, *upstream, False, False, False, config
            )

        try:
            if kernel == "forward_tile":
                off = max(float((a - b).abs().max()) for a, b in zip(forward(), self.statistics, strict=True))
                if not off < 1e-3:
                    return {"reason": f"its results are off by {off:.3g}"}
            seconds = timed(forward if kernel == "forward_tile" else backward, context)
        except Exception as error:  # out of resources, most likely: the next candidate may fit
            return {"reason": f"{type(error).__name__}: {str(error)[-300:]}"}
        return {"seconds": seconds, "median_seconds": median(seconds)}


def whole_step(context: Context, chip, chosen: Result) -> Result:
    """ClipLoss, forward and backward, with the table's configuration and with the tuned one."""
    from unittest import mock

    import torch

    from gcl_kernels import ClipLoss, backends
    from gcl_kernels.backends.triton import launch

    d = 768 if 768 in context.sizes.dimensions else context.sizes.dimensions[0]
    n = context.sizes.last_n
    default = chip.config(torch.bfloat16, d, "ieee")
    tuned = with_chosen(default, chosen[str(d)])
    x, y, scale = TileProblem.of(n, d, context.device, default).inputs
    inputs = [v.requires_grad_() for v in (x, y, scale)]
    result: Result = {"n": n, "d": d}
    with mock.patch.object(backends, "choose", return_value="triton"):
        for name, config in (("table", default), ("tuned", tuned)):
            with mock.patch.object(launch, "select", return_value=config):
                result[name] = timed(lambda: torch.autograd.grad(ClipLoss()(*inputs), inputs), context)
    print(f"whole step, N = {n:,}, D = {d}:", {k: f"{1e3 * median(result[k]):.2f} ms" for k in ("table", "tuned")})
    return result


def with_chosen(default, chosen: Result):
    from dataclasses import replace

    from gcl_kernels.backends.triton.config import Tile

    named = {"forward": chosen.get("forward_tile"), "backward": chosen.get("backward_tile")}
    return replace(default, **{name: Tile(**tile) for name, tile in named.items() if tile})


def table(chip, chosen: Result) -> str:
    """Text for ``FAMILIES`` in gcl_kernels/backends/triton/config.py: bands that got the same choice are one."""
    import torch

    bands: list[tuple[int, Any]] = []
    for d in sorted(map(int, chosen)):
        config = with_chosen(chip.config(torch.bfloat16, d, "ieee"), chosen[str(d)])
        if bands and bands[-1][1] == config:
            bands.pop()
        bands.append((d, config))
    lines = [f"# {chip.name}: measured by bench.gpu_session; every time is in its summary.json", "half=("]
    for position, (d, config) in enumerate(bands):
        largest = "math.inf" if position == len(bands) - 1 else str(d)
        tiles = ", ".join(
            literal(t) for t in (config.forward, config.backward, config.masked_forward, config.masked_backward)
        )
        keeping = f", {literal(config.keeping)}" if config.keeping else ""
        lines.append(f"    ({largest}, Config({tiles}, {config.descriptors}{keeping})),")
    return "\n".join([*lines, "),", ""])


def literal(tile) -> str:
    """The tile as it is written in the configuration table."""
    optional = [f"group={tile.group}"] * (tile.group != 8) + ["halves=True"] * tile.halves
    optional += ["one_exponential=False"] * (not tile.one_exponential)
    return f"Tile({', '.join([*map(str, (tile.rows, tile.cols, tile.d, tile.warps, tile.stages)), *optional])})"


def ncu(context: Context) -> None:
    tool = shutil.which("ncu")
    if tool is None:
        context.save({"reason": "ncu is not installed"})
        return
    command = [tool, "--csv", "--metrics", ",".join(NCU_METRICS), "--kernel-name", "regex:forward_tile|backward_tile"]
    step = [sys.executable, "-m", "bench.gpu_session", "--step", "one_pass", "--out", str(context.out)]
    step += ["--result", os.devnull, *["--dry-run"] * context.dry_run]
    returncode, output = shown([*command, "--launch-count", "2", *step])
    found = ncu_metrics(output)
    context.save({"metrics": found} if found else {"reason": f"exit {returncode}: {output.strip()[-500:]}"})


def ncu_metrics(output: str) -> Result:
    """{kernel: {metric: "value unit"}} of ncu's CSV, which begins after its messages."""
    start = output.find('"ID"')
    if start < 0:
        return {}
    found: Result = {}
    for row in csv.DictReader(io.StringIO(output[start:])):
        if row.get("Metric Name") and row.get("Kernel Name"):
            found.setdefault(row["Kernel Name"], {})[row["Metric Name"]] = (
                f"{row.get('Metric Value', '')} {row.get('Metric Unit', '')}".strip()
            )
    return found


def one_pass(context: Context) -> None:
    """For ncu: one forward and one backward."""
    import torch

    from gcl_kernels import ClipLoss

    n, d = (64, 32) if context.dry_run else (16_384, 768)
    unit = torch.nn.functional.normalize
    x, y = (unit(torch.randn(n, d, device=context.device)).to(torch.bfloat16).requires_grad_() for _ in range(2))
    ClipLoss()(x, y, torch.tensor(100 / 7, device=context.device)).backward()


# In the order in which they are worth having, with their limits in seconds.
STEPS: dict[str, tuple[Callable[[Context], None], int]] = {
    "machine": (machine, 40),
    "ceilings": (ceilings, 40),
    "tests": (tests, 110),
    "bench_65536": (bench_step("bench_65536"), 110),
    "bench_4096": (bench_step("bench_4096"), 40),
    "screen": (screen, 60),
    "tune": (tune, 120),
    "bench_1048576": (bench_step("bench_1048576"), 80),
    "ncu": (ncu, 40),
}
# Compiled ahead of time, or without our kernels.
NOT_INTERPRETED = ("machine", "screen", "bench_65536", "bench_4096", "bench_1048576")


# The queue.


def run_step(name: str, limit: float, out: Path, dry_run: bool) -> Result:
    """Runs a step in a process group of its own and returns its entry of the summary."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if dry_run:
        environment["OMP_NUM_THREADS"] = "1"
        if name not in NOT_INTERPRETED:
            environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        result_path, output_path = Path(scratch) / "result.json", Path(scratch) / "output.txt"
        command = [
            sys.executable,
            "-m",
            "bench.gpu_session",
            "--step",
            name,
            "--out",
            str(out),
            "--result",
            str(result_path),
        ]
        start = time.monotonic()
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                [*command, *["--dry-run"] * dry_run],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                process.wait(limit)
                status = "ok" if process.returncode == 0 else f"failed: exit {process.returncode}"
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit:.0f} s"
            finally:
                stop(process)
        seconds = time.monotonic() - start
        text = output_path.read_bytes()[-(2**20) :].decode(errors="replace")
        with (out / "log.txt").open("a") as log:
            log.write(f"\n=== {name}: {status}, {seconds:.1f} s\n{text}\n")
        result = read_json(result_path)
    if status != "ok":
        print(text[-2000:])
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"status": status, "seconds": round(seconds, 1), "date": date, "result": result}


def stop(process: subprocess.Popen) -> None:
    """The process and what it started: its group is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def session(out: Path, dry_run: bool, limit: float) -> Result:
    """Runs what has no result yet, in the time there is; the summary is on disk after each step."""
    out.mkdir(parents=True, exist_ok=True)
    summary = read_json(out / "summary.json") or {"dry_run": dry_run, "steps": {}}
    if summary["dry_run"] != dry_run:
        raise ValueError(f"--out: expected a folder of {'dry' if dry_run else 'real'} runs, got the other kind, {out}")
    end = time.monotonic() + limit
    for name, (_, step_limit) in STEPS.items():
        if dry_run and name.startswith("bench_") and name not in TOY.bench:
            continue  # the same code at another size
        known = summary["steps"].get(name)
        if known and known["result"] and not known["status"].startswith("failed"):
            print(f"{name}: has a result")
            continue
        left = end - time.monotonic()
        if left < 5:
            print(f"{name}: no time left")
            continue
        summary["steps"][name] = run_step(name, min(step_limit, left), out, dry_run)
        print(f"{name}: {summary['steps'][name]['status']}, {summary['steps'][name]['seconds']} s", flush=True)
        summary["targets"] = targets(summary["steps"], out)
        write_json(out / "summary.json", summary)
    return summary


# Targets.


def targets(steps: Result, out: Path) -> list[Result]:
    """Each target with what was measured; ``met`` is None where it was not."""

    def result(step: str) -> Result:
        return steps.get(step, {}).get("result") or {}

    large, small, huge = (bench_rows(out / f"{name}.json") for name in REAL.bench)
    rate = result("ceilings").get("gemm", {}).get("tflops")
    found: list[Result] = []

    def add(name: str, value: float | None, goal: float, below: bool = False) -> None:
        met = None if value is None else value <= goal if below else value >= goal
        found.append({"target": name, "measured": value, "goal": goal, "met": met})

    ours = large.get("ours", {})
    flops = 8 * 65_536**2 * 768
    seconds = ours.get("seconds")
    add("N=65,536: part of cuBLAS bf16", flops / seconds / 1e12 / rate if seconds and rate else None, FRACTION_OF_GEMM)
    add("N=65,536: over the fastest peer", over_fastest(large), SPEEDUP)
    inf_cl = next((row["seconds"] for peer, row in large.items() if peer.replace("-", "_").startswith("inf_cl")), None)
    add("N=65,536: over inf-cl", inf_cl / seconds if inf_cl and seconds else None, SPEEDUP_OVER_INF_CL)
    add("N=65,536: extra memory, MiB", ours.get("extra_mib"), EXTRA_MIB, below=True)
    add("N=4,096: over the fastest peer", over_fastest(small), 1.0)
    add("N=1,048,576, D=512 runs: seconds", huge.get("ours", {}).get("seconds"), float("inf"), below=True)
    fields = result("ceilings").get("aggregate_fields", {})
    add("aggregate_fields, forward: part of copy", fields.get("forward_of_copy"), FRACTION_OF_COPY)
    add("aggregate_fields, both: part of copy", fields.get("forward_and_backward_of_copy"), FRACTION_OF_COPY)
    return found


def over_fastest(rows: dict[str, Result]) -> float | None:
    peers = [row["seconds"] for name, row in rows.items() if name != "ours" and row.get("seconds")]
    ours = rows.get("ours", {}).get("seconds")
    return min(peers) / ours if peers and ours else None


def bench_rows(path: Path) -> dict[str, Result]:
    """{peer: {"seconds": median of forward and backward, "extra_mib"}} of a result file of ``python -m bench``."""
    rows: dict[str, Result] = {}
    for cell in read_json(path).get("cells", []):
        if cell.get("seconds") and cell["passes"] == "both":
            rows[cell["peer"]] = {"seconds": median(cell["seconds"]), "extra_mib": cell.get("extra_mib")}
    return rows


def targets_table(found: Iterable[Result]) -> str:
    lines = [f"{'target':44}{'measured':>12}{'goal':>10}"]
    for row in found:
        value = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
        goal = "" if row["goal"] == float("inf") else f"{row['goal']:.3g}"
        lines.append(f"{row['target']:44}{value:>12}{goal:>10}  {verdict}")
    return "\n".join(lines)


def median(values: Sequence[float]) -> float:
    import statistics

    return statistics.median(values)


def read_json(path: Path) -> Result:
    """What is there; nothing where nothing is, or where a process was stopped while it wrote."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def write_json(path: Path, value: Result) -> None:
    if path == Path(os.devnull):
        return
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)  # never half a file


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
            raise SystemExit("bench.gpu_session: expected a CUDA or HIP device, got none; --dry-run needs none")
    summary = session(options.out, options.dry_run, options.limit)
    print(
        f"\n{'Dry run: figures mean nothing.' if options.dry_run else 'Targets'}\n{targets_table(summary.get('targets', []))}"
    )
    return any(step["status"] != "ok" for step in summary["steps"].values())


if __name__ == "__main__":
    sys.exit(main())
