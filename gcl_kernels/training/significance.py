"""How sure a mean over queries is: bootstrap intervals and a paired test between two runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Values = Sequence[float] | np.ndarray

RESAMPLES = 9999
"""Random resamples or sign assignments; an exact p-value is taken where fewer exist."""


def bootstrap_interval(values: Values, *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of (Q,) values, resampling queries (Efron and Tibshirani, 1993).

    A single value, or equal ones, are their own interval.
    """
    from scipy.stats import bootstrap

    # Resamples are drawn by place: sorted, the values give the same interval in whatever order they come.
    array = np.sort(np.asarray(values, dtype=np.float64))
    if len(array) == 0:
        raise ValueError("values: expected at least one, got none")
    if np.ptp(array) == 0:
        return float(array[0]), float(array[0])
    result = bootstrap(
        (array,), np.mean, confidence_level=confidence, n_resamples=RESAMPLES, method="percentile", batch=500,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_test(ours: Values, theirs: Values, *, seed: int = 0) -> float:
    """Two-sided p-value of Fisher's randomisation test on the paired differences of (Q,) values.

    The chance that the mean difference is as far from 0, were the sign of each query's difference random: the test that
    Smucker, Allan and Carterette (CIKM 2007) recommend for retrieval. Runs that are the same on every query give 1.
    """
    from scipy.stats import permutation_test

    difference = np.sort(np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64))
    if len(difference) < 2 or not difference.any():
        return 1.0
    result = permutation_test(
        (difference,), lambda d, axis: d.mean(axis=axis), permutation_type="samples", n_resamples=RESAMPLES,
        vectorized=True, batch=500, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)
