"""What the kernels over lines are launched with: statistics, what the backward's tiles read, gradients, a loss of lines."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunks import cdiv, round_up
from ..contract import Lines, Want
from .operands import PAD, contiguous
from .partials import MERGE_LINES, MERGE_TILES, Parts
from .run import run

BLOCK = 128  # lines of a program
ROWS, BLOCK_D = 8, 128  # of an inner product's program
ONE_PROGRAM = 1024  # numbers at a time of a sum by one program
BOTH = Want(row=True, col=True)


def finish(
    parts: tuple[Parts | None, Parts | None],
    tiles: tuple[int, int],
    joined: tuple[Tensor | None, Tensor | None],
    positive2: Tensor,
    m: int,
    *,
    given: Tensor | None,
    labels: Tensor | None = None,
    zero: Tensor | None = None,
    fixed: tuple[Tensor | None, Tensor | None] = (None, None),
    skip: Tensor | None = None,
    into: Lines | None = None,
) -> Lines:
    """Statistics of lines in natural units, float64, from partial sums and base-2 logits of positives that join them.

    `positive2` (N, P): logits of positives, base 2; `given`: their value in natural units where it is there already.
    `labels` (N, 1): columns of the positives, which otherwise are i. `zero`: logit_scale beside limits. `fixed` and `skip`: as
    `line_kernels.finish_lines` takes them. `into`: what is written again, unless skipped.
    """
    n = positive2.shape[0]
    if into is not None:
        row, col, positive = into
        assert positive is not None
    else:
        row, col = (
            None if x is None else positive2.new_empty(length, dtype=torch.float64)
            for x, length in zip(parts, (n, m), strict=True)
        )
        positive = positive2.new_empty(positive2.shape, dtype=torch.float64) if given is None else given
    run(
        "finish_lines",
        cdiv(n, MERGE_LINES) + (0 if col is None else cdiv(m, MERGE_LINES)),
        row_parts=parts[0],
        col_parts=parts[1],
        joined=joined,
        p_positive=positive2 if given is None else None,
        labels=None if labels is None else sorted_labels(labels, by_column=col is not None and joined[1] is not None),
        p_zero=zero,
        out=(row, col, positive if given is None else None),
        fixed=fixed,
        p_skip=skip,
        n=n,
        m=m,
        row_tiles=tiles[0],
        col_tiles=tiles[1],
        joined_cols=0 if joined[1] is None else joined[1].shape[0],
        BLOCK_TILES=MERGE_TILES,
        BLOCK_LINES=MERGE_LINES,
        num_warps=4,
    )
    return Lines(row, col, positive)


def pack(
    statistics: Lines,
    g: Lines,
    labels: Tensor | None,
    *,
    m: int,
    joined: bool,
    scale: Tensor | None,
    nonzero: bool,
    entries: bool,
    sides: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(row line, column line, entries of positives), which `backward_tile` reads.

    (4, N..) and (4, M..) float32: reference, gain, factor and extreme of each line. The factors are exp2(r - middle) of a row and
    g exp2(middle - c) of a column. The extreme of a row is the largest r - middle in its tile, that of a column the least
    c - middle in its own; `sides` are those of tiles. Both are what the one-exponential form needs, which is for both
    directions: for one there are neither. A direction that is not there is None. Where a row has several labels the caller makes
    the entries. `scale`: is multiplied into G; with `nonzero` a tiny number is, where it is 0 (`line_kernels.nonzero`).
    """
    positive = statistics.positive
    assert positive is not None
    n = positive.shape[0]
    by_row, by_col = g.row is not None and statistics.row is not None, g.col is not None and statistics.col is not None
    lengths = round_up(n, PAD), round_up(m, PAD)
    row_line, col_line = (
        positive.new_empty((4 if by_row and by_col else 2, length), dtype=torch.float32) if there else None
        for length, there in zip(lengths, (by_row, by_col), strict=True)
    )
    entry = positive.new_empty((lengths[0], 1), dtype=torch.float32) if entries else None
    upstream = (g.row if by_row else None, g.col if by_col else None, g.positive)
    run(
        "pack_lines",
        (lengths[0] + (lengths[1] if by_col else 0)) // PAD,
        lse=(contiguous(statistics.row) if by_row else None, contiguous(statistics.col) if by_col else None),
        p_positive=positive.contiguous(),
        p_labels=contiguous(labels) if entries else None,
        g=upstream,
        strides=tuple(0 if x is None else x.stride(0) for x in upstream),
        p_scale=scale,
        lines=(row_line, col_line),
        p_entry=entry,
        n=n,
        m=m,
        PAD=PAD,
        JOINED=joined,
        NONZERO=nonzero,
        SIDES=sides if by_row and by_col else (None, None),
        num_warps=4,
    )
    return row_line, col_line, entry


def sorted_labels(labels: Tensor, *, by_column: bool) -> tuple[Tensor, ...]:
    """Labels (N, 1) as kernels take them: (labels, sorted, the rows in this order), by which a column finds its rows; or alone.

    Rows of one label stay in their order, and sums over them have the same bits every time.
    """
    labels = labels.reshape(-1)
    return (labels, *labels.sort(stable=True)) if by_column else (labels,)


def scale_gradient(x: Tensor, y: Tensor, other: Tensor | None, scale: Tensor) -> Tensor:
    """<x, y> / scale, 0-d in the scale's dtype, of matrices (N, D) whose rows are contiguous.

    x and `other` (M, D) are gradients of the sides, made with `pack(nonzero=True)`; where the scale is 0 they become 0.
    """
    programs = cdiv(max(x.shape[0], 0 if other is None else other.shape[0]), ROWS)
    parts, out = x.new_empty(programs, dtype=torch.float64), torch.empty_like(scale)
    run(
        "inner_products",
        programs,
        p_x=x,
        p_y=y,
        p_other=other,
        strides=(x.stride(0), y.stride(0), 0 if other is None else other.stride(0)),
        p_scale=scale,
        p_parts=parts,
        n=x.shape[0],
        m=0 if other is None else other.shape[0],
        d=x.shape[1],
        ROWS=ROWS,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
    run("sum_parts", 1, p_parts=parts, p_scale=scale, p_out=out, n_parts=programs, BLOCK=ONE_PROGRAM, num_warps=4)
    return out


def sum_losses(
    lines: Lines, weights: Tensor | None, mean: bool, dtype: torch.dtype, labels: Tensor | None = None
) -> Tensor:
    """0-d `sum_i w_i ((row_i + col_{t_i}) / 2 - positive_i)`, or its mean over rows; `row_i` or `col_{t_i}` where one is None.

    `labels` (N, 1): t, -1 for none; None: `t_i = i`.
    """
    positive = lines.positive
    assert positive is not None
    out = positive.new_empty((), dtype=dtype)
    run(
        "sum_losses",
        1,
        lines=(lines.row, lines.col, positive),
        p_weight=weights,
        p_labels=contiguous(labels),
        p_out=out,
        n=positive.shape[0],
        MEAN=mean,
        BLOCK=ONE_PROGRAM,
        num_warps=4,
    )
    return out


def spread_gradient(
    g: Tensor, weights: Tensor | None, n: int, m: int, mean: bool, want: Want = BOTH, labels: Tensor | None = None
) -> Lines:
    """Of `sum_losses` with respect to lines, float64, from that with respect to its result."""
    row, col, positive = (
        g.new_empty(shape, dtype=torch.float64) if wanted else None
        for shape, wanted in (((n,), want.row), ((m,), want.col), ((n, 1), True))
    )
    run(
        "spread_gradient",
        cdiv(max(n, m) if want.col else n, BLOCK),
        p_g=g,
        p_weight=weights,
        labels=None if labels is None else sorted_labels(labels, by_column=want.col),
        out=(row, col, positive),
        n=n,
        m=m,
        MEAN=mean,
        BLOCK=BLOCK,
        BLOCK_ROWS=MERGE_TILES,
        num_warps=4,
    )
    return Lines(row, col, positive)
