"""Tests and intervals on plain arrays: paired comparisons of two methods, and what many comparisons at once ask for.

Every method answers every row, so differences are taken row by row before anything is averaged: how hard a row is
cancels out, and far fewer rows tell two methods apart than separate averages would need.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from coterie.errors import CoterieError

CONFIDENCE = 0.95
FLIPS = 9999
_DRAWS_AT_A_TIME = 2**21
_ROUNDING = 1e-12  # two sums of the same numbers in another order differ by less than this share of their sizes


class Interval(NamedTuple):
    """A value, such as a difference to the control, and the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends; None where the rows say nothing about them."""
        return (self.low, self.high) if math.isfinite(self.low) else None


def mean_difference(
    values: Sequence[float],
    control: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Return the mean paired difference and its jackknife interval (Tukey 1958, Ann. Math. Statist. 29).

    The estimator is sum(w * (values - control)) / sum(w), so with token counts as weights it is the difference of two
    micro-averages. Its error is what leaving out one row after the other changes, times Student's t for as many rows as
    the weights are worth (Kish 1965: sum(w)^2 / sum(w^2)); with equal weights that is Student's interval. Rows that all
    differ alike, or are one, say nothing about how rows vary: the interval is (-inf, inf).

    Args:
        values: The method's value of each row, of shape (n,).
        control: The control's value of the same rows, of shape (n,).
        weights: What each row weighs, of shape (n,), all above zero; equal where None.
        confidence: The share of such intervals that should hold the true difference.

    Raises:
        CoterieError: There are no rows, the lengths differ, a number is not finite, or a weight is not above zero.
    """
    from scipy.special import stdtrit

    weighted, weight = _paired(values, control, weights)
    total = float(weight.sum())
    found = float(weighted.sum()) / total
    apart = weighted - found * weight
    if len(weight) == 1 or np.abs(apart).max() <= _ROUNDING * max(np.abs(weighted).max(), abs(found) * weight.max()):
        return Interval(found, -math.inf, math.inf)
    without = apart / (total - weight)  # how far the estimate moves where a row is left out
    error = math.sqrt((1 - 1 / len(weight)) * float(np.square(without - without.mean()).sum()))
    worth = total**2 / float(np.square(weight).sum())
    reach = error * float(stdtrit(worth - 1, (1 + confidence) / 2))
    return Interval(found, found - reach, found + reach)


def accuracy_difference(own: Sequence[bool], control: Sequence[bool], confidence: float = CONFIDENCE) -> Interval:
    """Return the paired difference of two accuracies and its score interval (Tango 1998, Statist. Med. 17).

    The interval holds every difference that McNemar's score test would not refuse. It has a width even where the two
    agree on all rows, which a resampling of the rows cannot give it.

    Args:
        own: Whether the method is right on each row, of shape (n,).
        control: Whether the control is right on the same rows, of shape (n,).
        confidence: The share of such intervals that should hold the true difference.

    Raises:
        CoterieError: There are no rows, or the lengths differ.
    """
    from scipy.optimize import root_scalar
    from scipy.special import ndtri

    gaps, _ = _paired([*map(float, own)], [*map(float, control)], None)
    n, gained, lost = len(gaps), int((gaps > 0).sum()), int((gaps < 0).sum())
    found, reach = (gained - lost) / n, float(ndtri((1 + confidence) / 2))

    def score(gap: float) -> float:
        """How many standard errors the rows are from a true difference, whose rate of losses fits them best."""
        middle = (2 * n - gained + lost) * gap - gained - lost
        rate = (math.sqrt(max(middle**2 + 8 * n * lost * gap * (1 - gap), 0.0)) - middle) / (4 * n)
        above = gained - lost - n * gap
        return above / math.sqrt(n * (2 * rate + gap * (1 - gap))) if above else 0.0

    edge = 1 - 1e-9  # at a difference of 1 the standard error is none
    low = -1.0 if found == -1 else float(root_scalar(lambda gap: score(gap) - reach, bracket=(-edge, found)).root)
    high = 1.0 if found == 1 else float(root_scalar(lambda gap: score(gap) + reach, bracket=(found, edge)).root)
    return Interval(found, low, high)


def rows_to_see(own: Sequence[bool], control: Sequence[bool], gap: float = 0.05, power: float = 0.8) -> int:
    """Return from about how many rows on McNemar's test would show a difference of `gap` (Connor 1987, Biometrics 43).

    That depends on how many rows only one of the two has right; these rows tell it, and it is `gap` at the least.

    Args:
        own: Whether the method is right on each row, of shape (n,), n > 0.
        control: Whether the control is right on the same rows, of shape (n,).
        gap: The difference to show, as a share of 1.
        power: How often it should show.
    """
    from scipy.special import ndtri

    either = max(gap, sum(ours != theirs for ours, theirs in zip(own, control, strict=True)) / len(own))
    reach = float(ndtri((1 + CONFIDENCE) / 2)) * math.sqrt(either) + float(ndtri(power)) * math.sqrt(either - gap**2)
    return math.ceil((reach / gap) ** 2)


def ratio_interval(
    above: Float[np.ndarray, " row"],
    below: Float[np.ndarray, " row"],
    *,
    resamples: int = 2000,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of sum(above) / sum(below), drawing both from the same rows.

    It is (-inf, inf) for one row, and where a resample's `below` does not sum to more than zero: a ratio whose
    denominator may be nothing has no bounds.

    Args:
        above: The numerator's share of each row.
        below: The denominator's share of each row.
        resamples: How many times all rows are drawn with replacement.
        confidence: The share of such intervals that should hold the true ratio.
        seed: Seed of the draws.
    """
    draw, estimates = np.random.default_rng(seed), []
    for size in _blocks(resamples, len(below)):
        rows = draw.integers(len(below), size=(size, len(below)))
        totals = below[rows].sum(axis=1)
        if len(below) == 1 or totals.min() <= 0:
            return -math.inf, math.inf
        estimates.append(above[rows].sum(axis=1) / totals)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(estimates), [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(own: Sequence[bool], control: Sequence[bool]) -> float:
    """Return the exact two-sided p-value of McNemar's test (McNemar 1947, Psychometrika 12).

    Only rows where one of the two alone is right count; if neither is better, each of them is a fair coin, so their
    number is binomial. 1 where there are none.

    Args:
        own: Whether the method is right on each row, of shape (n,).
        control: Whether the control is right on the same rows, of shape (n,).

    Raises:
        CoterieError: The lengths differ.
    """
    from scipy.stats import binomtest

    if len(own) != len(control):
        raise CoterieError(f"McNemar's test needs the same rows for both methods; got {len(own)} and {len(control)}")
    discordant = [ours for ours, theirs in zip(own, control, strict=True) if ours != theirs]
    return float(binomtest(sum(discordant), len(discordant)).pvalue) if discordant else 1.0


def sign_flip_test(
    values: Sequence[float],
    control: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    flips: int = FLIPS,
    seed: int = 0,
) -> float:
    """Return the two-sided p-value of the paired permutation test of the mean difference (Fisher 1935, sec. 21).

    If the method and its control are alike, exchanging them in any row is as likely as not, which turns the sign of the
    row's weighted difference. All ways to turn signs are counted where there are no more than `flips`; otherwise
    `flips` random ones are drawn and p is (1 + count) / (1 + flips), which is valid at any number of draws (Phipson and
    Smyth 2010) and never below 1 / (1 + flips).

    Args:
        values: The method's value of each row, of shape (n,).
        control: The control's value of the same rows, of shape (n,).
        weights: What each row weighs, of shape (n,), all above zero; equal where None.
        flips: How many random ways to turn signs are drawn.
        seed: Seed of the draws.

    Raises:
        CoterieError: There are no rows, the lengths differ, a number is not finite, or a weight is not above zero.
    """
    return sign_flip_tests({"": values}, control, weights=weights, flips=flips, seed=seed)[""]


def sign_flip_tests(
    methods: Mapping[str, Sequence[float]],
    control: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    flips: int = FLIPS,
    seed: int = 0,
) -> dict[str, float]:
    """Return p-values of `sign_flip_test` for several methods and one control, adjusted for their number.

    Signs are turned for all methods at once, and each is compared with the largest difference that is left, in standard
    errors (step-down maxT: Westfall and Young 1993, algorithm 4.1). Calling those below a level significant keeps the
    chance of any false call at that level, as Holm's method does; but methods that err on the same rows count as few,
    where Holm's counts each. Of one method the p-value is that of `sign_flip_test`.

    Args:
        methods: Every method's value of each row, of shape (n,), by name.
        control: The control's value of the same rows, of shape (n,).
        weights: What each row weighs, of shape (n,), all above zero; equal where None.
        flips: How many random ways to turn signs are drawn.
        seed: Seed of the draws.

    Raises:
        CoterieError: There are no rows, the lengths differ, a number is not finite, or a weight is not above zero.
    """
    if not methods:
        return {}
    weighted = np.stack([_paired(values, control, weights)[0] for values in methods.values()])
    moved = weighted[:, (weighted != 0).any(axis=0)]  # a row without a difference has no sign to turn
    sizes = np.sqrt(np.square(moved).sum(axis=1, keepdims=True))
    scaled = moved / np.where(sizes == 0, 1.0, sizes)
    seen = np.abs(scaled.sum(axis=1))
    order = np.argsort(-seen, kind="stable")
    bounds = (seen - _ROUNDING * np.abs(scaled).sum(axis=1))[order]
    reached, exact = np.zeros(len(methods), dtype=np.int64), 2 ** moved.shape[1] <= flips
    for sums in _turned(scaled[order], flips, seed, exact=exact):
        largest = np.maximum.accumulate(np.abs(sums)[:, ::-1], axis=1)[:, ::-1]  # of it and all that differ less
        reached += (largest >= bounds).sum(axis=0)
    p_values = reached / 2 ** moved.shape[1] if exact else (1 + reached) / (1 + flips)
    adjusted = dict(zip(order.tolist(), np.maximum.accumulate(p_values).tolist(), strict=True))
    return {name: adjusted[place] for place, name in enumerate(methods)}


def _turned(
    values: Float[np.ndarray, "method row"], flips: int, seed: int, *, exact: bool
) -> Iterator[Float[np.ndarray, "flip method"]]:
    """Yield sums over rows with signs turned, in blocks: of every way to turn them, or of random ones."""
    if exact:
        sums = np.zeros((1, len(values)))
        for row in values.T:
            sums = np.concatenate([sums + row, sums - row])
        yield sums
        return
    draw, rows = np.random.default_rng(seed), values.shape[1]
    for size in _blocks(flips, rows):
        yield values.sum(axis=1) - 2 * (draw.integers(2, size=(size, rows), dtype=np.int8) @ values.T)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number by Holm's step-down method (Holm 1979, Scand. J. Statist. 6).

    Calling those below a level significant keeps the chance of any false call at or below that level, whatever the
    dependence between the tests. Names keep their order.

    Raises:
        CoterieError: A p-value is not between 0 and 1.
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise CoterieError(f"a p-value lies between 0 and 1; got {p} of {name!r}")
    order = sorted(p_values, key=lambda name: p_values[name])
    steps = accumulate((min(1.0, (len(order) - rank) * p_values[name]) for rank, name in enumerate(order)), max)
    adjusted = dict(zip(order, steps, strict=True))
    return {name: adjusted[name] for name in p_values}


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Student's t-interval of the mean of independent values, (-inf, inf) for fewer than two (Student 1908).

    Args:
        values: The values, of shape (n,), finite.
        confidence: The share of such intervals that hold the true mean if the values are normal.
    """
    from scipy.special import stdtrit

    if len(values) < 2:
        return -math.inf, math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = error * float(stdtrit(len(values) - 1, (1 + confidence) / 2))
    return float(np.mean(values)) - reach, float(np.mean(values)) + reach


def excludes_zero(interval: Sequence[float] | None) -> bool:
    """Tell whether an interval is there and lies on one side of zero."""
    return interval is not None and not interval[0] <= 0 <= interval[1]


def _paired(
    values: Sequence[float], control: Sequence[float], weights: Sequence[float] | None
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Return each row's weighted difference and its weight."""
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
    return weighted, weight


def _blocks(draws: int, rows: int) -> list[int]:
    """Part so many draws of all rows into blocks that fit into memory."""
    block = max(1, _DRAWS_AT_A_TIME // rows)
    return [min(block, draws - start) for start in range(0, draws, block)]
