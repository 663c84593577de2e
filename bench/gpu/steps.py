"""The steps of a GPU session. Each runs in a process of its own and saves its result."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from bench.gpu import cells
from bench.gpu.cells import shown
from bench.gpu.context import Context, Result, median, timed
from bench.gpu.tuning import screen, tune

# Where tests for a GPU are: the others may not even import where the training system's packages are absent.
GPU_TESTS = ("tests/test_gpu.py", "tests/triton")

# One test of those that a GPU runs, in the interpreter: it uses fields, masks, weights and ids, forward and backward.
TEST_OF_DRY_RUNS = "tests/test_gpu.py::test_same_inputs_same_bits"

NCU_METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.sum.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__inst_executed.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram__bytes.sum",
    "lts__t_sector_hit_rate.pct",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "launch__registers_per_thread",
    "launch__occupancy_limit_shared_mem",
    "launch__occupancy_limit_registers",
)


def machine(context: Context) -> None:
    import torch

    from bench.gpu.predictions import predicted
    from gcl_kernels import env
    from gcl_kernels.chips import CHIPS

    name = "a CPU" if context.dry_run else torch.cuda.get_device_name()
    # The last chip whose name is in the device's; a card that is not in the table is compared with an H100.
    chip = next((c for k, c in reversed(CHIPS.items()) if k.upper() in name.upper()), CHIPS["h100"])
    context.save(
        {
            "gpu": name,
            "nvidia_smi": nvidia_smi(),
            "environment": list(env.report()),
            "predictions": predicted(chip),
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
    wide = a.float()
    gemm32 = timed(lambda: wide @ wide, context)
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
            "gemm_fp32": {"n": k, "dtype": "fp32", "seconds": gemm32, "tflops": 2 * k**3 / median(gemm32) / 1e12},
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


def sanity(context: Context) -> None:
    """Each loss twice, beside float64: what is wrong, or compiles for long, shows before anything is timed."""
    import torch

    from gcl_kernels import ClipLoss, SigLipLoss, gcl_loss
    from gcl_kernels.testing import relative_error

    n, d = context.sizes.sanity
    unit = torch.nn.functional.normalize
    result: Result = {"n": n, "d": d, "losses": {}}
    ids = torch.arange(n, device=context.device) // 3
    losses = {
        "ClipLoss": lambda x, y, s: ClipLoss()(x, y, s),
        "SigLipLoss": lambda x, y, s: SigLipLoss()(x, y, s, -10.0),
        "gcl_loss, one direction": lambda x, y, s: gcl_loss(x, y, s, directions="lhs_to_rhs"),
        "gcl_loss, ids": lambda x, y, s: gcl_loss(x, y, s, lhs_ids=ids, rhs_ids=ids),
        "gcl_loss, 2 fields": lambda x, y, s: gcl_loss(x, {"a": y, "b": y.flip(0)}, s),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, y = (unit(torch.randn(n, d, device=context.device)).to(dtype) for _ in range(2))
        scale = torch.tensor(10.0, device=context.device)
        for name, loss in losses.items():
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            try:
                exact = gradients_of(loss, [v.double() for v in (x, y, scale)])
                first, found = timed_once(lambda loss=loss, x=x, y=y, scale=scale: gradients_of(loss, [x, y, scale]))
                second, _ = timed_once(lambda loss=loss, x=x, y=y, scale=scale: gradients_of(loss, [x, y, scale]))
                errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
                row = {"first_seconds": first, "second_seconds": second, "errors": errors}
            except Exception as error:  # the next loss may run
                row = {"reason": f"{type(error).__name__}: {str(error)[-300:]}"}
            result["losses"][key] = row
            print(key, row, flush=True)
            context.save(result)


def gradients_of(loss, inputs) -> list:
    """[loss, gradients]."""
    import torch

    leaves = [v.detach().clone().requires_grad_() for v in inputs]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def timed_once(work: Callable[[], list]) -> tuple[float, list]:
    """Seconds of one call, waited for, and what it returns."""
    start = time.perf_counter()
    found = work()
    float(found[0])
    return time.perf_counter() - start, found


def chunks(context: Context) -> None:
    """The backward's two products at several heights of G: cuBLAS's tiles fill the chip in whole waves at some only."""
    import torch

    from gcl_kernels.backends.chunks import chunk_of_gradient
    from gcl_kernels.backends.triton.config import FAMILIES

    n = context.sizes.chunk_n
    result: Result = {"n": n, "dtype": "bf16", "products": []}
    for d in context.sizes.dimensions:
        tile = FAMILIES["sm_90"].config(torch.bfloat16, d, "ieee").backward
        usual = chunk_of_gradient(n, n, tile.sides, 2)
        for rows in dict.fromkeys((usual[0], *context.sizes.chunk_rows)):
            cols = usual[1]
            g = torch.randn(rows, cols, device=context.device).to(torch.bfloat16)
            lhs, rhs = (torch.randn(k, d, device=context.device).to(torch.bfloat16) for k in (rows, cols))
            row: Result = {"rows": rows, "cols": cols, "d": d, "usual": rows == usual[0]}
            for name, work in (
                ("G @ rhs", lambda g=g, rhs=rhs: g @ rhs),
                ("G^T @ lhs", lambda g=g, lhs=lhs: g.T @ lhs),
            ):
                seconds = timed(work, context, 20, graph=True)
                row[name] = {"seconds": seconds, "tflops": 2 * rows * cols * d / median(seconds) / 1e12}
            result["products"].append(row)
            print(
                rows, cols, d, *(f"{name}: {row[name]['tflops']:.0f}" for name in ("G @ rhs", "G^T @ lhs")), flush=True
            )
            context.save(result)


def tests(context: Context) -> None:
    where = [TEST_OF_DRY_RUNS] if context.dry_run else GPU_TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *where, "--no-header"]
    command += ["-p", "bench.gpu.interpreter"] * context.dry_run
    returncode, output = shown(command)
    context.save(
        {"exit": returncode, "last_line": (output.strip().splitlines() or [""])[-1], "passed": returncode == 0}
    )
    if returncode:
        sys.exit(returncode)


def ncu(context: Context) -> None:
    tool = shutil.which("ncu")
    if tool is None:
        context.save({"reason": "ncu is not installed"})
        return
    command = [tool, "--csv", "--metrics", ",".join(NCU_METRICS), "--kernel-name", "regex:forward_tile|backward_tile"]
    command += ["--target-processes", "all"]
    step = [sys.executable, "-m", "bench.gpu", "--step", "one_pass", "--out", str(context.out)]
    step += ["--result", os.devnull, *["--dry-run"] * context.dry_run]
    returncode, output = shown([*command, "--launch-count", "3", *step])
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
            value = f"{row.get('Metric Value', '')} {row.get('Metric Unit', '')}".strip()
            name = row["Kernel Name"]
            if row["Metric Name"] in found.get(name, {}):
                name += ", sigmoid"  # the second launch of the forward's tiles
            found.setdefault(name, {})[row["Metric Name"]] = value
    return found


def one_pass(context: Context) -> None:
    """For ncu: one forward and one backward, and a sigmoid loss."""
    import torch

    from gcl_kernels import ClipLoss, SigLipLoss

    n, d = (64, 32) if context.dry_run else (16_384, 768)
    unit = torch.nn.functional.normalize
    x, y = (unit(torch.randn(n, d, device=context.device)).to(torch.bfloat16).requires_grad_() for _ in range(2))
    ClipLoss()(x, y, torch.tensor(100 / 7, device=context.device)).backward()
    SigLipLoss()(x, y, 10.0, -10.0).backward()


# In the order in which they are worth having, with their limits in seconds: the first call of nine minutes holds those up to the
# curves, the second the rest.
STEPS: dict[str, tuple[Callable[[Context], None], int]] = {
    "machine": (machine, 40),
    "sanity": (sanity, 60),
    "tests": (tests, 110),
    "ceilings": (ceilings, 40),
    "gates": (cells.step("gates"), 110),
    "screen": (screen, 60),
    "tune": (tune, 120),
    "curves": (cells.step("curves"), 200),
    "peers": (cells.step("peers"), 180),
    "chunks": (chunks, 40),
    "ncu": (ncu, 60),
    "large": (cells.step("large"), 200),
}
# Compiled ahead of time, or without our kernels in a dry run.
NOT_INTERPRETED = ("machine", "screen", *cells.CALLS)
