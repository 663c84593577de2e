"""A model of the time, from data sheets and counts: `python -m bench.roofline --n 65536 --d 768 --dtype bf16 --chip h200`.

The floor of each phase of our plan, matrix products (GEMM), exponentials, what else of a tile's epilogue no product runs beside,
device memory (HBM) and host work (launches), and what a step should take: overlapped (each phase as long as its slowest part,
such an epilogue being part of its products) and serial (the sum of all parts). Beside it the same of
each peer, whose operations were counted in its sources. Forward and backward of both directions.

Ours is modelled in `gcl_kernels.plan`, from the chunks and tiles that the backend really takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gcl_kernels.backends.chunks import chunk_of_gradient
from gcl_kernels.chips import CHIPS, DTYPES, TRITON_LAUNCH, Chip
from gcl_kernels.plan import (
    LABEL,
    Phase,
    Prediction,
    Sizes,
    amount,
    dense,
    duration,
    ours,
)
from gcl_kernels.plan.dense import DENSE_OPERATORS
from gcl_kernels.plan.gpu import launch_config
from gcl_kernels.plan.report import positive_int

# Rows of logits that peers hold at a time, by their own rules.
LINEAR_CROSS_ENTROPY_ROWS = 1024


def compiled_dense(p: Sizes, chip: Chip) -> Prediction:
    """`open_clip.ClipLoss` under torch.compile: products as before; log-softmax and loss in one pass that keeps the logits,
    their gradient in another."""
    copy, product = p.logits * p.s, 2 * p.logits * p.d
    phases = []
    for direction in ("images", "texts"):
        phases += [
            Phase(f"logits of {direction}", p.dtype, product, bytes=copy),
            Phase("loss", exponentials=p.logits, bytes=copy, host=TRITON_LAUNCH),
            Phase("their gradient", exponentials=p.logits, bytes=2 * copy, host=TRITON_LAUNCH),
            Phase("products with it", p.dtype, 2 * product, bytes=2 * copy, host=2 * chip.launch),
        ]
    phases.append(Phase("the rest", host=DENSE_OPERATORS / 2 * chip.launch))
    return Prediction("open_clip, compiled", tuple(phases), 4 * copy)


def chunked_head(name: str, p: Sizes, chip: Chip, rows: int, remark: str) -> Prediction:
    """A fused linear cross-entropy that forms gradients in its forward, chunk of rows by chunk of rows, once a direction: 6 N M D
    each. A chunk's logits are written, read for the loss, read and overwritten by their gradient, read by two products; the
    weights' gradient is read and written once a chunk."""
    copy, product = p.logits * p.s, 2 * p.logits * p.d
    chunks = -(-p.n // rows)
    accumulators = 2 * chunks * p.m * p.d * p.s
    phases = []
    for _ in range(2):
        phases += [
            Phase("logits", p.dtype, product, bytes=copy + chunks * p.m * p.d * p.s, host=chunks * chip.launch),
            Phase("loss and gradient", exponentials=2 * p.logits, bytes=3 * copy, host=chunks * TRITON_LAUNCH),
            Phase("products", p.dtype, 2 * product, bytes=2 * copy + accumulators, host=4 * chunks * chip.launch),
        ]
    phases.append(Phase("the rest", host=DENSE_OPERATORS / 2 * chip.launch))
    chunk = 2.0 * rows * p.m * p.s
    return Prediction(name, tuple(phases), chunk + 2.0 * (p.n + p.m) * p.d * p.s, remark)


def linear_cross_entropy(p: Sizes, chip: Chip) -> Prediction:
    remark = f"chunks of {LINEAR_CROSS_ENTROPY_ROWS:,} rows assumed"
    return chunked_head("F.linear_cross_entropy x2", p, chip, min(LINEAR_CROSS_ENTROPY_ROWS, p.n), remark)


def liger(p: Sizes, chip: Chip) -> Prediction:
    """Its chunk: the next power of two above N / ceil(M / D)."""
    rows = 1 << (-(-p.n // -(-p.m // p.d)) - 1).bit_length()
    return chunked_head("Liger x2", p, chip, min(rows, p.n), f"chunks of {min(rows, p.n):,} rows")


def cut_cross_entropy(p: Sizes, chip: Chip) -> Prediction:
    """Forward 2, backward 2 + 4, in one kernel each, once a direction. The backward adds each 128 x 128 tile's products to both
    gradients in memory, under locks; its filter of small gradients, which drops some of that, is not modelled."""
    product, tile = 2 * p.logits * p.d, 128
    tiles_of_operands = 2.0 * p.logits * p.d * p.s / tile / 8  # eight neighbours share them in the L2 cache
    phases = []
    for _ in range(2):
        phases += [
            Phase("forward", p.dtype, product, p.logits, tiles_of_operands, 2 * TRITON_LAUNCH),
            Phase("backward", p.dtype, 3 * product, p.logits, 2 * 2.0 * p.logits * p.d * p.s / tile, 2 * TRITON_LAUNCH),
        ]
    phases.append(Phase("the rest", host=DENSE_OPERATORS * chip.launch))
    return Prediction(
        "cut-cross-entropy x2", tuple(phases), float(p.n + p.m) * (p.d * p.s + 16), "accumulators through memory"
    )


def inf_cl(p: Sizes, chip: Chip) -> Prediction:
    """Forward 2, and 4 for each of two backward kernels, once a direction, all in tf32. The backward loads, adds and stores a
    float32 block of gradient rows for every tile; tiles of 32 columns are assumed."""
    product, tile_cols = 2 * p.logits * p.d, 32
    kind = "tf32" if p.dtype != "fp32" else p.dtype
    phases = []
    for _ in range(2):
        phases += [
            Phase("forward", kind, product, p.logits, host=2 * TRITON_LAUNCH),
            Phase("backward", kind, 4 * product, 2 * p.logits, 8.0 * p.logits * p.d / tile_cols, 2 * TRITON_LAUNCH),
        ]
    phases.append(Phase("the rest", host=DENSE_OPERATORS * chip.launch))
    return Prediction("inf-cl x2", tuple(phases), 4.0 * (p.n + p.m) * (p.d + 4), "gradients through memory, tf32")


def memeff(p: Sizes, chip: Chip) -> Prediction:
    """Forward 2, and 4 for each of two backward passes, shaped as attention's, which keep a block of gradient rows: 10 N M D."""
    product = 2 * p.logits * p.d
    phases = (
        Phase("forward", p.dtype, product, p.logits, host=2 * TRITON_LAUNCH),
        Phase("backward", p.dtype, 4 * product, 2 * p.logits, host=2 * TRITON_LAUNCH),
        Phase("the rest", host=DENSE_OPERATORS / 2 * chip.launch),
    )
    return Prediction("memeff", phases, 4.0 * (p.n + p.m) * (p.d + 4), "no atomics up to D = 1,024")


def sigmoid_ours(p: Sizes, chip: Chip) -> Prediction:
    """Tiles that store their sigmoids, and two products with them, in chunks: 6 N M D."""
    rows, cols = chunk_of_gradient(p.n, p.m, launch_config(p, chip).forward.sides, p.s)
    chunks, copy, product = -(-p.n // rows) * -(-p.m // cols), p.logits * p.s, 2 * p.logits * p.d
    accumulators = 8.0 * p.d * (p.n * -(-p.m // cols) + p.m * -(-p.n // rows))
    phases = (
        Phase("sigmoid tiles", p.dtype, product, p.logits, copy, chunks * TRITON_LAUNCH),
        Phase("products", p.dtype, 2 * product, bytes=2 * copy + accumulators, host=2 * chunks * chip.launch),
        Phase("the rest", host=(DENSE_OPERATORS + 3 * chunks) * chip.launch),
    )
    memory = float(rows) * cols * p.s + 4.0 * (p.n + p.m) * p.d
    return Prediction("ours, sigmoid", phases, memory, f"G in {chunks:,} of {rows:,} x {cols:,}")


def sigmoid_dense(p: Sizes, chip: Chip) -> Prediction:
    """`open_clip.SigLipLoss`: logits, labels, their product, log-sigmoid and its gradient, each a pass; 6 N M D."""
    copy, product = p.logits * p.s, 2 * p.logits * p.d
    phases = (
        Phase("logits", p.dtype, product, bytes=3 * copy, host=2 * chip.launch),
        Phase("loss", exponentials=2 * p.logits, bytes=6 * copy, host=8 * chip.launch),
        Phase("its gradient", exponentials=p.logits, bytes=6 * copy, host=8 * chip.launch),
        Phase("products", p.dtype, 2 * product, bytes=2 * copy, host=2 * chip.launch),
    )
    return Prediction("open_clip, sigmoid", phases, 5 * copy)


def sigmoid_siglip_kernel(p: Sizes, chip: Chip) -> Prediction:
    """Chunks of 4,096 rows: a product, one pass in place, two products, gradients formed in the forward; 6 N M D."""
    rows = min(4096, p.n)
    chunks, copy, product = -(-p.n // rows), p.logits * p.s, 2 * p.logits * p.d
    phases = (
        Phase("logits", p.dtype, product, bytes=copy, host=chunks * chip.launch),
        Phase("loss and gradient", exponentials=2 * p.logits, bytes=2 * copy, host=chunks * TRITON_LAUNCH),
        Phase("products", p.dtype, 2 * product, bytes=2 * copy, host=2 * chunks * chip.launch),
        Phase("the rest", host=DENSE_OPERATORS / 2 * chip.launch),
    )
    memory = float(rows) * p.m * p.s + (p.n + p.m) * p.d * p.s
    return Prediction("siglip-kernel", phases, memory, f"chunks of {rows:,} rows")


SIGMOID_PLANS: dict[str, Callable[[Sizes, Chip], Prediction]] = {
    "ours": sigmoid_ours,
    "open_clip": sigmoid_dense,
    "siglip_kernel": sigmoid_siglip_kernel,
}
PLANS: dict[str, Callable[[Sizes, Chip], Prediction]] = {
    "ours": ours,
    "open_clip": dense,
    "open_clip_compiled": compiled_dense,
    "linear_cross_entropy": linear_cross_entropy,
    "cut_cross_entropy": cut_cross_entropy,
    "liger": liger,
    "inf_cl": inf_cl,
    "memeff": memeff,
}


def floor(p: Sizes, chip: Chip) -> float:
    """Seconds of the matrix products alone that no exact plan without N x M memory avoids: 8 N M D, 6 for one direction."""
    return (8 if p.directions == 2 else 6) * p.logits * p.d / (chip.rate(p.dtype) * chip.reach.gemm)


def predictions(p: Sizes, chip: Chip, loss: str = "softmax") -> dict[str, Any]:
    """What `report` prints, for a file; device and host apart, and ours by its phases, in ms of each kind of work."""
    plans = {name: plan(p, chip) for name, plan in (PLANS if loss == "softmax" else SIGMOID_PLANS).items()}
    least = floor(p, chip) * (1 if loss == "softmax" else 0.75)
    return {
        "model": LABEL,
        "chip": chip.name,
        "n": p.n,
        "m": p.m,
        "d": p.d,
        "dtype": p.dtype,
        "loss": loss,
        "gemm_fraction": chip.reach.gemm,
        "floor_ms": 1e3 * least,
        "plans": {
            name: {
                "flops_over_nmd": plan.flops / (p.logits * p.d),
                "overlapped_ms": 1e3 * plan.overlapped(chip),
                "serial_ms": 1e3 * plan.serial(chip),
                "host_ms": 1e3 * plan.totals(chip)["host"],
                "device_ms": 1e3 * device_seconds(plan, chip),
                "extra_memory_mib": plan.extra_memory / 2**20,
            }
            for name, plan in plans.items()
        },
        "phases_ms": {
            phase.name: {kind: 1e3 * seconds for kind, seconds in phase.parts(chip).items() if seconds}
            for phase in plans["ours"].phases
        },
    }


def device_seconds(plan: Prediction, chip: Chip) -> float:
    """Overlapped, without the host: what a CUDA graph of the step should take."""
    return sum(max(v for kind, v in phase.parts(chip).items() if kind != "host") for phase in plan.phases)


def report(p: Sizes, chip: Chip) -> str:
    mine = ours(p, chip)
    kinds = ("GEMM", "exp", "epilogue", "HBM", "host")
    lines = [
        f"{LABEL}: {chip.name} by its data sheet, {chip.reach.gemm:.0%} of its products' and {chip.reach.bandwidth:.0%} of its "
        "memory's rate assumed.",
        f"N = {p.n:,}, M = {p.m:,}, D = {p.d}, {p.dtype}; forward and backward of both directions. "
        f"Floor: 8 N M D at {chip.rate(p.dtype) * chip.reach.gemm / 1e12:.0f} TFLOP/s = {duration(floor(p, chip))}.",
        "",
        f"{mine.name}: {mine.remark}",
        f"{'':20}" + "".join(f"{kind:>11}" for kind in kinds),
    ]
    for phase in mine.phases:
        parts = phase.parts(chip)
        if any(parts.values()):
            lines.append(f"{phase.name:20}" + "".join(f"{duration(parts[k]) if parts[k] else '':>11}" for k in kinds))
    totals = mine.totals(chip)
    lines += [f"{'sum':20}" + "".join(f"{duration(totals[k]):>11}" for k in kinds), ""]
    lines.append(f"{'plan':28}{'x N M D':>8}{'overlapped':>12}{'serial':>11}{'over ours':>11}{'extra memory':>14}")
    for plan in (make(p, chip) for make in PLANS.values()):
        seconds, factor = plan.overlapped(chip), plan.overlapped(chip) / mine.overlapped(chip)
        lines.append(
            f"{plan.name:28}{plan.flops / (p.logits * p.d):>8.1f}{duration(seconds):>12}{duration(plan.serial(chip)):>11}"
            f"{factor:>10.1f}x{amount(plan.extra_memory):>14}  {plan.remark if plan is not mine else ''}"
        )
    lines += [
        "",
        f"({LABEL.lower()}: peers' counts are read from their sources, their kernels are granted our efficiency.)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=positive_int, default=65_536)
    parser.add_argument("--m", type=positive_int, help="default: N")
    parser.add_argument("--d", type=positive_int, default=768)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="tf32: float32 at matmul precision 'medium'")
    parser.add_argument("--chip", choices=CHIPS, default="h200")
    parser.add_argument("--gemm-fraction", type=float, help="part of the published product rate that is expected")
    options = parser.parse_args()
    chip = CHIPS[options.chip]
    if options.gemm_fraction is not None:
        chip = replace(chip, reach=replace(chip.reach, gemm=options.gemm_fraction))
    print(report(Sizes(options.n, options.m or options.n, options.d, options.dtype), chip))


if __name__ == "__main__":
    main()
