"""A model of what a batch will need, before it is run: memory and time of our loss and of dense logits.

    python -m gcl_kernels.plan --batch 262144 --dim 768 --dtype bf16 --device h200 --world-size 8

Two-direction loss, forward and backward, default labels, no ids. Memory follows what each step keeps alive; on a CPU it is tested
against measurements. Time is the sum over phases of the slowest of matrix products, exponentials, memory traffic and host work
(all of them overlapped), and beside it the sum of all four (nothing overlapped). Rates are the ``chips`` table's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from . import backends
from .backends import torch_chunked
from .chips import CHIPS, DTYPES, ITEMSIZE, TRITON_LAUNCH, Chip, this_cpu

LABEL = "A model, not a measurement"

# Eager operators of one step around its kernels and products: ClipLoss and autograd, the vectors of the forward, those of the
# backward, and what is repeated for each chunk of rows and each tile of G.
LOSS_OPERATORS, FORWARD_OPERATORS, BACKWARD_OPERATORS = 36, 23, 83
OPERATORS_A_CHUNK, OPERATORS_A_TILE = 7, 2
DENSE_OPERATORS = 40
TORCH_OPERATORS_A_TILE = 25

# Statistics, upstream gradients, positives and their temporaries, most of them float64, at the peak of a step.
VECTOR_BYTES_A_LINE = {"triton": 140, "torch": 42}


@dataclass(frozen=True)
class Phase:
    """A stretch of one kind of work; what is not given is negligible."""

    name: str
    dtype: str = "fp32"  # of its products
    flops: float = 0.0
    exponentials: float = 0.0
    bytes: float = 0.0  # to and from device memory
    host: float = 0.0  # seconds of Python and launches
    link: float = 0.0  # bytes to and from other devices, one way

    def parts(self, chip: Chip) -> dict[str, float]:
        """Seconds of each kind of work at the part of the chip's ceilings that is expected."""
        return {
            "GEMM": self.flops / (chip.rate(self.dtype) * chip.reach.gemm),
            "exp": self.exponentials / (chip.units * chip.clock * chip.exponentials),
            "HBM": self.bytes / (chip.bandwidth * chip.reach.bandwidth),
            "link": self.link / (chip.link * chip.reach.link) if chip.link else 0.0,
            "host": self.host,
        }


@dataclass(frozen=True)
class Prediction:
    """Of one step: forward and backward."""

    name: str
    phases: tuple[Phase, ...]
    extra_memory: float  # bytes at the peak, over inputs and their gradients
    remark: str = ""

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    def overlapped(self, chip: Chip) -> float:
        """Seconds if every phase takes as long as the slowest of its parts, and the host runs ahead of the device."""
        parts = [phase.parts(chip) for phase in self.phases]
        return max(sum(max(v for k, v in p.items() if k != "host") for p in parts), sum(p["host"] for p in parts))

    def serial(self, chip: Chip) -> float:
        """Seconds if nothing overlaps."""
        return sum(sum(phase.parts(chip).values()) for phase in self.phases)

    def totals(self, chip: Chip) -> dict[str, float]:
        """Seconds of each kind of work, over all phases."""
        parts = [phase.parts(chip) for phase in self.phases]
        return {kind: sum(p[kind] for p in parts) for kind in parts[0]}


@dataclass(frozen=True)
class Problem:
    """What one rank computes: n rows of its own against m columns, which are everybody's."""

    n: int
    m: int
    d: int
    dtype: str
    world_size: int = 1
    directions: int = 2

    @classmethod
    def of_batch(cls, batch: int, d: int, dtype: str, world_size: int = 1) -> Problem:
        return cls(-(-batch // world_size), batch, d, dtype, world_size)

    @property
    def s(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def logits(self) -> float:
        return float(self.n) * self.m

    @property
    def own_columns(self) -> int:
        return -(-self.m // self.world_size)

    @property
    def inputs_and_gradients(self) -> float:
        return 2.0 * (self.n + self.own_columns) * self.d * self.s

    @property
    def gathered(self) -> float:
        """Bytes of columns that other ranks sent."""
        return float(self.m - self.own_columns) * self.d * self.s

    def exchange(self, gathered_sides: int, gradient_itemsize: int) -> Phase:
        """All-gather of the columns, reduce-scatter of their gradient; statistics of the columns are O(M)."""
        if self.world_size == 1:
            return Phase("exchange")
        others = float(self.m - self.own_columns) * self.d
        return Phase("exchange", link=gathered_sides * others * (self.s + gradient_itemsize) + 16.0 * self.m)


def ours(p: Problem, chip: Chip) -> Prediction:
    """This library's loss by the backend that a tensor on the chip gets."""
    return by_torch(p, chip) if chip.family is None else by_triton(p, chip)


def by_triton(p: Problem, chip: Chip) -> Prediction:
    """``backends.triton.launch``: its chunks, its tiles, its accumulators."""
    launch, config = triton_launch(), launch_config(p, chip)
    forward, backward = config.forward, config.backward
    both = p.directions == 2
    one_pass = backends.gradient_in_one_pass("triton", p.n, p.m, both, torch.device("cuda"), torch_dtype(p))
    f_rows = launch.forward_chunk(p.n, p.m, forward, True, both)
    rows, cols = launch.gradient_chunk(p.n, p.m, backward, p.s)
    if one_pass:  # the tiles of the forward are kept
        rows, cols = launch.whole_lines(p.n, p.m, backward.rows, p.s), p.m
        f_rows, forward = rows, backward
    n_forward, n_rows, n_cols = (launch.cdiv(*v) for v in ((p.n, f_rows), (p.n, rows), (p.m, cols)))
    product = 2 * p.logits * p.d
    partials = 8.0 * (p.n * launch.cdiv(p.m, forward.cols) + p.m * launch.cdiv(p.n, forward.rows) * both)
    g = p.logits * p.s

    def exponentials(tile) -> float:
        return p.logits * (1 if tile.one_exponential or not both else 2)

    phases = [
        p.exchange(1, 4),
        Phase(
            "forward tiles",
            p.dtype,
            product,
            exponentials(forward),
            n_forward * operand_bytes(f_rows, p.m, p, forward) + partials,
            n_forward * TRITON_LAUNCH,
        ),
        Phase("merges", bytes=partials, host=n_forward * (1 + both) * TRITON_LAUNCH),
        Phase(
            "backward tiles",
            p.dtype,
            0.0 if one_pass else product,
            0.0 if one_pass else exponentials(backward),
            g + (0.0 if one_pass else n_rows * n_cols * operand_bytes(rows, cols, p, backward)),
            0.0 if one_pass else n_rows * n_cols * TRITON_LAUNCH,
        ),
        # G and an operand are read; float32 accumulators of a chunk are read and written once a tile of G
        Phase(
            "G @ rhs",
            p.dtype,
            product,
            bytes=g + n_rows * p.m * p.d * p.s + 8.0 * n_cols * p.n * p.d,
            host=n_rows * n_cols * chip.launch,
        ),
        Phase(
            "G^T @ lhs",
            p.dtype,
            product,
            bytes=g + n_cols * p.n * p.d * p.s + 8.0 * n_rows * p.m * p.d,
            host=n_rows * n_cols * chip.launch,
        ),
        Phase(
            "the rest",
            bytes=(8.0 + p.s) * (p.n + p.m) * p.d,
            host=(LOSS_OPERATORS + FORWARD_OPERATORS + BACKWARD_OPERATORS + OPERATORS_A_CHUNK * n_rows) * chip.launch,
        ),
    ]
    chunks = f"G in {n_rows * n_cols:,} of {rows:,} x {cols:,}, forward in {n_forward:,} of {f_rows:,} rows"
    return Prediction("ours, triton", tuple(phases), triton_memory(p, chip), chunks)


def operand_bytes(n: int, m: int, p: Problem, tile) -> float:
    """Bytes that the tile kernel reads of lhs and rhs: a band of row tiles stays in cache while the columns pass once."""
    bands = -(-n // (tile.group * tile.rows))
    return float(n + bands * m) * p.d * p.s


def triton_memory(p: Problem, chip: Chip) -> float:
    launch, config = triton_launch(), launch_config(p, chip)
    d = launch.round_up(p.d, 16)
    copies = (p.n + p.m) * d * p.s if d != p.d else 0
    vectors = VECTOR_BYTES_A_LINE["triton"] * (p.n + p.m)
    chunk = launch.forward_chunk(p.n, p.m, config.forward)
    partials = 8 * (chunk * launch.cdiv(p.m, config.forward.cols) + p.m * launch.cdiv(chunk, config.forward.rows))
    rows, cols = launch.gradient_chunk(p.n, p.m, config.backward, p.s)
    tile_of_g = rows * launch.round_up(cols, 64) * p.s
    s = p.s if p.world_size == 1 else 4  # ranks add up their parts of a gradient in float32
    accumulators = p.n * p.d * s + 4 * p.m * d + 4 * rows * d
    drhs = p.m * p.d * s if d != p.d or s != 4 else 0  # in its own dtype, at the end
    backward = tile_of_g + accumulators + max(4 * rows * d, drhs)
    return p.gathered + copies + vectors + max(partials, max(backward, exchanged_gradients(p)) - gradients(p))


def exchanged_gradients(p: Problem) -> float:
    """Bytes of dlhs, of this rank's parts of drhs and of what the others' parts become; all_gather."""
    return 0.0 if p.world_size == 1 else 4.0 * p.n * p.d + 2 * 4.0 * p.m * p.d


def gradients(p: Problem) -> float:
    """Bytes that are a result, hence not extra."""
    return float(p.n + p.own_columns) * p.d * p.s


def by_torch(p: Problem, chip: Chip) -> Prediction:
    """``backends.torch_chunked`` on a CPU."""
    tiles = tile_count(p)
    product = 2 * p.logits * p.d
    made_twice = 1 - kept_tiles(p) / tiles
    if p.directions == 1:
        made_twice = 0.0  # a tile holds whole lines
    phases = (
        Phase("forward tiles", p.dtype, product, p.logits),
        Phase("tiles made again", p.dtype, product * made_twice, p.logits * made_twice),
        Phase("G @ rhs and G^T @ lhs", p.dtype, 2 * product),
        Phase("the rest", host=(LOSS_OPERATORS + TORCH_OPERATORS_A_TILE * tiles) * chip.launch),
    )
    height, width = torch_chunked.default_tile(p.n, p.m, torch.device("cpu"), torch.float32)
    chunks = (
        f"tiles of {min(height, p.n):,} x {min(width, p.m):,}, {kept_tiles(p):,} of {tiles:,} kept for the backward"
    )
    return Prediction("ours, torch", phases, torch_memory(p), chunks)


def cpu_tile(p: Problem) -> tuple[int, int]:
    rows, cols = torch_chunked.default_tile(p.n, p.m, torch.device("cpu"), torch.float32)
    return min(rows, p.n), min(cols, p.m)


def tile_count(p: Problem) -> int:
    height, width = cpu_tile(p)
    return -(-p.n // height) * -(-p.m // width)


def kept_tiles(p: Problem) -> int:
    """Tiles whose exponentials wait for the backward."""
    if not backends.gradient_in_one_pass("torch", p.n, p.m, True, torch.device("cpu"), torch_dtype(p)):
        return 0
    lines = torch.empty(1).expand(1, p.m), torch.empty(1).expand(p.m, 1)
    tile = cpu_tile(p)
    one = torch.empty(1).expand(torch_chunked.tile_size(*tile))
    rule = torch_chunked.Problem(*lines, lines, None, None, None, torch.float32, torch.float32, tile, (one, one))
    return min(rule.tiles_to_keep(round(gradients(p))), tile_count(p))


def torch_memory(p: Problem) -> float:
    """On a CPU, two directions: what is resident at the largest of four moments."""
    height, width = cpu_tile(p)
    tile, kept, tiles = 4.0 * torch_chunked.tile_size(height, width), kept_tiles(p), tile_count(p)
    all_kept = kept == tiles
    factors = 4.0 * torch_chunked.tile_size(min(height, torch_chunked.FACTOR_ROWS), width)
    buffers = factors if all_kept else tile + factors  # the first holds a tile that is not kept
    rows = 4.0 * height * p.d  # of lhs with the scale, of a gradient
    dlhs, drhs = 4.0 * p.n * p.d, 4.0 * p.m * p.d
    half = p.s != 4
    widened = 4.0 * p.m * p.d + rows if half else 0.0  # half precision is multiplied in float32
    rounded = float(p.n + p.m) * p.d * p.s if half else 0.0
    left = max(kept - tiles // -(-p.n // height), 0)
    moments = {
        "the first tile of G": kept * tile + buffers + 2 * rows + widened,
        "a chunk of rows later, all of drhs is there": left * tile + buffers + drhs + 2 * rows + widened,
        "both gradients are": (tile if all_kept else rows) + buffers + dlhs + drhs + widened + max(rows, rounded),
        "the ranks' parts arrive": exchanged_gradients(p),
    }
    always = p.gathered + VECTOR_BYTES_A_LINE["torch"] * (p.n + p.m) + packing_bytes(p.d)
    return always + max(moments.values()) - gradients(p)


def packing_bytes(d: int) -> float:
    """What a CPU's matrix library packs operands into."""
    return 2.0**19 + 3 * 2**10 * min(d, 512)


def dense(p: Problem, chip: Chip) -> Prediction:
    """``open_clip.ClipLoss`` in eager PyTorch: both directions' logits, each by a product of its own, and their log-softmax."""
    copy = p.logits * p.s
    phases = [p.exchange(2, p.s)]
    for direction in ("images", "texts"):
        phases += [
            Phase(f"logits of {direction}", p.dtype, 2 * p.logits * p.d, bytes=copy),
            Phase("log-softmax", exponentials=p.logits, bytes=2 * copy),
            # a matrix of zeros with N entries; it and the log-softmax are read, the logits' gradient is written
            Phase("their gradient", exponentials=p.logits, bytes=4 * copy),
            Phase("products with it", p.dtype, 4 * p.logits * p.d, bytes=2 * copy),
        ]
    phases.append(Phase("the rest", host=DENSE_OPERATORS * chip.launch))
    other_sides = 0.0 if p.world_size == 1 else 2 * p.gathered
    # backward's peak: both log-softmaxes, the gradient of one of them and of its logits
    packing = packing_bytes(p.d) if chip.family is None else 0.0
    return Prediction("dense (open_clip.ClipLoss)", tuple(phases), 4 * copy + other_sides + packing, "4 N x M matrices")


def torch_dtype(p: Problem) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(p.dtype, torch.float32)


def triton_launch():
    try:
        from .backends.triton import launch
    except ImportError as error:
        raise RuntimeError(f"plan: expected Triton, whose launches are to be modelled, got {error}") from error
    return launch


def launch_config(p: Problem, chip: Chip):
    from .backends.triton.config import FAMILIES

    assert chip.family is not None
    return FAMILIES[chip.family].config(torch_dtype(p), p.d, "tf32" if p.dtype == "tf32" else "ieee")


def largest_batch(predict: Callable[[Problem, Chip], Prediction], p: Problem, chip: Chip, memory: float) -> int:
    """Largest batch over all ranks, a multiple of 256 a rank, whose inputs, gradients and extra memory fit; 0 if none."""

    def fits(blocks: int) -> bool:
        q = Problem.of_batch(256 * blocks * p.world_size, p.d, p.dtype, p.world_size)
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
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms"


def report(p: Problem, chip: Chip, memory: float) -> str:
    lines = [
        f"{LABEL}: rates are {'measured just now' if chip.family is None else 'from data sheets'}, of which "
        f"{chip.reach.gemm:.0%} in products and {chip.reach.bandwidth:.0%} in memory traffic are assumed.",
        f"{chip.name}, batch {p.m:,} x {p.d}, {p.dtype}, "
        f"{p.world_size} rank(s) of {p.n:,} rows; forward and backward of both directions, for each rank.",
        f"Inputs and gradients: {amount(p.inputs_and_gradients)}. Workspace budget {amount(backends.workspace_bytes())}. "
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
    print(report(Problem.of_batch(options.batch, options.dim, options.dtype, options.world_size), chip, memory))


if __name__ == "__main__":
    main()
