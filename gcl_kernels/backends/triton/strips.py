"""What `strip_kernels` is launched with, and when: the forward of a large plane against one reference, down strips of columns.

The largest base-2 logit that the norms allow is a bound b. The reference r is 0 where b is at most 80, else b - 100. So an
exponential 2^(s2 - r) is at most 2^100, which leaves float32 room for a sum over millions. What falls below 2^-126 is flushed
to zero, and none of that matters to a line whose sum is at least 2^-80 (`base2.SMALLEST_SUM`): one that lies within 180 powers of
two, 124 nats, of the bound. Lines of unit vectors always do at a logit_scale of up to 62. Beyond that a line does not whose
cosines, its positives' excepted, are all below 1 - 124 / logit_scale: -0.24 at 100. `exact` says on the device whether
every line does; if one does not, `launch` makes the statistics again from each tile's own maximum.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import cdiv, rows_of_partials, slices
from ..contract import Lines, Want
from . import lines
from .config import Strips
from .operands import Operands
from .partials import Statistics
from .run import run

UNSHIFTED, HEADROOM = (
    80.0,
    100.0,
)  # powers of two: the largest b whose reference is 0; of any other, how far it lies below b

NORM_ROWS, NORM_D = 32, 128  # of a program's rows at a time

# Row tiles of a segment. At most: their column sums are added up in float32, one after the other. At least, where it is up to a
# chunk's height: a segment has one partial sum for each of its columns.
LONGEST, SHORTEST = 64, 4

# Time of a segment beside its tiles, in tiles: the first loads, and the exchange of column sums.
SEGMENT_OVERHEAD = 0.25


def pay(x: Operands, want: Want) -> bool:
    """Whether the plane is of the kind that strips are for, and large enough: shapes and the configuration decide."""
    strips = x.config.strips
    if strips is None or not want.both or x.labels is not None or any(term is not None for term in x.terms):
        return False
    return strips.pay(x.n, x.m)


def rows_of_sums(n: int, m: int, strips: Strips) -> int:
    """Rows of a chunk, whose partial sums respect the budget."""
    return rows_of_partials(n, m, (SHORTEST * strips.tile.rows, strips.tile.cols), True, True, itemsize=4)


class Cut(NamedTuple):
    """How a chunk of rows is cut."""

    segment: int  # row tiles of a segment of a strip
    segments: int  # of each whole strip
    slots: int  # partial sums of a column
    programs: int

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, n: int, m: int, strips: Strips) -> Cut:
        (row_tiles, ragged_rows), (n_strips, ragged_cols) = divmod(n, strips.tile.rows), divmod(m, strips.tile.cols)

        def duration(segment: int) -> float:
            waves = cdiv(n_strips * cdiv(row_tiles, segment), strips.resident)
            return waves * (segment + SEGMENT_OVERHEAD)

        segment = min(range(1, min(max(row_tiles, 1), LONGEST) + 1), key=duration)
        segments = cdiv(row_tiles, segment)
        of_whole_strips = segments + 1 + (ragged_rows > 0)
        programs = n_strips * of_whole_strips + (of_whole_strips if ragged_cols else 0)
        return cls(segment, segments, of_whole_strips, programs)


def forward(x: Operands, positive: Tensor, joined: bool) -> tuple[Lines, Tensor]:
    """Statistics, and 0-d int32 `exact`: 1, or 0 where they have to be made again. Writes the positives' logits."""
    strips = x.config.strips
    assert strips is not None
    tile = strips.tile
    reference, exact = reference_of(x)
    chunk = rows_of_sums(x.n, x.m, strips)
    cuts = {rows.start: Cut.of(rows.stop - rows.start, x.m, strips) for rows in slices(x.n, chunk)}
    several = chunk < x.n
    row, col = (Statistics.of(x.lhs, k, tops=False) if several else None for k in (x.n, x.m))
    strips_of_row, slots = cdiv(x.m, tile.cols), max(cut.slots for cut in cuts.values())
    row_sums, col_sums = ((x.lhs.new_empty(k, dtype=torch.float32),) for k in (strips_of_row * chunk, slots * x.m))
    for rows in slices(x.n, chunk):
        cut = cuts[rows.start]
        run(
            "forward_strips",
            cut.programs,
            **x.arguments(rows, slice(0, x.m), tile),
            p_positive=positive[rows],
            p_reference=reference,
            out=(*row_sums, *col_sums),
            segment=cut.segment,
            segments=cut.segments,
            slots=cut.slots,
            FOLD=strips.fold,
            APART=strips.apart,
            FLATTEN=x.config.descriptors,
        )
        if row is not None and col is not None:
            row[rows].merge(row_sums, strips_of_row)
            col.merge(col_sums, cut.slots)
    if row is not None and col is not None:
        row_sums, col_sums, strips_of_row, slots = row.parts, col.parts, 1, 1
    made = lines.finish(
        (row_sums, col_sums),
        (strips_of_row, slots),
        (positive, positive) if joined else (None, None),
        positive,
        x.m,
        given=None,
        fixed=(reference, exact),
    )
    return made, exact


def reference_of(x: Operands) -> tuple[Tensor, Tensor]:
    """(0-d float32 reference, 0-d int32 1 for `exact`)."""
    n_lhs, n_rhs = cdiv(x.n, NORM_ROWS), cdiv(x.m, NORM_ROWS)
    norms, reference = (x.lhs.new_empty(shape, dtype=torch.float32) for shape in ((n_lhs + n_rhs,), ()))
    exact = x.lhs.new_empty((), dtype=torch.int32)
    run(
        "largest_norms",
        n_lhs + n_rhs,
        p_lhs=x.lhs,
        p_rhs=x.rhs,
        strides=(x.lhs.stride(0), x.rhs.stride(0)),
        p_norms=norms,
        n=x.n,
        m=x.m,
        d=x.lhs.shape[1],
        ROWS=NORM_ROWS,
        BLOCK_D=NORM_D,
        num_warps=4,
    )
    run(
        "one_reference",
        1,
        p_norms=norms,
        p_scale=x.scale[0],
        p_reference=reference,
        p_exact=exact,
        n_lhs=n_lhs,
        n_rhs=n_rhs,
        UNSHIFTED=UNSHIFTED,
        HEADROOM=HEADROOM,
        BLOCK=lines.ONE_PROGRAM,
        num_warps=4,
    )
    return reference, exact
