"""A row of a file, as every reader of rows yields it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row, or the fault in its place.

    Args:
        where: the file and the line, row or sample, in words.
        cells: `{column: value}` for each column that is asked for; of no meaning where there is a fault.
        fault: what is wrong with the row; a fault of the file beyond its last row counts as one.
        folder: what relative image paths start from.
        place: the row's first byte and their number in the file itself, where it can be read again.
    """

    where: str
    cells: Mapping[str, Any]
    fault: str | None
    folder: str
    place: tuple[int, int] | None = None
