"""From ranking scores to pair weights (GCL's score-to-weight functions), by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .validation import check_choice, may_read

ScoreToWeight = Callable[[Tensor], Tensor]

NAMES = ("constant", "linear", "inverse", "inverse_sqrt", "log", "piecewise")
NORMALIZE = (None, "mean")


def score_to_weight(
    function: str | ScoreToWeight,
    *,
    s_max: float = 100.0,
    knots: Sequence[tuple[float, float]] | None = None,
    normalize: str | None = None,
) -> Callable[..., Tensor]:
    """A function ``weights_of(scores, labelled=None)`` from scores (N,) or (N, P) to weights of the same shape.

    Weights are float32 (float64 for float64 scores). Where the bool tensor ``labelled`` is False the score is not looked at
    and the weight is 0.

    | name | w(s) | range over s = 1 .. s_max |
    |---|---|---|
    | ``"constant"`` | 1: plain CLIP | 1 |
    | ``"linear"`` | s | 1 .. s_max |
    | ``"inverse"`` | s_max / (s_max - s + 1) | 1 .. s_max |
    | ``"inverse_sqrt"`` | s_max / sqrt(s_max - s + 1) | sqrt(s_max) .. s_max |
    | ``"log"`` | log(1 + s) | 0.69 .. log(1 + s_max) |
    | ``"piecewise"`` | linear interpolation through ``knots`` | the knots' weights |

    Args:
        function: one of the names, or any callable from scores to weights, used as given.
        s_max: the highest score; the GCL paper ranks from 1 (last) to 100 (first).
        knots: for ``"piecewise"``: (score, weight) pairs with increasing scores from <= 1 to >= s_max and weights >= 0.
        normalize: ``"mean"`` divides by the batch's mean weight, so that the learning rate keeps its meaning whatever the
            function; None (default) leaves the weights as they are.

    Raises (when called, on CPU tensors; elsewhere with ``GCL_KERNELS_DEBUG=1``):
        ValueError: a score that is NaN or outside [1, s_max]. ``constant`` and callables take any score.

    Source: the inverse square root is the best function of the GCL paper (arXiv 2404.08535).
    """
    if not isinstance(s_max, (int, float)) or not (math.isfinite(s_max) and s_max >= 1):
        raise ValueError(f"s_max: expected a finite number >= 1, got {s_max!r}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize: expected None or 'mean', got {normalize!r}")
    if callable(function):
        weigh, ranged = function, False
    else:
        check_choice("score_to_weight", function, NAMES)
        if (knots is not None) != (function == "piecewise"):
            raise ValueError(f"knots: expected with 'piecewise' and only there, got {knots!r} with {function!r}")
        ranged = function != "constant"
        if function == "piecewise":
            weigh = _piecewise(knots or (), s_max)
        else:
            weigh = {
                "constant": torch.ones_like,
                "linear": lambda s: s,
                "inverse": lambda s: s_max / (s_max - s + 1),
                "inverse_sqrt": lambda s: s_max * torch.rsqrt(s_max - s + 1),
                "log": torch.log1p,
            }[function]

    def weights_of(scores: Tensor, labelled: Tensor | None = None) -> Tensor:
        if not isinstance(scores, Tensor):
            raise TypeError(f"scores: expected a torch.Tensor, got {type(scores).__name__}")
        scores = scores if scores.dtype == torch.float64 else scores.to(torch.float32)
        if labelled is not None:
            scores = torch.where(labelled, scores, 1.0)  # a score every function takes
        if ranged and may_read(scores):
            bad = ~((scores >= 1) & (scores <= s_max))
            if bool(bad.any()):
                raise ValueError(
                    f"scores: expected numbers in [1, {s_max:g}] for {function!r}, got {scores[bad][0].item():g} "
                    f"({int(bad.sum())} such)"
                )
        weights = weigh(scores)
        count = scores.numel()
        if labelled is not None:
            weights, count = torch.where(labelled, weights, 0.0), labelled.sum().clamp(min=1)
        if normalize is None:
            return weights
        total = weights.sum()
        return weights * torch.where(total > 0, count / total, 1.0)

    return weights_of


def _piecewise(knots: Sequence[tuple[float, float]], s_max: float) -> ScoreToWeight:
    xs, ys = [float(x) for x, _ in knots], [float(y) for _, y in knots]
    increasing = all(a < b for a, b in itertools.pairwise(xs))
    if len(xs) < 2 or not increasing or xs[0] > 1 or xs[-1] < s_max or not all(0 <= y < math.inf for y in ys):
        raise ValueError(
            f"knots: expected two or more (score, weight) pairs, scores increasing from <= 1 to >= {s_max:g}, weights >= 0, "
            f"got {list(knots)}"
        )

    def interpolate(scores: Tensor) -> Tensor:
        x, y = scores.new_tensor(xs), scores.new_tensor(ys)
        right = torch.searchsorted(x, scores.contiguous()).clamp(1, len(xs) - 1)
        x0, x1, y0, y1 = x[right - 1], x[right], y[right - 1], y[right]
        return y0 + (y1 - y0) * (scores - x0) / (x1 - x0)

    return interpolate
