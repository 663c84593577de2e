"""What a result file holds: a cell for each case and peer, and what may be read off it."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.cases import Case

Cell = dict[str, Any]

# A median above the least by more than this says what else the machine did. Such a cell is marked, and its ratio as well.
NOISY = 1.25


def name_of(peer: str) -> str:
    return NAMES.get(peer, peer)


NAMES = {
    "ours": "gcl_kernels",
    "open_clip": "open_clip.ClipLoss",
    "open_clip_compiled": "open_clip.ClipLoss, compiled",
    "dense": "the formula in PyTorch",
    "linear_cross_entropy": "F.linear_cross_entropy",
    "linear_cross_entropy_chunked": "F.linear_cross_entropy, chunked",
    "cut_cross_entropy": "cut-cross-entropy",
    "liger": "Liger",
    "inf_cl": "inf-cl",
    "sentence_transformers": "sentence-transformers",
    "memeff": "memeff",
    "siglip_kernel": "siglip-kernel",
}


def read(path: Path) -> dict[str, Any]:
    """The result file; no cells where there is none yet."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {"cells": []}


def case_of(cell: Cell) -> Case:
    return Case(**{name: cell[name] for name in Case.__dataclass_fields__ if name in cell})


def median(cell: Cell) -> float:
    return statistics.median(cell["seconds"])


def spread(cell: Cell) -> str:
    """Least and greatest of the turns over their median; of a step that was measured once, nothing."""
    if len(cell["seconds"]) == 1:
        return ""
    low, high = min(cell["seconds"]) / median(cell), max(cell["seconds"]) / median(cell)
    return f"{low - 1:+.0%} {high - 1:+.0%}"


def rate(cell: Cell) -> str:
    """Of the GEMM's; a step that was measured once has none, having had no turn beside one."""
    return f"{cell['of_gemm']:.0%}" if "of_gemm" in cell else ""


def least(cell: Cell) -> float:
    return min(cell["seconds"])


def noisy(cell: Cell) -> bool:
    return median(cell) > NOISY * least(cell)


def where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    chip = machine.get("gpu") or f"{threads} of {machine['cpu']} ({machine['capability']})"
    return f"{chip}, torch {machine['torch']}"


def grouped(cells: Iterable[Cell]) -> dict[Case, list[Cell]]:
    groups: dict[Case, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(case_of(cell), []).append(cell)
    return groups


def scaling(cells: Iterable[Cell]) -> list[Cell]:
    """The cells of the curve over N: those of the commonest shape otherwise."""
    cells = [
        c for c in cells if c["seconds"] and c["n"] == c["m"] and c["passes"] == "both" and c["directions"] == "both"
    ]
    names = ("d", "dtype", "fields", "ids", "draw", "logit_scale", "loss", "option")

    def key(cell: Cell) -> tuple:
        return tuple(getattr(case_of(cell), name) for name in names)

    if not cells:
        return []
    common = statistics.mode(key(c) for c in cells)
    return sorted((c for c in cells if key(c) == common), key=lambda c: c["n"])


def series(cells: Iterable[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """{(loss, dtype): cells over N}: the curve over N first, then those that differ from it in dtype and loss alone."""
    cells = list(cells)
    base = scaling(cells)
    if not base:
        return {}
    alike = ("d", "fields", "ids", "draw", "directions", "passes")
    found: dict[tuple[str, str], list[Cell]] = {(loss_of(base[0]), base[0]["dtype"]): base}
    for c in cells:
        key = loss_of(c), c["dtype"]
        same = all(c[k] == base[0][k] for k in alike) and c["n"] == c["m"] and not c.get("option") and c["seconds"]
        if same and key != next(iter(found)) and (key[0] == "sigmoid" or c["logit_scale"] == base[0]["logit_scale"]):
            found.setdefault(key, []).append(c)
    return {
        key: sorted(of_key, key=lambda c: c["n"])
        for key, of_key in found.items()
        if len({c["n"] for c in of_key}) > 1 or of_key is base
    }


def loss_of(cell: Cell) -> str:
    return cell.get("loss") or "softmax"


def drop_in(loss: str) -> str:
    """What open_clip calls it, and so does the library."""
    return {"softmax": "ClipLoss", "sigmoid": "SigLipLoss"}[loss]


WORTH_STORING = 64  # MiB: less varies from run to run


def falls_after(cells: Iterable[Cell]) -> int | None:
    """The N of a curve after which our extra memory falls though N grows: nothing is stored for the backward any more."""
    ours = [(c["n"], c["extra_mib"]) for c in cells if c["peer"] == "ours" and c.get("extra_mib")]
    return next((n for (n, a), (_, b) in itertools.pairwise(ours) if a >= WORTH_STORING and b < a / 2), None)
