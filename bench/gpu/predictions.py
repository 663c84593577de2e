"""What the model says of every case of a session, before it is measured."""

from __future__ import annotations

from bench import roofline
from bench.gpu import cells
from bench.gpu.context import Result
from gcl_kernels.chips import Chip
from gcl_kernels.plan import Sizes


def predicted(chip: Chip) -> list[Result]:
    """One entry a case, as `roofline.predictions` writes it, and whether it is of a CUDA graph, in which no host is."""
    found = []
    for case in dict.fromkeys(case for step in cells.CALLS for case in cells.cases(step)):
        sizes = Sizes(case.n, case.m, case.d, case.dtype)
        found.append({**roofline.predictions(sizes, chip, case.loss), "graph": case.graph})
    return found
