"""Launch configurations: one fixed choice per (architecture family, dtype, band of D), with the reason beside it.

`python -m bench.aot` prints what each compiles to. Nothing is searched at run time: the first batch is as fast as the rest.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..choice import architecture
from ..settings import current


@dataclass(frozen=True)
class TileShape:
    """How one tile kernel is launched. Rows are those of lhs, columns those of rhs."""

    rows: int
    cols: int
    d: int  # of D, per pipeline stage
    warps: int
    stages: int
    group: int = 8  # row tiles in a band: their lhs and a few column tiles stay in L2 while the band is walked
    halves: bool = False  # backward: the epilogue in two column halves, where a wide tile's registers need it
    one_exponential: bool = True  # False: two exponentials a logit always (`softmax`)
    maxnreg: int | None = None  # registers of a thread, where several blocks are to share a multiprocessor; not on AMD

    @property
    def sides(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def stored_cols(self) -> int:
        """Columns of the blocks in which the backward stores G."""
        return self.cols // 2 if self.halves else self.cols


@dataclass(frozen=True)
class Strips:
    """How `strip_kernels.forward_strips` is launched.

    `fold` rows of a tile that lie `apart` rows apart are held by one thread, which adds them up for the sums of columns before it
    keeps those: fold times fewer registers.
    """

    tile: TileShape
    fold: int
    apart: int
    resident: int  # programs that run at a time on a chip of the family
    waves: int = (
        8  # tiles that each of them has at least; a smaller plane's time is in its launches, of which strips have more
    )

    def pay(self, n: int, m: int) -> bool:
        """Whether the plane is large enough."""
        tiles = math.ceil(n / self.tile.rows) * math.ceil(m / self.tile.cols)
        return tiles >= self.waves * self.resident


@dataclass(frozen=True)
class Config:
    forward: TileShape
    backward: TileShape
    masked_forward: TileShape  # with ids or several labels a row, whose values need registers beside the logits
    masked_backward: TileShape
    descriptors: bool = False  # tensor descriptors (TMA where the chip has it) instead of pointers
    # The forward that stores exponentials, unmasked; None: as the backward, which stores as much.
    storing: TileShape | None = None
    # The sigmoid's epilogue in column parts, whose numbers fit beside the logits; False where a thread has whole rows (columns of
    # a part would change threads) or registers for all.
    parts: bool = True
    # The forward of both directions in a large plane without masks, terms or given labels; None: as any other.
    strips: Strips | None = None

    def tile(self, backward: bool, masked: bool, stored: bool = False) -> TileShape:
        if stored and self.storing is not None and not masked:
            return self.storing
        if backward or stored:
            return self.masked_backward if masked else self.backward
        return self.masked_forward if masked else self.forward


@dataclass(frozen=True)
class Family:
    """Chips that share their configurations. Bands are (largest D, configuration), in order of D."""

    name: str
    target: tuple[str, int | str, int]  # backend, architecture, threads of a warp: what the compiler is told
    shared_memory: int  # bytes a block may take; a configuration over it does not launch
    half: tuple[tuple[float, Config], ...]  # bfloat16 and float16, on the matrix units
    tf32: tuple[tuple[float, Config], ...]  # float32 on the matrix units, in one or several passes
    ieee: tuple[tuple[float, Config], ...]  # float32 on the ordinary units

    def config(self, dtype: torch.dtype, d: int, precision: str) -> Config:
        bands = self.half if dtype != torch.float32 else self.ieee if precision == "ieee" else self.tf32
        return next(config for largest_d, config in bands if d <= largest_d)


def everywhere(
    tile: TileShape,
    descriptors: bool = False,
    parts: bool = True,
    strips: Strips | None = None,
    backward: TileShape | None = None,
) -> tuple[tuple[float, Config], ...]:
    """`backward`: where it is not `tile`, unmasked."""
    return ((math.inf, Config(tile, backward or tile, tile, tile, descriptors, tile, parts, strips)),)


# float32 in IEEE arithmetic: fused multiply-adds on the ordinary units. A thread holds its share of both operands of
# a step in registers, so steps of 16 and 64 x 64 tiles are what fits. The products take ten times as long as the
# epilogue: two exponentials a logit cost nothing there and round least.
IEEE = TileShape(64, 64, 16, 4, 3, one_exponential=False)

# float32 on the matrix units: three passes of tf32 need twice the registers of one for the split operands, hence 64 columns.
TF32 = TileShape(128, 64, 32, 8, 3, one_exponential=False)

# Hopper, 227 KB. 128 x 256 reads least shared memory a product (wgmma of 256 columns) and 48 bytes of L2 a clock at full rate;
# 4 stages of 48 KB = 192 KB, one block an SM.
WIDE_90 = TileShape(128, 256, 64, 8, 4, halves=True)
# At small D a tile's products take no longer than its epilogue: two blocks an SM (96 KB each; forward 128 registers x 256
# threads, backward 255 x 128) let one block's products run beside the other's epilogue. The sigmoid that stores spills at 128.
SMALL_FORWARD_90 = TileShape(128, 128, 64, 8, 3)
SMALL_BACKWARD_90 = TileShape(128, 128, 64, 4, 3, halves=True)

# Matrix instructions of Ampere and Hopper leave rows r and r + 8 with one thread. Three stages load the next tile while the
# exponentials of this one are taken. Small D: 128 registers, so that two blocks share a multiprocessor.
WIDE_STRIPS_90 = Strips(TileShape(128, 256, 64, 8, 3), 2, 8, resident=132)
SMALL_STRIPS_90 = Strips(TileShape(128, 128, 64, 8, 3, maxnreg=128), 2, 8, resident=264)

# Blackwell, 227 KB: accumulators are in tensor memory and come to registers a whole row a thread; 256 columns do not fit there,
# nor more than 64 beside ids (forward: not even those if the logits must outlive their exponentials).
SQUARE_100 = TileShape(128, 128, 64, 8, 3)
# Column sums beside what is stored need the halves; the backward, with more in flight, does better whole.
STORING_100 = TileShape(128, 128, 64, 8, 3, halves=True)
MASKED_FORWARD_100 = TileShape(128, 64, 64, 8, 4, one_exponential=False)
MASKED_BACKWARD_100 = TileShape(128, 64, 64, 8, 4)

# A thread has one row: column sums are as many as the logits, and both fit.
STRIPS_100 = Strips(SQUARE_100, 1, 1, resident=148)

# Ampere: 64 accumulators a thread. 4 stages of 16 KB = 64 KB: two blocks fit 163 KB, and one fits the 99 KB of consumer chips.
# By registers two of the backward's do: unmasked, it needs no more than 128, but is given up to 187 if it may take them.
SQUARE_80 = TileShape(128, 128, 32, 8, 4)
BACKWARD_80 = replace(SQUARE_80, maxnreg=128)
SQUARE_86 = TileShape(128, 128, 32, 8, 3)  # 48 KB, so that two fit there as well
STRIPS_80, STRIPS_86 = Strips(SQUARE_80, 2, 8, resident=108), Strips(SQUARE_86, 2, 8, resident=128)

# CDNA3, 64 KB of LDS, 64 threads a wave, 512 registers a thread: 8 waves share 128 x 128; the AMD pipeliner keeps stages - 1
# buffers of 32 KB.
SQUARE_942 = TileShape(128, 128, 64, 8, 2)
STRIPS_942 = Strips(SQUARE_942, 4, 1, resident=304)  # four rows in turn are a thread's
# float32 in three passes of bfloat16: splitting the operands is ordinary arithmetic, which the products of a second block (of
# 32 KB) hide.
SPLIT_942 = TileShape(128, 64, 32, 8, 2, one_exponential=False)


@dataclass(frozen=True)
class RowBlock:
    """How a kernel over whole rows (`fields`) is launched: rows of every field, held in registers."""

    rows: int
    d: int  # a power of two, D or more
    warps: int


def row_block(d: int, lanes: int) -> RowBlock:
    """Of each field, 8 numbers a thread: one 16-byte load of half precision. Over 16 warps a thread's share of the registers is
    too small for that, hence 16 numbers at D = 8192 (`backends.FIELDS_AND_WIDTH`). Rows narrower than a warp share it."""
    block_d, one_warp = 2 ** (d - 1).bit_length(), 8 * lanes
    return RowBlock(max(one_warp // block_d, 1), block_d, min(max(block_d // one_warp, 1), 16))


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sm_80",
            ("cuda", 80, 32),
            163 * 1024,
            half=everywhere(SQUARE_80, strips=STRIPS_80, backward=BACKWARD_80),
            tf32=everywhere(TF32),
            ieee=everywhere(IEEE),
        ),
        Family(
            "sm_86",
            ("cuda", 86, 32),
            99 * 1024,
            half=everywhere(SQUARE_86, strips=STRIPS_86),
            tf32=everywhere(TF32),
            ieee=everywhere(IEEE),
        ),
        Family(
            "sm_90",
            ("cuda", 90, 32),
            227 * 1024,
            half=(
                (
                    256,
                    Config(
                        SMALL_FORWARD_90,
                        SMALL_BACKWARD_90,
                        SMALL_FORWARD_90,
                        SMALL_FORWARD_90,
                        True,
                        strips=SMALL_STRIPS_90,
                    ),
                ),
                (
                    math.inf,
                    Config(WIDE_90, WIDE_90, SMALL_FORWARD_90, SMALL_FORWARD_90, True, strips=WIDE_STRIPS_90),
                ),
            ),
            tf32=everywhere(TF32, descriptors=True),
            ieee=everywhere(IEEE, descriptors=True),
        ),
        Family(
            "sm_100",
            ("cuda", 100, 32),
            227 * 1024,
            half=(
                (
                    math.inf,
                    Config(
                        SQUARE_100,
                        SQUARE_100,
                        MASKED_FORWARD_100,
                        MASKED_BACKWARD_100,
                        True,
                        STORING_100,
                        parts=False,
                        strips=STRIPS_100,
                    ),
                ),
            ),
            tf32=everywhere(TF32, descriptors=True),
            ieee=everywhere(IEEE, descriptors=True),
        ),
        Family(
            "gfx942",
            ("hip", "gfx942", 64),
            64 * 1024,
            half=everywhere(SQUARE_942, parts=False, strips=STRIPS_942),
            tf32=everywhere(SPLIT_942),
            ieee=everywhere(IEEE),
        ),
    )
}

# Triton's interpreter: small, so that a test's shape has several tiles and a tail in every direction.
INTERPRETED = Config(
    TileShape(32, 64, 32, 4, 2, group=2),
    TileShape(64, 32, 32, 4, 2, group=2, halves=True),
    TileShape(32, 64, 32, 4, 2, group=2),
    TileShape(64, 32, 32, 4, 2, group=2, halves=True),
    descriptors=True,
    strips=Strips(TileShape(32, 64, 32, 4, 2, group=2), 2, 8, resident=1),
)


def select(device: torch.device, dtype: torch.dtype, d: int, precision: str) -> Config:
    """The configuration for tensors on this device, or the one that `backends.settings` gives."""
    given = current().config
    if given is not None:
        return given
    if device.type != "cuda":
        return INTERPRETED
    return FAMILIES[family_of(architecture(device))].config(dtype, d, precision)


@cache  # one warning a process
def family_of(chip: str | tuple[int, int]) -> str:
    """Family of a compute capability or a gfx name; for a chip that is in none, the nearest that it can run."""
    known = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    known_amd = {"gfx942": "gfx942", "gfx950": "gfx942"}
    if isinstance(chip, str):
        found, nearest = known_amd.get(chip), "gfx942"
    else:
        # sm_12x has Ampere's matrix instructions and shared memory of 99 KB, as have the others that are not here
        found, nearest = known.get(chip), "sm_100" if chip[0] in (10, 11) else "sm_86"
    if found is None:
        warnings.warn(
            f"gcl_kernels has no launch configuration for {chip}; it takes that of {nearest}, which may be slow",
            stacklevel=2,
        )
    return found or nearest
