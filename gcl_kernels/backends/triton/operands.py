"""The inputs as the kernels read them: aligned matrices, padded vectors, 32-bit ids, one number that scales everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...pairs import Pairs
from ..chunks import round_up
from ..terms import bias2
from .config import Config, TileShape, select
from .run import Block, run

# The kernels read vectors in whole tiles, of any side up to this.
PAD = 256


class Terms(NamedTuple):
    """Masks and additive terms as the kernels take them, `modify`'s in its order; None for one that is absent."""

    sign: Tensor | None  # 0-d float32, that of logit_scale beside limits
    ids: tuple[tuple[Tensor, Tensor], ...] | None  # a pair (N..), (M..) a channel, int32, `compress_ids`
    lhs_limit: Tensor | None  # (N..) float32, in units of the logits times the sign
    rhs_limit: Tensor | None  # (M..)
    rhs_bias: Tensor | None  # (M..) float32, base 2

    @classmethod
    def of(cls, pairs: Pairs) -> tuple[Terms, Tensor]:
        """With the scale that tiles multiply by, `terms.scale_of_tiles`."""
        ids = None
        if pairs.lhs_ids is not None and pairs.rhs_ids is not None:
            ids = tuple(zip(*compress_ids(pairs.lhs_ids, pairs.rhs_ids), strict=True))
        bias = bias2(pairs, torch.float32)
        sign, lhs_limit, rhs_limit, scale = (
            pack_limits(pairs) if pairs.limited else (None, None, None, pairs.logit_scale)
        )
        return cls(sign, ids, lhs_limit, rhs_limit, None if bias is None else padded(bias, 0)), scale

    def in_chunk(self, rows: slice, cols: slice) -> tuple[Any, ...]:
        """The vectors from the chunk's first row and column on. No tuple inside holds a None, which Triton 3.5 cannot read."""
        return (
            self.sign,
            None if self.ids is None else tuple((left[rows.start :], right[cols.start :]) for left, right in self.ids),
            None if self.lhs_limit is None else self.lhs_limit[rows.start :],
            None if self.rhs_limit is None else self.rhs_limit[cols.start :],
            None if self.rhs_bias is None else self.rhs_bias[cols.start :],
        )


@dataclass(frozen=True)
class Operands:
    lhs: Tensor  # (N, D'), `operand`
    rhs: Tensor  # (M, D')
    d: int  # D before padding
    # logit_scale; and again for float32 inputs, which take what rounding takes from it in base 2
    scale: tuple[Tensor, Tensor | None]
    labels: Tensor | None  # (N.., P) int32, `padded`; None: row i's positive is column i
    positives: int  # P
    terms: Terms
    config: Config
    precision: str

    @classmethod
    def of(cls, pairs: Pairs) -> Operands:
        precision = input_precision(pairs.lhs.dtype)
        terms, scale = Terms.of(pairs)
        return cls(
            operand(pairs.lhs),
            operand(pairs.rhs),
            pairs.d,
            (scale, scale if pairs.lhs.dtype == torch.float32 else None),
            None if pairs.labels is None else padded(pairs.labels, -1, torch.int32),
            pairs.positives,
            terms,
            select(pairs.lhs.device, pairs.lhs.dtype, pairs.d, precision),
            precision,
        )

    @property
    def limited(self) -> bool:
        """Whether pairs are hidden by their similarity."""
        return self.terms.sign is not None

    @property
    def n(self) -> int:
        return self.lhs.shape[0]

    @property
    def m(self) -> int:
        return self.rhs.shape[0]

    def tile(self, *, backward: bool = False, stored: bool = False) -> TileShape:
        return self.config.tile(backward, any(term is not None for term in self.terms) or self.positives > 1, stored)

    def arguments(self, rows: slice, cols: slice, tile: TileShape, written: Tensor | None = None) -> dict[str, Any]:
        """What both tile kernels take, for a chunk whose tiles are written to a matrix, or to none."""
        lhs, rhs = self.lhs[rows], self.rhs[cols]
        return {
            "lhs": self.block(lhs, tile.rows, tile.d),
            "rhs": self.block(rhs, tile.cols, tile.d),
            "strides": (lhs.stride(0), rhs.stride(0), 0 if written is None else written.stride(0)),
            "scale": self.scale,
            "p_labels": None if self.labels is None else self.labels[rows.start :],
            "terms": self.terms.in_chunk(rows, cols),
            "n": lhs.shape[0],
            "m": rhs.shape[0],
            "d": lhs.shape[1],
            "shift": (rows.start if self.labels is None else 0) - cols.start,
            "PRECISION": self.precision,
            "LABELS": self.positives,
            **tile_constants(tile, lhs.shape[1]),
        }

    def block(self, x: Tensor, rows: int, cols: int) -> Tensor | Block:
        """A matrix as the kernels take it: a descriptor of (rows, cols) blocks, or the tensor for its pointer."""
        return Block(x, rows, cols) if self.config.descriptors else x


def tile_constants(tile: TileShape, d: int) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLS": tile.cols,
        "BLOCK_D": tile.d,
        "GROUP": tile.group,
        "WHOLE_D": d % tile.d == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **({} if tile.maxnreg is None else {"maxnreg": tile.maxnreg}),
    }


def operand(x: Tensor) -> Tensor:
    """x, or a copy, with D and the row pitch multiples of 16 elements and a base aligned to 16 bytes.

    Descriptors and 16-byte loads need that. An embedding of another layout, or a D that is no multiple of 16, is copied once a
    pass, O((N + M) D), its D padded with zeros of our own: far cheaper than the 2-byte loads the N M D work would take.
    """
    rows, d = x.shape
    if d % 16 == 0 and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.stride(0) >= d and x.data_ptr() % 16 == 0:
        return x
    copy = x.new_zeros((rows, round_up(d, 16)))
    copy[:, :d] = x
    return copy


def padded(x: Tensor, value: float, dtype: torch.dtype | None = None) -> Tensor:
    """A copy with rows of `value` added up to a multiple of PAD."""
    copy = x.new_full((round_up(len(x), PAD), *x.shape[1:]), value, dtype=dtype)
    copy[: len(x)] = x
    return copy


def pack_limits(pairs: Pairs) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(sign, lhs_limit, rhs_limit) of `Terms` and the scale of tiles: `terms`'s functions in one launch."""
    scale, limits = pairs.logit_scale, (contiguous(pairs.lhs_limit), contiguous(pairs.rhs_limit))
    lengths = tuple(0 if x is None else round_up(len(x), PAD) for x in limits)
    left, right = (scale.new_empty(length, dtype=torch.float32) if length else None for length in lengths)
    sign, tiles_scale = scale.new_empty((), dtype=torch.float32), torch.empty_like(scale)
    run(
        "pack_limits",
        max(lengths) // PAD,
        limits=limits,
        p_scale=scale,
        out=(left, right),
        p_sign=sign,
        p_tiles_scale=tiles_scale,
        n=pairs.n,
        m=pairs.m,
        PAD=PAD,
        num_warps=4,
    )
    return sign, left, right, tiles_scale


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def compress_ids(lhs_ids: Tensor, rhs_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(K, N) and (K, M) int32 that are equal exactly where the int64 ids are equal and not negative.

    A tile compares every row with every column: half the registers and half the instructions. The number that stands for an
    id is its position among all of its channel's ids, sorted.
    """
    ids = torch.cat([lhs_ids, rhs_ids]).t().contiguous()
    found = torch.searchsorted(ids.sort(dim=1).values, ids, out_int32=True)
    (k, _), n, m = ids.shape, len(lhs_ids), len(rhs_ids)
    left, right = (found.new_empty((k, round_up(length, PAD))) for length in (n, m))
    run(
        "mark_ids",
        k * (left.shape[1] + right.shape[1]) // PAD,
        p_found=found,
        p_ids=ids,
        p_left=left,
        p_right=right,
        n=n,
        m=m,
        PAD=PAD,
        num_warps=4,
    )
    return left, right


def input_precision(dtype: torch.dtype) -> str:
    """What float32 products are made of: `torch.get_float32_matmul_precision()` in Triton's words."""
    if dtype != torch.float32:
        return "ieee"  # has no meaning for half precision, whose products are exact
    on_hip = torch.version.hip is not None
    return {
        "highest": "ieee",
        "high": "bf16x3" if on_hip else "tf32x3",
        "medium": "bf16x3" if on_hip else "tf32",
    }[torch.get_float32_matmul_precision()]
