"""Cuts the problem into launches: chunks that respect the workspace budget, the tile kernels, the gradient GEMMs.

Nothing here reads a device value on the host. Peak extra memory is O((N + M) D) plus the budget,
``GCL_KERNELS_WORKSPACE_MIB`` (default 256).
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import workspace_bytes
from ..torch_chunked import (
    LN2,
    LOG2E,
    Line,
    distinct_positives,
    positive_entries,
    positives_by_column,
    positives_by_row,
    slices,
)
from . import kernels
from .config import Config, Tile, select

INTERPRETED = not isinstance(kernels.forward_tile, triton.JITFunction)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# G is stored for gradients of size 1. In float16 a softmax of 65,536 columns would then lie among the subnormals; 2^8 lifts it
# out and leaves room for 2^8 before the largest finite number.
FLOAT16_LIFT = 2.0**8


def forward(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    want_row: bool,
    want_col: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``backends``. ``config`` replaces the table's choice, for tests and tuning."""
    p = Problem.of(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, config)
    tile = p.tile(backward=False)
    positive = lhs.new_zeros((p.n, p.n_labels), dtype=torch.float32)
    row, col = Statistics.of(lhs, p.n if want_row else 0), Statistics.of(lhs, p.m if want_col else 0)

    col_tiles = cdiv(p.m, tile.cols)
    chunk = forward_chunk(p.n, p.m, tile, want_row, want_col)
    row_parts = lhs.new_empty((2, col_tiles * chunk if want_row else 0), dtype=torch.float32)
    col_parts = lhs.new_empty((2, cdiv(chunk, tile.rows) * p.m if want_col else 0), dtype=torch.float32)
    with on_device(lhs):
        for rows in slices(p.n, chunk):
            n = rows.stop - rows.start
            row_tiles = cdiv(n, tile.rows)
            run(
                kernels.forward_tile,
                row_tiles * col_tiles,
                **p.arguments(rows, slice(0, p.m), tile),
                p_row_top=row_parts[0],
                p_row_total=row_parts[1],
                p_col_top=col_parts[0],
                p_col_total=col_parts[1],
                p_positive=positive[rows],
                kept=p.scale,
                p_reference=p.scale,
                p_skip=p.scale,
                kept_stride=0,
                WANT_ROW=want_row,
                WANT_COL=want_col,
                KEEP=False,
                HALVES=False,
            )
            if want_row:
                row[rows].merge(row_parts, col_tiles)
            if want_col:
                col.merge(col_parts, row_tiles)
    # the kernel leaves positives out: they join their lines here, in float64
    positive2 = positive.to(torch.float64)
    row2, col2 = row.logsumexp2(), col.logsumexp2()
    if want_row:
        row2 = torch.logaddexp2(row2, positives_by_row(labels, positive2))
    if want_col:
        col2 = torch.logaddexp2(col2, positives_by_column(labels, positive2, p.m))
    return row2.mul_(LN2), col2.mul_(LN2), positive2.mul_(LN2)


def backward(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    row: Tensor,
    col: Tensor,
    positive: Tensor,
    g_row: Tensor | None,
    g_col: Tensor | None,
    g_positive: Tensor | None,
    need_lhs: bool,
    need_rhs: bool,
    need_scale: bool,
    config: Config | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``backends``. One chunk of G at a time: dlhs = scale G rhs, drhs = scale G^T lhs, dscale = <G, lhs rhs^T>."""
    p = Problem.of(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, config)
    tile = p.tile(backward=True)
    g, norm = normalized(lhs.dtype, g_row, g_col, g_positive)
    by_row = None if g[0] is None else Line.of(row, g[0], torch.float32)
    by_col = None if g[1] is None else Line.of(col, g[1], torch.float32)
    row_line, col_line, middle = packed(by_row, by_col, lhs)
    entry = padded(positive_entries(labels, row, col, positive, *g).to(torch.float32), 0)  # p - 1 is taken in float64

    # <G, lhs rhs^T> = <G rhs, lhs> = <G^T lhs, rhs>: the scale's gradient costs O((N + M) D) once either product is there.
    with_lhs = need_lhs or (need_scale and not need_rhs)
    outer = logit_scale if norm is None else logit_scale * norm.to(logit_scale)
    dtype = lhs.dtype if dtype is None else dtype
    dlhs = lhs.new_empty(lhs.shape if need_lhs else 0, dtype=dtype)
    dscale = logit_scale.new_zeros((), dtype=torch.float64)
    drhs = p.rhs.new_zeros(p.rhs.shape, dtype=torch.float32) if need_rhs else None
    stored = torch.float32 if INTERPRETED else lhs.dtype  # the interpreter's bfloat16 rounding is faulty
    chunk = gradient_chunk(p.n, p.m, tile, stored.itemsize)
    pitch = round_up(chunk[1], 64)  # every row of G starts on a line of 128 bytes
    workspace = lhs.new_empty((chunk[0], pitch), dtype=stored)
    with on_device(lhs):
        for rows in slices(p.n, chunk[0]):
            x = p.lhs[rows]
            product = torch.zeros_like(x, dtype=torch.float32) if with_lhs else None
            for cols in slices(p.m, chunk[1]):
                n, m = rows.stop - rows.start, cols.stop - cols.start
                gradient = workspace[:n, :m]
                run(
                    kernels.backward_tile,
                    cdiv(n, tile.rows) * cdiv(m, tile.cols),
                    **p.arguments(rows, cols, tile),
                    p_row_line=row_line[:, rows.start :],
                    p_col_line=col_line[:, cols.start :],
                    p_middle=middle,
                    p_entry=entry[rows.start :],
                    gradient=p.block(gradient, tile.rows, tile.stored_cols),
                    gradient_stride=pitch,
                    row_line_stride=row_line.stride(0),
                    col_line_stride=col_line.stride(0),
                    HAS_ROW=by_row is not None,
                    HAS_COL=by_col is not None,
                    HALVES=tile.halves,
                )
                gradient = gradient.to(lhs.dtype)
                if product is not None:
                    add_product(product, gradient, p.rhs[cols])
                if drhs is not None:
                    add_product(drhs[cols], gradient.t(), x)
            if product is not None:
                if need_scale:
                    dscale += inner_product(product, x)
                if need_lhs:
                    dlhs[rows] = product.mul_(outer)[:, : p.d]
    if need_scale and not with_lhs and drhs is not None:
        for cols in slices(p.m, chunk[1]):
            dscale += inner_product(drhs[cols], p.rhs[cols])
    if norm is not None:
        dscale *= norm
    nothing = lhs.new_empty(0)
    return (
        dlhs,
        nothing if drhs is None else drhs.mul_(outer)[:, : p.d].to(dtype, memory_format=torch.contiguous_format),
        dscale.to(logit_scale) if need_scale else logit_scale.new_empty(0),
    )


# By how much a kept exponential may exceed 1, in powers of two. 2^80 times a million columns is within float32 and bfloat16, and
# so is what gains of its inverse leave of an embedding's entries.
HEADROOM = 80.0


def forward_with_gradient(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    g_row: Tensor | None,
    g_col: Tensor | None,
    g_positive: Tensor,
    need_lhs: bool,
    need_rhs: bool,
    need_scale: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``backends``; for one direction, in 6 N M D instead of 8: no tile is made twice.

    A chunk holds whole lines (rows, or columns for the other direction), and of each tile e_ij = exp2(s2_ij - r_i) is stored,
    rounded once, as G is in the backward. What turns e into G is one factor a line, known when the line is complete, and it
    is never multiplied in: with G = diag(gain) E + positives,

        dlhs = scale (gain E rhs + positives)        drhs = scale (E^T (gain lhs) + positives)

    so that the plane is written once and read twice, 6 bytes a logit of 2 bytes, exactly as in the backward. (Stored as float32
    logits and turned into G later it would be 14: at D = 768 the 8 more take 2.7 ps at 3 TB/s, the tile made again 2.2 ps at
    700 TFLOP/s.) The reference r_i must be known beforehand: ``HEADROOM`` below the largest logit that the norms allow. In
    bfloat16 and float32, which have the same range, e then keeps its digits for any line whose own largest negative is within
    2 HEADROOM of that bound, 110 nats. A chunk with a line that is not is made again against the lines' logsumexp, by a
    launch that a number on the device turns off otherwise. float16 has no such range. Positives are added to the gradients
    in float32, O(N P D).
    """
    p = Problem.of(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, config)
    by_row = g_row is not None
    own, other = (p.lhs, p.rhs) if by_row else (p.rhs, p.lhs)
    need_own, need_other = (need_lhs, need_rhs) if by_row else (need_rhs, need_lhs)
    g, norm = normalized(lhs.dtype, g_row, g_col, g_positive)
    g_line = g[0] if by_row else g[1]
    assert g_line is not None
    tile = p.tile(backward=False, keep=True)
    step = tile.rows if by_row else tile.cols
    stored = torch.float32 if INTERPRETED else lhs.dtype  # the interpreter's bfloat16 rounding is faulty
    chunk = whole_lines(len(own), len(other), step, stored.itemsize)
    pitch = round_up(p.m if by_row else chunk, 64)
    workspace = lhs.new_empty((chunk if by_row else p.n, pitch), dtype=stored)
    with_own = need_own or (need_scale and not need_other)
    d_own = torch.zeros_like(own, dtype=torch.float32) if with_own else None
    d_other = torch.zeros_like(other, dtype=torch.float32) if need_other else None

    line2 = own.new_empty(len(own), dtype=torch.float64)
    positive = lhs.new_zeros((p.n, p.n_labels), dtype=torch.float32)
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) for x in (own, other)]
    reference = p.scale[0].abs() * norms[0] * norms[1].max() - HEADROOM
    with on_device(lhs):
        for lines in slices(len(own), chunk):
            rows, cols = (lines, slice(0, p.m)) if by_row else (slice(0, p.n), lines)
            kept = workspace[: rows.stop - rows.start, : cols.stop - cols.start]
            negatives2, used = kept_exponentials(p, rows, cols, by_row, kept, pitch, positive, reference[lines])
            positive2 = positive.to(torch.float64)
            if by_row:
                of_positives = positives_by_row(None if labels is None else labels[lines], positive2[lines])
            else:
                of_positives = positives_by_column(labels, positive2, p.m)[lines]
            line2[lines] = torch.logaddexp2(negatives2, of_positives)
            gain = g_line[lines] * torch.exp2(used.to(torch.float64) - line2[lines])
            gain = torch.where(negatives2 == -math.inf, 0.0, gain).to(torch.float32)[:, None]
            kept = kept.to(lhs.dtype) if by_row else kept.to(lhs.dtype).t()
            if d_own is not None:
                add_product(d_own[lines], kept, other)
                d_own[lines] *= gain
            if d_other is not None:
                add_product(d_other, kept.t(), (own[lines] * gain).to(own.dtype))

    line, positive = line2.mul_(LN2), positive.to(torch.float64).mul_(LN2)
    row, col = (line, line.new_empty(0)) if by_row else (line.new_empty(0), line)
    d_lhs, d_rhs = (d_own, d_other) if by_row else (d_other, d_own)
    entry = positive_entries(labels, row if by_row else None, None if by_row else col, positive, *g)
    add_positives(entry.masked_fill_(distinct_positives(labels, positive) == -math.inf, 0.0), labels, p, d_lhs, d_rhs)
    dscale = logit_scale.new_empty(())
    if need_scale:
        product, side = (d_lhs, p.lhs) if d_lhs is not None else (d_rhs, p.rhs)
        assert product is not None
        dscale = inner_product(product, side)
        dscale = (dscale if norm is None else dscale * norm).to(logit_scale)
    outer = logit_scale if norm is None else logit_scale * norm.to(logit_scale)

    def finished(gradient: Tensor | None, needed: bool) -> Tensor:
        if gradient is None or not needed:
            return lhs.new_empty(0)
        return gradient.mul_(outer)[:, : p.d].to(lhs.dtype, memory_format=torch.contiguous_format)

    return (
        row, col, positive, finished(d_lhs, need_lhs), finished(d_rhs, need_rhs),
        dscale if need_scale else logit_scale.new_empty(0),
    )  # fmt: skip


def kept_exponentials(
    p: Problem,
    rows: slice,
    cols: slice,
    by_row: bool,
    kept: Tensor,
    pitch: int,
    positive: Tensor,
    reference: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fills ``kept`` with a chunk's exponentials. Returns (base-2 logsumexp of each line's negatives, references in use)."""
    tile = p.tile(backward=False, keep=True)
    lines = rows.stop - rows.start if by_row else cols.stop - cols.start
    across = cdiv(p.m, tile.cols) if by_row else cdiv(p.n, tile.rows)
    parts = reference.new_empty((2, across * lines))

    def fill(reference: Tensor, skip: Tensor) -> Tensor:
        run(
            kernels.forward_tile,
            cdiv(kept.shape[0], tile.rows) * cdiv(kept.shape[1], tile.cols),
            **p.arguments(rows, cols, tile),
            p_row_top=parts[0],
            p_row_total=parts[1],
            p_col_top=parts[0],
            p_col_total=parts[1],
            p_positive=positive[rows],
            kept=p.block(kept, tile.rows, tile.stored_cols),
            p_reference=padded(reference, 0),
            p_skip=skip,
            kept_stride=pitch,
            WANT_ROW=by_row,
            WANT_COL=not by_row,
            KEEP=True,
            HALVES=tile.halves,
        )
        statistics = Statistics.of(reference, lines)
        statistics.merge(parts, across)
        return statistics.logsumexp2()

    negatives2 = fill(reference, torch.zeros((), dtype=torch.int32, device=kept.device))
    near = (negatives2 >= reference - HEADROOM) | (negatives2 == -math.inf)
    all_near = near.all()
    own = negatives2.to(torch.float32).masked_fill(negatives2 == -math.inf, 0.0)
    fill(own, all_near.to(torch.int32))  # leaves the statistics as they are
    return negatives2, torch.where(all_near, reference, own)


def add_positives(entry: Tensor, labels: Tensor | None, p: Problem, d_lhs: Tensor | None, d_rhs: Tensor | None) -> None:
    """What G's entries at the labels (N, P) add to both products, without the scale, in the same order every time."""
    entry = entry.to(torch.float32)
    for rows in slices(p.n, 4096):
        x = p.lhs[rows]
        for position in range(entry.shape[1]):
            share = entry[rows, position, None]
            if labels is None:
                if d_lhs is not None:
                    d_lhs[rows] += share * p.rhs[rows]
                if d_rhs is not None:
                    d_rhs[rows] += share * x
                continue
            column = labels[rows, position].clamp(min=0)
            if d_lhs is not None:
                d_lhs[rows] += share * p.rhs[column]
            if d_rhs is not None:
                d_rhs.index_put_((column,), share * x, accumulate=True)


def check_dtype_and_device(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected bfloat16, float16 or float32 for backend 'triton', got {str(x.dtype)[6:]}; "
            "backend 'torch' takes it"
        )
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{name}: expected a CUDA or HIP tensor for backend 'triton', got one on {x.device}; set TRITON_INTERPRET=1 "
            "before importing triton to run the kernels in its interpreter, or use backend 'torch'"
        )


@dataclass
class Problem:
    """The inputs as the kernels read them."""

    lhs: Tensor  # (N, D') operands, see ``operand``
    rhs: Tensor  # (M, D')
    d: int  # D before padding
    scale: Tensor  # (2,) float32, logit_scale * log2(e) and what rounding took from it
    labels: Tensor | None  # (N.., P) int32, ``padded``; None: row i's positive is column i
    lhs_ids: Tensor | None  # (K, N..) int32, ``compress_ids``
    rhs_ids: Tensor | None
    config: Config
    precision: str

    @classmethod
    def of(cls, lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, config: Config | None) -> Problem:
        check_dtype_and_device("lhs", lhs)
        precision = input_precision(lhs.dtype)
        if config is None:
            config = select(lhs.device, lhs.dtype, lhs.shape[1], precision)
        if labels is not None:
            labels = padded(labels.to(torch.int32), -1)
        if lhs_ids is not None and rhs_ids is not None:
            lhs_ids, rhs_ids = compress_ids(lhs_ids, rhs_ids)
        return cls(
            operand(lhs),
            operand(rhs),
            lhs.shape[1],
            high_and_low(logit_scale.to(torch.float64) * LOG2E),
            labels,
            lhs_ids,
            rhs_ids,
            config,
            precision,
        )

    @property
    def n(self) -> int:
        return self.lhs.shape[0]

    @property
    def m(self) -> int:
        return self.rhs.shape[0]

    @property
    def n_labels(self) -> int:
        return 1 if self.labels is None else self.labels.shape[1]

    def tile(self, backward: bool, keep: bool = False) -> Tile:
        return self.config.tile(backward, self.lhs_ids is not None or self.n_labels > 1, keep)

    def arguments(self, rows: slice, cols: slice, tile: Tile) -> dict[str, Any]:
        """What both tile kernels take, for a chunk. A tensor a kernel does not read is stood in for by ``scale``."""
        lhs, rhs = self.lhs[rows], self.rhs[cols]
        return {
            "lhs": self.block(lhs, tile.rows, tile.d),
            "rhs": self.block(rhs, tile.cols, tile.d),
            "p_scale": self.scale,
            "p_labels": self.scale if self.labels is None else self.labels[rows.start :],
            "p_lhs_ids": self.scale if self.lhs_ids is None else self.lhs_ids[:, rows.start :],
            "p_rhs_ids": self.scale if self.rhs_ids is None else self.rhs_ids[:, cols.start :],
            "n": lhs.shape[0],
            "m": rhs.shape[0],
            "d": lhs.shape[1],
            "lhs_stride": lhs.stride(0),
            "rhs_stride": rhs.stride(0),
            "lhs_ids_stride": 0 if self.lhs_ids is None else self.lhs_ids.stride(0),
            "rhs_ids_stride": 0 if self.rhs_ids is None else self.rhs_ids.stride(0),
            "shift": (rows.start if self.labels is None else 0) - cols.start,
            "LABELS": 0 if self.labels is None else self.labels.shape[1],
            "CHANNELS": 0 if self.lhs_ids is None else self.lhs_ids.shape[0],
            "WIDEN": INTERPRETED,
            "PRECISION": self.precision,
            "FULL_SCALE": lhs.dtype == torch.float32,
            **tile_constants(tile, self.config.descriptors, lhs.shape[1]),
        }

    def block(self, x: Tensor, rows: int, cols: int) -> Tensor | TensorDescriptor:
        """A matrix as the kernels take it: a descriptor of (rows, cols) blocks, or the tensor for its pointer."""
        return TensorDescriptor.from_tensor(x, [rows, cols]) if self.config.descriptors else x


def tile_constants(tile: Tile, descriptors: bool, d: int) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLS": tile.cols,
        "BLOCK_D": tile.d,
        "GROUP": tile.group,
        "DESCRIPTORS": descriptors,
        "WHOLE_D": d % tile.d == 0,
        "ONE_EXPONENTIAL": tile.one_exponential,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


class Statistics:
    """Running (max, sum) of some lines, base 2."""

    def __init__(self, top: Tensor, total: Tensor):
        self.top, self.total = top, total

    @classmethod
    def of(cls, like: Tensor, lines: int) -> Statistics:
        return cls(
            like.new_full((lines,), -math.inf, dtype=torch.float32), like.new_zeros((lines,), dtype=torch.float64)
        )

    def __getitem__(self, lines: slice) -> Statistics:
        return Statistics(self.top[lines], self.total[lines])

    def merge(self, parts: Tensor, tiles: int) -> None:
        """parts: (2, >= tiles * lines): tops and totals of each line in each tile, tile by tile."""
        lines = len(self.top)
        run(
            kernels.merge_partials,
            cdiv(lines, MERGE_LINES),
            p_part_top=parts[0],
            p_part_total=parts[1],
            p_top=self.top,
            p_total=self.total,
            n_lines=lines,
            n_tiles=tiles,
            BLOCK_TILES=MERGE_TILES,
            BLOCK_LINES=MERGE_LINES,
            num_warps=4,
        )

    def logsumexp2(self) -> Tensor:
        return self.total.log2().add_(self.top)


# The kernels read vectors in whole tiles, of any side up to this.
PAD = 256

# 32 lines are one 128-byte line of a partial; 32 tiles of them keep 8 loads a thread in flight.
MERGE_TILES, MERGE_LINES = 32, 32


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


def compress_ids(lhs_ids: Tensor, rhs_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(K, N) and (K, M) int32 that are equal exactly where the int64 ids are equal and not negative.

    A tile compares every row with every column: half the registers and half the instructions. The number that stands for an
    id is its position among all of its channel's ids, sorted.
    """
    left, right = lhs_ids.t().contiguous(), rhs_ids.t().contiguous()
    order = torch.cat([left, right], dim=1).sort(dim=1).values

    def position(ids: Tensor, absent: int) -> Tensor:
        found = torch.searchsorted(order, ids, out_int32=True).masked_fill_(ids < 0, absent)
        return padded(found.t(), absent).t().contiguous()

    return position(left, -1), position(right, -2)


def normalized(dtype: torch.dtype, *gradients: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
    """Upstream gradients in float64; for half precision divided by their largest magnitude, which is returned.

    The 1 / N that a mean leaves in G would be lost there: it is applied after the products.
    """
    g = [None if v is None else v.to(torch.float64) for v in gradients]
    known = [v.abs().max() for v in g if v is not None]
    if dtype == torch.float32 or not known:
        return g, None
    norm = torch.stack(known).max()
    norm = torch.where(norm > 0, norm, 1.0)
    if dtype == torch.float16:
        norm = norm / FLOAT16_LIFT
    return [None if v is None else v / norm for v in g], norm


def high_and_low(x: Tensor) -> Tensor:
    """A float64 number as the sum of two float32."""
    high = x.to(torch.float32)
    return torch.stack([high, (x - high).to(torch.float32)])


def padded(x: Tensor, value: float) -> Tensor:
    """A copy with rows of ``value`` added up to a multiple of PAD."""
    copy = x.new_full((round_up(len(x), PAD), *x.shape[1:]), value)
    copy[: len(x)] = x
    return copy


def packed(by_row: Line | None, by_col: Line | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(3, N..) and (3, M..) float32: reference, gain, and the factor that the one-exponential form needs; and its middle.

    The factors are exp2(r - middle) of a row and g exp2(middle - c) of a column. A line that is not there is empty.
    """
    known = [line.lse2.mean() for line in (by_row, by_col) if line is not None]
    middle = torch.stack(known).mean() if known else like.new_zeros((), dtype=torch.float64)
    lines = []
    for line, sign in ((by_row, 1), (by_col, -1)):
        if line is None:
            lines.append(like.new_empty((3, 0), dtype=torch.float32))
            continue
        factor = torch.exp2(sign * (line.lse2 - middle))
        factor = (factor if sign > 0 else line.g * factor).to(torch.float32)
        values = padded(torch.stack([line.reference, line.gain, factor], dim=1), 0).t().contiguous()
        values[0, len(factor) :] = -sign * math.inf  # neither the highest row nor the lowest column of its tile
        lines.append(values)
    return lines[0], lines[1], middle.to(torch.float32)


def input_precision(dtype: torch.dtype) -> str:
    """What float32 products are made of: ``torch.get_float32_matmul_precision()`` in Triton's words."""
    if dtype != torch.float32:
        return "ieee"  # has no meaning for half precision, whose products are exact
    on_hip = torch.version.hip is not None
    return {
        "highest": "ieee",
        "high": "bf16x3" if on_hip else "tf32x3",
        "medium": "bf16x3" if on_hip else "tf32",
    }[torch.get_float32_matmul_precision()]


def forward_chunk(n: int, m: int, tile: Tile, want_row: bool = True, want_col: bool = True) -> int:
    """Rows whose partial (max, sum) pairs, 8 bytes a line and tile, fill the budget; a multiple of the tile unless all."""
    bytes_a_row = 8 * cdiv(m, tile.cols) * want_row + 8 * cdiv(m, tile.rows) * want_col
    chunk = workspace_bytes() // max(bytes_a_row, 1) // tile.rows * tile.rows
    return min(max(chunk, tile.rows), n)


def whole_lines(lines: int, length: int, step: int, itemsize: int) -> int:
    """How many whole lines of exponentials are kept at a time."""
    return equal_parts(lines, max(workspace_bytes() // (itemsize * length), step), step)


def gradient_chunk(n: int, m: int, tile: Tile, itemsize: int) -> tuple[int, int]:
    """(rows, columns) of G made at a time: as square as the problem allows.

    A chunk's products read and write (rows + columns) x D accumulators in float32, which is least for a square. The parts of
    a side are equal up to one tile, so that none is a remnant too small to fill the chip.
    """
    budget = workspace_bytes() // itemsize
    rows = min(n, max(math.isqrt(budget), tile.rows))
    cols = min(m, max(budget // rows, tile.cols))
    rows = min(n, max(budget // cols, tile.rows))
    return equal_parts(n, rows, tile.rows), equal_parts(m, cols, tile.cols)


def equal_parts(length: int, largest_part: int, step: int) -> int:
    """Size of a part, a multiple of ``step`` unless the whole, such that no part is above ``largest_part`` (or one step)."""
    if length <= largest_part:
        return length
    largest_part = max(largest_part // step * step, step)
    return round_up(-(-length // -(-length // largest_part)), step)


def run(kernel: Any, programs: int, **arguments: Any) -> None:
    kernel[(programs,)](**arguments)


def cdiv(length: int, step: int) -> int:
    return -(-length // step)


def round_up(length: int, step: int) -> int:
    return -(-length // step) * step


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    way = half_precision_product(a.device.type, a.dtype)
    if way == "addmm":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif way == "mm":
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.addmm_(a.float(), b.float())


@cache
def half_precision_product(device: str, dtype: torch.dtype) -> str:
    """The best way this torch has on this device to add a half-precision product to a float32 matrix; versions do not say.

    "addmm" in one call; "mm" by way of a float32 product; "widen": by products of float32, right but slow.
    """
    total, x = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    for way in ("addmm", "mm"):
        try:
            if way == "addmm":
                torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
            else:
                torch.mm(x, x, out_dtype=torch.float32)
            return way
        except (RuntimeError, TypeError):  # no such overload, or not on this device, or not with a float32 total
            continue
    return "widen"


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> in float64, summed in float32 within a row."""
    return (a * b).sum(dim=1).sum(dtype=torch.float64)


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
