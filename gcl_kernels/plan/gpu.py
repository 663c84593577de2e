"""This library's loss on a GPU: the Triton backend's chunks, its tiles, its memory."""

from __future__ import annotations

import torch

from .. import backends
from ..backends import Want
from ..backends.chunks import cdiv, chunk_of_gradient, rows_of_partials, whole_lines
from ..backends.triton import strips
from ..backends.triton.config import FAMILIES, WIDE_90, WIDE_STRIPS_90, Config, Strips, TileShape
from ..chips import TRITON_LAUNCH, Chip
from .model import Phase, Prediction, Sizes
from .trace import peak_memory

# Eager operators of a loss in plain PyTorch, and autograd's: `row_losses`.
LOSS_OPERATORS = 36

# Eager operators of one step around its kernels and products. Both directions in one chunk have none but autograd's first; in
# chunks there are the accumulators', of all chunks and of each chunk of rows; float16 has those of its normalised gradients. One
# direction in one pass is plain PyTorch around its tiles, the loss included.
OPERATORS_IN_CHUNKS, OPERATORS_A_CHUNK, OPERATORS_A_TILE, OPERATORS_FLOAT16 = 13, 5, 2, 22
OPERATORS_IN_ONE_PASS, OPERATORS_A_CHUNK_IN_ONE_PASS = 97, 30
# Kernels over lines: statistics, loss, its gradient, what the backward reads, the scale's gradient in two.
LINE_LAUNCHES = 6

# Cycles of a multiprocessor from a tile's last product to the next tile's first, where a block has it for itself. From the
# instructions of the machine code and the units that take them, one phase after the other; never measured. The strips' next tile
# is being loaded meanwhile. Where two blocks share a multiprocessor, one's epilogue runs beside the other's products.
EXPOSED = {("forward", WIDE_90): 7_500, ("strips", WIDE_STRIPS_90.tile): 2_300, ("backward", WIDE_90): 6_200}


def exposed(kernel: str, tile: TileShape, p: Sizes, chip: Chip) -> float:
    """Seconds of `Phase.exposed` over all tiles."""
    tiles = cdiv(p.n, tile.rows) * cdiv(p.m, tile.cols)
    return cdiv(tiles, chip.units) * EXPOSED.get((kernel, tile), 0) / chip.clock


def operators(p: Sizes, n_rows: int, n_tiles: int) -> int:
    """Eager operators around G in so many chunks of rows and tiles, its products not counted."""
    if in_one_pass(p):
        return OPERATORS_IN_ONE_PASS + OPERATORS_A_CHUNK_IN_ONE_PASS * n_rows
    float16 = p.torch_dtype == torch.float16
    if n_tiles == 1 and not float16:
        return 0
    return OPERATORS_IN_CHUNKS + OPERATORS_FLOAT16 * float16 + OPERATORS_A_CHUNK * n_rows


def on_gpu(p: Sizes, chip: Chip) -> Prediction:
    """A step of `backends.triton.launch`."""
    config = launch_config(p, chip)
    forward, backward = config.forward, config.backward
    one_pass = in_one_pass(p)
    f_rows = rows_of_partials(p.n, p.m, forward.sides, True, p.directions == 2)
    rows, cols = chunk_of_gradient(p.n, p.m, (backward.rows, backward.cols), p.s)
    if one_pass:  # the tiles of the forward are stored
        rows, cols = whole_lines(p.n, p.m, backward.rows, p.s), p.m
        f_rows, forward = rows, backward
    n_forward, n_rows, n_cols = (cdiv(*v) for v in ((p.n, f_rows), (p.n, rows), (p.m, cols)))
    product = 2 * p.logits * p.d
    g = p.logits * p.s

    if down_strips(p, config):
        assert config.strips is not None
        forward_phases = in_strips(p, chip, config.strips, n_forward)
        f_rows = strips.rows_of_sums(p.n, p.m, config.strips)
        n_forward = cdiv(p.n, f_rows)
    else:
        forward_phases = in_tiles(p, chip, forward, f_rows)
    phases = [
        p.exchange(1, 4),
        *forward_phases,
        Phase(
            "backward tiles",
            p.dtype,
            0.0 if one_pass else product,
            0.0 if one_pass else exponentials(p, backward),
            g + (0.0 if one_pass else n_rows * n_cols * operand_bytes(rows, cols, p, backward)),
            0.0 if one_pass else n_rows * n_cols * TRITON_LAUNCH,
            exposed=0.0 if one_pass else exposed("backward", backward, p, chip),
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
            host=operators(p, n_rows, n_rows * n_cols) * chip.launch + LINE_LAUNCHES * (not one_pass) * TRITON_LAUNCH,
        ),
    ]
    chunks = f"G in {n_rows * n_cols:,} of {rows:,} x {cols:,}, forward in {n_forward:,} of {f_rows:,} rows"
    return Prediction("ours, triton", tuple(phases), memory_on_gpu(p, chip), chunks)


def exponentials(p: Sizes, tile: TileShape) -> float:
    return p.logits * (1 if tile.one_exponential or p.directions == 1 else 2)


def in_tiles(p: Sizes, chip: Chip, tile: TileShape, rows: int) -> list[Phase]:
    """`launch.forward_by_tiles`, in chunks of so many rows."""
    both, chunks = p.directions == 2, cdiv(p.n, rows)
    partials = 8.0 * (p.n * cdiv(p.m, tile.cols) + p.m * cdiv(p.n, tile.rows) * both)
    merges = chunks * (1 + both) * (chunks > 1 or in_one_pass(p))
    return [
        Phase(
            "forward tiles",
            p.dtype,
            2 * p.logits * p.d,
            exponentials(p, tile),
            chunks * operand_bytes(rows, p.m, p, tile) + partials,
            chunks * TRITON_LAUNCH,
            exposed=exposed("backward" if in_one_pass(p) else "forward", tile, p, chip),  # what it stores takes as long
        ),
        Phase("merges", bytes=partials, host=merges * TRITON_LAUNCH),
    ]


def down_strips(p: Sizes, config: Config) -> bool:
    """Whether the forward is `strips.forward`. Ranks' default labels count the columns of all of them, so that they are given."""
    plain = p.directions == 2 and p.world_size == 1 and p.m >= p.n
    return plain and config.strips is not None and config.strips.pay(p.n, p.m)


def in_strips(p: Sizes, chip: Chip, given: Strips, chunks_of_tiles: int) -> list[Phase]:
    """`strips.forward`, and launches of `launch.forward_by_tiles` that find nothing to do."""
    tile, rows = given.tile, strips.rows_of_sums(p.n, p.m, given)
    chunks, cut = cdiv(p.n, rows), strips.Cut.of(rows, p.m, given)
    sums = 4.0 * (p.n * cdiv(p.m, tile.cols) + p.m * chunks * cut.slots)
    # a band of strips stays in cache while the rows pass once
    operands = chunks * p.m * p.d * p.s + cdiv(p.m, tile.group * tile.cols) * p.n * p.d * p.s
    nothing = 1 + chunks_of_tiles * (3 if chunks_of_tiles > 1 else 1)
    return [
        Phase("norms", bytes=float(p.n + p.m) * p.d * p.s, host=2 * TRITON_LAUNCH),
        Phase(
            "forward strips",
            p.dtype,
            2 * p.logits * p.d,
            p.logits,
            operands + sums,
            chunks * TRITON_LAUNCH,
            exposed=exposed("strips", tile, p, chip),
        ),
        Phase("merges", bytes=sums, host=(2 * chunks * (chunks > 1) + nothing) * TRITON_LAUNCH),
    ]


def operand_bytes(n: int, m: int, p: Sizes, tile) -> float:
    """Bytes that the tile kernel reads of lhs and rhs: a band of row tiles stays in cache while the columns pass once."""
    bands = -(-n // (tile.group * tile.rows))
    return float(n + bands * m) * p.d * p.s


def in_one_pass(p: Sizes) -> bool:
    rule = backends.BACKENDS["triton"].one_pass
    return rule(p.n, p.m, Want(True, p.directions == 2), torch.device("cuda"), p.torch_dtype)


def memory_on_gpu(p: Sizes, chip: Chip) -> float:
    """Bytes at the peak, of the launch code run on tensors without memory, and of what is exchanged between ranks."""
    forward, backward = peak_memory(p, launch_config(p, chip), in_one_pass(p))
    return p.gathered + max(forward, max(backward, p.exchanged_gradients) - p.gradients)


def launch_config(p: Sizes, chip: Chip) -> Config:
    assert chip.family is not None
    return FAMILIES[chip.family].config(p.torch_dtype, p.d, "tf32" if p.dtype == "tf32" else "ieee")
