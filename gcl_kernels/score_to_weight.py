"""From ranking scores to pair weights (GCL's score-to-weight functions), by name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .types import SCORE_TO_WEIGHT_NAMES, ScoreToWeightName, WeightNormalization
from .validation import check_choice, may_read

ScoreToWeight = Callable[[Tensor], Tensor]
Knots = Sequence[tuple[float, float]]


def score_to_weight(
    function: ScoreToWeightName | ScoreToWeight,
    *,
    s_max: float = 100.0,
    knots: Knots | None = None,
    normalize: WeightNormalization | None = None,
    score_range: tuple[float, float] | None = None,
) -> WeightsOfScores:
    """A function `weights_of(scores, labelled=None)` from scores (N,) or (N, P) to weights of the same shape.

    Weights are float32 (float64 for float64 scores). Where the bool tensor `labelled` is False the score is not looked at
    and the weight is 0. The function can be compared, copied, pickled and sent to another process, if a callable given to it can.

    | name | w(s) | range over s = 1 .. s_max |
    |---|---|---|
    | `"constant"` | 1: plain CLIP | 1 |
    | `"linear"` | s | 1 .. s_max |
    | `"inverse"` | s_max / (s_max - s + 1) | 1 .. s_max |
    | `"inverse_sqrt"` | s_max / sqrt(s_max - s + 1) | sqrt(s_max) .. s_max |
    | `"log"` | log(1 + s) | 0.69 .. log(1 + s_max) |
    | `"piecewise"` | linear interpolation through `knots` | the knots' weights |

    Args:
        function: one of the names, or any callable from scores to weights, used as given.
        s_max: the highest score; the GCL paper ranks from 1 (last) to 100 (first).
        knots: for `"piecewise"`: (score, weight) pairs with increasing scores from <= 1 to >= s_max (the ends of `score_range`,
            if given) and weights >= 0.
        normalize: `"mean"` divides by the batch's mean weight, so that the learning rate keeps its meaning whatever the
            function; None (default) leaves the weights as they are.
        score_range: (lowest, highest) of scores in another unit, such as (0, 1) for similarities and (0, 3) for grades: a
            score s becomes `1 + (s_max - 1) (s - lowest) / (highest - lowest)` before the function sees it. The knots of
            `"piecewise"` stay in the scores' own unit. None (default): scores are in [1, s_max] already.

    Raises:
        ValueError: an option that is wrong. When the result is called, on CPU tensors and elsewhere with `GCL_KERNELS_DEBUG=1`: a
            score that is NaN or outside [1, s_max], or outside `score_range`. `constant` and callables take any score, as it is.

    Source: the inverse square root is the best function of the GCL paper (arXiv 2404.08535).
    """
    knots = None if knots is None else tuple((x, y) for x, y in knots)
    score_range = None if score_range is None else _as_range(score_range)
    return WeightsOfScores(function, s_max, knots, normalize, score_range)


@dataclass(frozen=True, repr=False)
class WeightsOfScores:
    """What `score_to_weight` returns."""

    function: ScoreToWeightName | ScoreToWeight
    s_max: float = 100.0
    knots: tuple[tuple[float, float], ...] | None = None
    normalize: WeightNormalization | None = None
    score_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.s_max, (int, float)) or not (math.isfinite(self.s_max) and self.s_max >= 1):
            raise ValueError(f"s_max: expected a finite number >= 1, got {self.s_max!r}")
        if self.normalize not in (None, "mean"):
            raise ValueError(f"normalize: expected None or 'mean', got {self.normalize!r}")
        if callable(self.function):
            return
        check_choice("score_to_weight", self.function, SCORE_TO_WEIGHT_NAMES)
        if (self.knots is not None) != (self.function == "piecewise"):
            raise ValueError(
                f"knots: expected with 'piecewise' and only there, got {self.knots!r} with {self.function!r}"
            )
        if self.knots is not None:
            _check_knots(self.knots, *self._range)

    @property
    def _range(self) -> tuple[float, float]:
        return (1.0, self.s_max) if self.score_range is None else self.score_range

    def __call__(self, scores: Tensor, labelled: Tensor | None = None) -> Tensor:
        weights = self.not_normalized(scores, labelled)
        if self.normalize is None:
            return weights
        total = weights.sum()
        count = scores.numel() if labelled is None else labelled.sum().clamp(min=1)
        return weights * torch.where(total > 0, count / total, 1.0)

    def not_normalized(self, scores: Tensor, labelled: Tensor | None = None) -> Tensor:
        """The weights before they are divided by their mean."""
        if not isinstance(scores, Tensor):
            raise TypeError(f"scores: expected a torch.Tensor, got {type(scores).__name__}")
        scores = scores if scores.dtype == torch.float64 else scores.to(torch.float32)
        if labelled is not None:
            scores = torch.where(labelled, scores, self._range[0])  # a score every function takes
        if not callable(self.function) and self.function != "constant":
            low, high = self._range
            if may_read(scores):
                bad = ~((scores >= low) & (scores <= high))
                if bool(bad.any()):
                    raise ValueError(
                        f"scores: expected numbers in [{low:g}, {high:g}] for {self.function!r}, got "
                        f"{scores[bad][0].item():g} ({int(bad.sum())} such)" + self._hint
                    )
            if self.score_range is not None and self.function != "piecewise":
                scores = 1 + (scores - low) * ((self.s_max - 1) / (high - low))
        weights = self._apply(scores)
        return weights if labelled is None else torch.where(labelled, weights, 0.0)

    @property
    def _hint(self) -> str:
        return "" if self.score_range is not None else ". Scores in another unit need score_range=(lowest, highest)"

    def _apply(self, s: Tensor) -> Tensor:
        if callable(self.function):
            return self.function(s)
        if self.function == "constant":
            return torch.ones_like(s)
        if self.function == "linear":
            return s
        if self.function == "inverse":
            return self.s_max / (self.s_max - s + 1)
        if self.function == "inverse_sqrt":
            return self.s_max * torch.rsqrt(self.s_max - s + 1)
        if self.function == "log":
            return torch.log1p(s)
        return _interpolate(s, self.knots or ())

    def __repr__(self) -> str:
        """The call that makes it; options that have their default are left out."""
        options = {field.name: (getattr(self, field.name), field.default) for field in fields(self)[1:]}
        shown = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return f"score_to_weight({', '.join([repr(self.function), *shown])})"


def _as_range(given: object) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in given)  # pyright: ignore[reportGeneralTypeIssues]  # what is no pair is refused here
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"score_range: expected two finite numbers, the lowest score before the highest, got {given!r}"
        )
    return low, high


def _check_knots(knots: Knots, low: float, high: float) -> None:
    xs, ys = [float(x) for x, _ in knots], [float(y) for _, y in knots]
    increasing = all(a < b for a, b in itertools.pairwise(xs))
    if len(xs) < 2 or not increasing or xs[0] > low or xs[-1] < high or not all(0 <= y < math.inf for y in ys):
        raise ValueError(
            f"knots: expected two or more (score, weight) pairs, scores increasing from <= {low:g} to >= {high:g}, "
            f"weights >= 0, got {list(knots)}"
        )


def _interpolate(scores: Tensor, knots: Knots) -> Tensor:
    x, y = scores.new_tensor([x for x, _ in knots]), scores.new_tensor([y for _, y in knots])
    right = torch.searchsorted(x, scores.contiguous()).clamp(1, len(knots) - 1)
    x0, x1, y0, y1 = x[right - 1], x[right], y[right - 1], y[right]
    return y0 + (y1 - y0) * (scores - x0) / (x1 - x0)
