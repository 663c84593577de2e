"""From the scores of a file to the scale of the loss and of the grades."""

from __future__ import annotations

from torch import Tensor

SCALINGS = ("linear", "log", "rank")


def spread(scores: Tensor, scaling: str) -> Tensor:
    """What is scaled linearly to 1..100 afterwards, by `ranking.minmax`: an increasing function of (N,) float64 scores >= 0.

    | scaling | of a score s |
    |---|---|
    | `"linear"` | s |
    | `"log"` | log(1 + s): for counts, as of clicks, most of which are far below the largest |
    | `"rank"` | its rank among all scores, equal scores sharing their mean rank: every grade is as frequent as ties allow |

    Every other name leaves the scores as they are.
    """
    if scaling == "log":
        return scores.log1p()
    if scaling == "rank":
        _, place, counts = scores.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        return (last - (counts - 1) / 2)[place]
    return scores
