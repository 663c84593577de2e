"""How the N x M plane is cut into chunks that respect the workspace budget: integer arithmetic of both backends."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .settings import current, workspace_bytes

# Rows of a chunk of G start on a line of 128 bytes: so many numbers of two bytes.
LINE = 64


def slices(length: int, step: int) -> Iterator[slice]:
    starts = range(0, length, step)
    if current().few_chunks and len(starts) > 3:
        starts = (starts[0], starts[1], starts[-1])
    return (slice(start, min(start + step, length)) for start in starts)


def cdiv(length: int, step: int) -> int:
    return -(-length // step)


def round_up(length: int, step: int) -> int:
    return cdiv(length, step) * step


def equal_parts(length: int, largest_part: int, step: int) -> int:
    """Size of a part, a multiple of `step` unless the whole, such that no part is above `largest_part` (or one step)."""
    if length <= largest_part:
        return length
    largest_part = max(largest_part // step * step, step)
    return round_up(cdiv(length, cdiv(length, largest_part)), step)


def rows_of_partials(n: int, m: int, tile: tuple[int, int], want_row: bool, want_col: bool, itemsize: int = 8) -> int:
    """Rows whose partial (max, sum) pairs, 8 bytes a line and tile, fill the budget; a multiple of the tile unless all."""
    bytes_a_row = itemsize * (cdiv(m, tile[1]) * want_row + cdiv(m, tile[0]) * want_col)
    chunk = workspace_bytes() // max(bytes_a_row, 1) // tile[0] * tile[0]
    return min(max(chunk, tile[0]), n)


def whole_lines(lines: int, length: int, step: int, itemsize: int) -> int:
    """How many whole lines of exponentials are kept at a time."""
    return equal_parts(lines, max(workspace_bytes() // (itemsize * length), step), step)


def chunk_of_gradient(n: int, m: int, tile: tuple[int, int], itemsize: int) -> tuple[int, int]:
    """(rows, columns) of G made at a time: as square as the problem allows.

    A chunk's products read and write (rows + columns) x D accumulators in float32, which is least for a square. The parts of
    a side are equal up to one tile, so that none is a remnant too small to fill the chip.
    """
    budget = workspace_bytes() // itemsize
    rows = min(n, max(math.isqrt(budget), tile[0]))
    cols = min(m, max(budget // rows, tile[1]))
    rows = min(n, max(budget // round_up(cols, LINE), tile[0]))
    return equal_parts(n, rows, tile[0]), equal_parts(m, cols, tile[1])
