"""The steps of a GPU session. Each runs in a process of its own and saves its result."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

from bench.gpu.context import REAL, Context, Result, median, timed
from bench.gpu.tuning import screen, tune

# `python -m bench` without what a GPU does not do or does in no time: the products that give a CPU's rate take ten seconds of
# a dry run, the fresh process in which a CPU's memory is measured takes three.
FOR_DRY_RUNS = (
    "from bench import __main__, measure; "
    "measure.gemm = lambda case: lambda: 1e-9; measure.cpu_extra_mib = lambda case, peer: None; __main__.main()"
)

# One test of those that a GPU runs, in the interpreter: it uses fields, masks, weights and ids, forward and backward.
TEST_OF_DRY_RUNS = "tests/test_gpu.py::test_same_inputs_same_bits"

# Rows from which ours is measured alone: dense logits do not fit, the float64 oracle and the other peers take minutes.
ALONE_ABOVE = 2**18

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


def machine(context: Context) -> None:
    import torch

    from bench import roofline
    from gcl_kernels import env
    from gcl_kernels.chips import CHIPS
    from gcl_kernels.plan import Sizes

    name = "a CPU" if context.dry_run else torch.cuda.get_device_name()
    # The last chip whose name is in the device's; a card that is not in the table is compared with an H100.
    chip = next((c for k, c in reversed(CHIPS.items()) if k.upper() in name.upper()), CHIPS["h100"])
    cases = [Sizes(n, n, d, "bf16") for n, d in REAL.bench.values()]
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


def tests(context: Context) -> None:
    where = TEST_OF_DRY_RUNS if context.dry_run else "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", where, "--no-header"]
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
        run = ["-c", FOR_DRY_RUNS] if context.dry_run else ["-m", "bench"]
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


def ncu(context: Context) -> None:
    tool = shutil.which("ncu")
    if tool is None:
        context.save({"reason": "ncu is not installed"})
        return
    command = [tool, "--csv", "--metrics", ",".join(NCU_METRICS), "--kernel-name", "regex:forward_tile|backward_tile"]
    step = [sys.executable, "-m", "bench.gpu", "--step", "one_pass", "--out", str(context.out)]
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
