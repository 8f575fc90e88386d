"""Paired comparisons of two methods on plain arrays.

Every method answers every row, so differences are taken row by row before anything is averaged: how hard a row is
cancels out, and far fewer rows tell two methods apart than separate averages would need.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coterie.errors import CoterieError

CONFIDENCE = 0.95
_DRAWS_AT_A_TIME = 2**21


class Interval(NamedTuple):
    """A difference to the control and the ends of its confidence interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    values: Sequence[float],
    control: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    resamples: int = 2000,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Return the mean paired difference and its percentile bootstrap interval (Efron and Tibshirani 1993, ch. 13).

    The estimator is sum(w * (values - control)) / sum(w), so with token counts as weights it is the difference of two
    micro-averages; each resample draws whole rows, and draws numerator and denominator together. Equal arguments give
    equal numbers. One row says nothing about how rows vary: its interval is (-inf, inf).

    Args:
        values: The method's value of each row, of shape (n,).
        control: The control's value of the same rows, of shape (n,).
        weights: What each row weighs, of shape (n,), all above zero; equal where None.
        resamples: How many times n rows are drawn with replacement.
        confidence: The share of such intervals that should hold the true difference.
        seed: Seed of the draws.

    Raises:
        CoterieError: There are no rows, the lengths differ, a number is not finite, or a weight is not above zero.
    """
    weights = [1.0] * len(values) if weights is None else weights
    if not len(values) == len(control) == len(weights):
        raise CoterieError(
            f"a paired comparison needs the same rows for both methods; got {len(values)} values, "
            f"{len(control)} of the control and {len(weights)} weights"
        )
    if not len(values):
        raise CoterieError("a paired comparison needs at least one row; got none")
    weight = np.asarray(weights, dtype=np.float64)
    weighted = weight * (np.asarray(values, dtype=np.float64) - np.asarray(control, dtype=np.float64))
    if not (np.isfinite(weighted).all() and (weight > 0).all()):
        raise CoterieError("a paired comparison needs finite values and weights above zero; look for NaN in the scores")
    difference = float(weighted.sum() / weight.sum())
    if len(values) == 1:
        return Interval(difference, -np.inf, np.inf)
    tail = (1 - confidence) / 2
    low, high = np.quantile(_resampled(weighted, weight, resamples, seed), [tail, 1 - tail])
    return Interval(difference, float(low), float(high))


def _resampled(weighted: np.ndarray, weight: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the estimator on each resample, of shape (resamples,), drawing a bounded number of rows at a time."""
    draw, count = np.random.default_rng(seed), len(weight)
    block = max(1, _DRAWS_AT_A_TIME // count)
    estimates = []
    for start in range(0, resamples, block):
        rows = draw.integers(count, size=(min(block, resamples - start), count))
        estimates.append(weighted[rows].sum(axis=1) / weight[rows].sum(axis=1))
    return np.concatenate(estimates)


def excludes_zero(interval: list[float] | None) -> bool:
    """Tell whether an interval is there and lies on one side of zero: the difference is significant."""
    return interval is not None and not interval[0] <= 0 <= interval[1]
