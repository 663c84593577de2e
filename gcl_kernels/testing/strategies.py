"""Hypothesis strategies of the problems in `drawn`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from .drawn import EDGE_DIMS, EDGE_SIZES, FieldProblem, PartsProblem, Problem


@st.composite
def problems(
    draw: st.DrawFn,
    sizes: Sequence[int] = EDGE_SIZES,
    dims: Sequence[int] = EDGE_DIMS,
    labels: bool = True,
    ids: bool = True,
    terms: bool = False,
    geometries: Sequence[str] = ("random", "paired", "clustered", "wide"),
    scales: Sequence[float] = (0.0, 1.0, 14.3, 100.0, -10.0),
) -> Problem:
    """Problems over shapes, labels, ids, limits, biases, scales, geometries and strides; restrict any of them by its argument.

    Args:
        draw: Hypothesis passes it.
        sizes: N and M are among these.
        dims: D is among these.
        labels: False: the default diagonal alone.
        ids: False: no ids.
        terms: True: limits and biases of columns, too.
        geometries: as `Problem.geometry`.
        scales: logit scales; `"wide"` takes those of at most 15 in size.
    """
    n, m = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    positives = draw(st.sampled_from((None, 0, 1, 3))) if labels else None
    if positives is None:
        n, m = min(n, m), max(n, m)
    geometry = draw(st.sampled_from(geometries))
    return Problem(
        n=n,
        m=m,
        d=draw(st.sampled_from(dims)),
        positives=positives,
        id_channels=draw(st.sampled_from((0, 1, 2))) if ids else 0,
        distinct_ids=draw(st.sampled_from((1, 2, 5, 1000))),
        logit_scale=draw(st.sampled_from([s for s in scales if geometry != "wide" or abs(s) <= 15])),
        geometry=geometry,
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        limits=terms and draw(st.booleans()),
        bias=terms and draw(st.booleans()),
    )


@st.composite
def field_problems(
    draw: st.DrawFn, sizes: Sequence[int] = (1, 2, 5, 17, 33), dims: Sequence[int] = (2, 7, 16, 33, 64, 100, 300)
) -> FieldProblem:
    """Problems over shapes, masks, switches and layouts.

    Args:
        draw: Hypothesis passes it.
        sizes: N is among these.
        dims: D is among these.
    """
    return FieldProblem(
        n=draw(st.sampled_from(sizes)),
        d=draw(st.sampled_from(dims)),
        n_fields=draw(st.integers(1, 8)),
        masked=draw(st.booleans()),
        normalize_fields=draw(st.booleans()),
        normalize=draw(st.booleans()),
        layout=draw(st.sampled_from(("rows", "apart", "transposed"))),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def parts_problems(
    draw: st.DrawFn, sizes: Sequence[int] = (1, 2, 5, 17, 33), dims: Sequence[int] = (2, 7, 16), alike: bool = False
) -> PartsProblem:
    """Problems of one to four parts.

    Args:
        draw: Hypothesis passes it.
        sizes: the parts' N are among these.
        dims: D is among these.
        alike: True: all parts have one N.
    """
    rows = draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=4))
    rows = rows[:1] * len(rows) if alike else rows
    letters = st.sets(st.sampled_from("wlLifp")).map(lambda x: "".join(sorted(x)))
    return PartsProblem(
        rows=tuple(rows),
        m=max(rows) + draw(st.sampled_from((0, 1, 20))),
        d=draw(st.sampled_from(dims)),
        kinds=tuple(draw(letters) for _ in rows),
        fields=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def loss_options() -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments of `gcl_loss` that do not depend on shapes."""
    return st.fixed_dictionaries(
        {
            "directions": st.sampled_from(("both", "lhs_to_rhs", "rhs_to_lhs")),
            "reduction": st.sampled_from(("mean", "weighted_mean", "sum", "none")),
            "label_smoothing": st.sampled_from((0.0, 0.1, 1.0)),
            "z_loss": st.sampled_from((0.0, 1e-3)),
        }
    )
