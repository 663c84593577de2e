"""This library's loss on a CPU: the torch backend's tiles, and what is resident at the largest of its moments."""

from __future__ import annotations

import torch

from .. import backends
from ..backends import Want
from ..backends.cpu import bfloat16_products
from ..backends.torch.softmax import FACTOR_ROWS
from ..backends.torch.tiles import square_tile, tile_numel, tiles_to_store
from ..chips import Chip
from .gpu import LOSS_OPERATORS
from .model import Phase, Prediction, Sizes, packing_bytes

OPERATORS_A_TILE = 25

# Statistics, upstream gradients, positives and their temporaries, most of them float64, at the peak of a step.
VECTOR_BYTES_A_LINE = 42


def on_cpu(p: Sizes, chip: Chip) -> Prediction:
    """A step of `backends.torch`."""
    tiles = tile_count(p)
    product = 2 * p.logits * p.d
    made_twice = 1 - stored_tiles(p) / tiles
    if p.directions == 1:
        made_twice = 0.0  # a tile holds whole lines
    phases = (
        Phase("forward tiles", p.dtype, product, p.logits),
        Phase("tiles made again", p.dtype, product * made_twice, p.logits * made_twice),
        Phase("G @ rhs and G^T @ lhs", p.dtype, 2 * product),
        Phase("the rest", host=(LOSS_OPERATORS + OPERATORS_A_TILE * tiles) * chip.launch),
    )
    height, width = cpu_tile(p)
    chunks = f"tiles of {height:,} x {width:,}, {stored_tiles(p):,} of {tiles:,} stored for the backward"
    return Prediction("ours, torch", phases, memory_on_cpu(p), chunks)


def cpu_tile(p: Sizes) -> tuple[int, int]:
    rows, cols = square_tile(p.n, p.m, torch.device("cpu"), torch.float32)
    return min(rows, p.n), min(cols, p.m)


def tile_count(p: Sizes) -> int:
    height, width = cpu_tile(p)
    return -(-p.n // height) * -(-p.m // width)


def stored_tiles(p: Sizes) -> int:
    """Tiles whose exponentials wait for the backward."""
    rule = backends.BACKENDS["torch"].one_pass
    if not rule(p.n, p.m, Want(True, True), torch.device("cpu"), p.torch_dtype):
        return 0
    return min(tiles_to_store(cpu_tile(p), round(p.gradients)), tile_count(p))


def memory_on_cpu(p: Sizes) -> float:
    """On a CPU, two directions: what is resident at the largest of four moments."""
    height, width = cpu_tile(p)
    tile, stored, tiles = 4.0 * tile_numel(height, width), stored_tiles(p), tile_count(p)
    all_stored = stored == tiles
    factors = 4.0 * tile_numel(min(height, FACTOR_ROWS), width)
    buffers = factors if all_stored else tile + factors  # the first holds a tile that is not stored
    rows = 4.0 * height * p.d  # of lhs with the scale, of a gradient
    dlhs, drhs = 4.0 * p.n * p.d, 4.0 * p.m * p.d
    half = p.s != 4
    widened = 4.0 * p.m * p.d + rows if half else 0.0  # half precision is multiplied in float32,
    if p.torch_dtype == torch.bfloat16 and bfloat16_products() == "native":  # or its logits alone, a tile at a time
        widened = 4.0 * width * p.d + rows
    rounded = float(p.n + p.m) * p.d * p.s if half else 0.0
    left = max(stored - tiles // -(-p.n // height), 0)
    moments = {
        "the first tile of G": stored * tile + buffers + 2 * rows + widened,
        "a chunk of rows later, all of drhs is there": left * tile + buffers + drhs + 2 * rows + widened,
        "both gradients are": (tile if all_stored else rows) + buffers + dlhs + drhs + widened + max(rows, rounded),
        "the ranks' parts arrive": p.exchanged_gradients,
    }
    always = p.gathered + VECTOR_BYTES_A_LINE * (p.n + p.m) + packing_bytes(p.d)
    return always + max(moments.values()) - p.gradients
