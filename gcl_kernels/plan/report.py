"""A model of what a batch will need, before it is run: memory and time of our loss and of dense logits.

    python -m gcl_kernels.plan --batch 262144 --dim 768 --dtype bf16 --device h200 --world-size 8

Two-direction loss, forward and backward, default labels, no ids. Memory follows what each step keeps alive; on a CPU it is tested
against measurements. Time is the sum over phases of the slowest of matrix products, exponentials, memory traffic and host work
(all of them overlapped), and beside it the sum of all four (nothing overlapped). Rates are the `chips` table's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..backends import workspace_bytes
from ..chips import CHIPS, DTYPES, Chip, this_cpu
from .cpu import on_cpu
from .dense import dense
from .gpu import on_gpu
from .model import LABEL, Prediction, Sizes


def ours(p: Sizes, chip: Chip) -> Prediction:
    """This library's loss by the backend that a tensor on the chip gets."""
    return on_cpu(p, chip) if chip.family is None else on_gpu(p, chip)


def largest_batch(predict: Callable[[Sizes, Chip], Prediction], p: Sizes, chip: Chip, memory: float) -> int:
    """Largest batch over all ranks, a multiple of 256 a rank, whose inputs, gradients and extra memory fit; 0 if none."""

    def fits(blocks: int) -> bool:
        q = Sizes.of_batch(256 * blocks * p.world_size, p.d, p.dtype, p.world_size)
        return q.inputs_and_gradients + predict(q, chip).extra_memory <= memory

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return 256 * low * p.world_size


def amount(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.0f} s" if seconds >= 1000 else f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms"


def report(p: Sizes, chip: Chip, memory: float) -> str:
    lines = [
        f"{LABEL}: rates are {'measured just now' if chip.family is None else 'from data sheets'}, of which "
        f"{chip.reach.gemm:.0%} in products and {chip.reach.bandwidth:.0%} in memory traffic are assumed.",
        f"{chip.name}, batch {p.m:,} x {p.d}, {p.dtype}, "
        f"{p.world_size} rank(s) of {p.n:,} rows; forward and backward of both directions, for each rank.",
        f"Inputs and gradients: {amount(p.inputs_and_gradients)}. Workspace budget {amount(workspace_bytes())}. "
        f"Memory for the loss: {amount(memory)}.",
        "",
        f"{'':28}{'extra memory':>14}{'time, overlapped':>18}{'not overlapped':>16}{'largest batch':>15}",
    ]
    for predict in (ours, dense):
        of_this = predict(p, chip)
        fits = p.inputs_and_gradients + of_this.extra_memory <= memory
        lines.append(
            f"{of_this.name:28}{amount(of_this.extra_memory):>14}"
            f"{duration(of_this.overlapped(chip)) if fits else 'does not fit':>18}"
            f"{duration(of_this.serial(chip)) if fits else '':>16}{largest_batch(predict, p, chip, memory):>15,}"
        )
    lines += ["", f"Ours: {ours(p, chip).remark}."]
    if p.world_size > 1 and chip.link is None:
        lines.append("The exchange between ranks is not in these times.")
    return "\n".join(lines)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive_int, required=True, help="rows over all ranks")
    parser.add_argument("--dim", type=positive_int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="tf32: float32 at matmul precision 'medium'")
    parser.add_argument("--device", choices=("cpu", *CHIPS), required=True)
    parser.add_argument("--world-size", type=positive_int, default=1, help="ranks that share the batch's rows")
    parser.add_argument(
        "--memory", type=float, help="GiB that inputs, gradients and loss may take; default: the whole device"
    )
    parser.add_argument("--gemm-fraction", type=float, help="part of the published product rate that is expected")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    chip = this_cpu() if options.device == "cpu" else CHIPS[options.device]
    if options.gemm_fraction is not None:
        chip = replace(chip, reach=replace(chip.reach, gemm=options.gemm_fraction))
    memory = chip.memory if options.memory is None else options.memory * 2**30
    if math.isinf(memory):
        raise SystemExit("--memory: expected a number of GiB, as this system does not tell how much memory it has")
    print(report(Sizes.of_batch(options.batch, options.dim, options.dtype, options.world_size), chip, memory))
