"""Paired comparisons on plain arrays, against slow and obvious versions."""

import tracemalloc

import numpy as np
import pytest

from coterie.errors import CoterieError
from coterie.evaluation import statistics
from coterie.evaluation.statistics import excludes_zero, paired_bootstrap


def slow_bootstrap(values, control, weights, resamples, confidence, seed):
    """The same estimator and interval, one resample and one row at a time."""
    draw, estimates = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = [int(row) for row in draw.integers(len(values), size=len(values))]
        total = sum(weights[row] for row in rows)
        estimates.append(sum(weights[row] * (values[row] - control[row]) for row in rows) / total)
    estimates.sort()

    def at(share):
        place = share * (resamples - 1)
        below = int(place)
        above = min(below + 1, resamples - 1)
        return estimates[below] + (place - below) * (estimates[above] - estimates[below])

    return at((1 - confidence) / 2), at((1 + confidence) / 2)


# ------------------------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0, 0.5, 9.0, 3.0]], ids=["equal", "weighted"])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_equals_a_loop_over_resamples_and_rows(weights, confidence):
    values, control = [0.1, 0.9, 0.4, 0.3, 0.7, 0.2], [0.2, 0.5, 0.1, 0.3, 0.1, 0.6]
    found = paired_bootstrap(values, control, weights=weights, resamples=150, confidence=confidence, seed=3)
    assert found[1:] == pytest.approx(slow_bootstrap(values, control, weights or [1.0] * 6, 150, confidence, 3))


def test_the_difference_is_the_mean_and_with_weights_the_ratio_of_sums():
    assert paired_bootstrap([1.0, 2.0, 6.0], [0.0, 0.0, 3.0]).difference == pytest.approx(6 / 3)
    assert paired_bootstrap([1.0, 2.0], [0.0, 0.0], weights=[3.0, 1.0]).difference == pytest.approx((3 * 1 + 1 * 2) / 4)


def test_the_difference_of_micro_averages_is_the_micro_average_of_differences():
    own, control, tokens = [0.5, 1.5, 4.5], [1.0, 2.0, 4.0], [1.0, 3.0, 4.0]
    gap = np.average(own, weights=tokens) - np.average(control, weights=tokens)
    assert paired_bootstrap(own, control, weights=tokens).difference == pytest.approx(gap)


def test_weights_count_by_proportion_only():
    values, control, weights = [0.1, 0.9, 0.4], [0.2, 0.5, 0.1], [1.0, 2.0, 5.0]
    once = paired_bootstrap(values, control, weights=weights)
    assert paired_bootstrap(values, control, weights=[7 * w for w in weights]) == pytest.approx(once)
    equal = paired_bootstrap(values, control, weights=[7.0] * 3)
    assert equal == pytest.approx(paired_bootstrap(values, control))


def test_about_95_of_100_intervals_hold_the_true_difference():
    draw, held = np.random.default_rng(0), 0
    for repeat in range(200):
        hardness = draw.normal(size=60) * 5
        control = hardness + draw.normal(size=60)
        own = hardness + draw.normal(size=60) + 0.3
        found = paired_bootstrap(own.tolist(), control.tolist(), resamples=400, seed=repeat)
        held += found.low <= 0.3 <= found.high
    assert 178 <= held <= 198  # 190 expected; percentile intervals of 60 rows are a little narrow


def test_pairing_takes_out_how_hard_the_rows_are():
    hardness = np.random.default_rng(1).normal(size=50) * 100
    found = paired_bootstrap((hardness + 1).tolist(), hardness.tolist())
    assert found == pytest.approx((1, 1, 1))


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    values, control = [0.1, 0.9, 0.4, 0.3], [0.2, 0.5, 0.1, 0.3]
    assert paired_bootstrap(values, control, seed=1) == paired_bootstrap(values, control, seed=1)
    assert paired_bootstrap(values, control, seed=1) != paired_bootstrap(values, control, seed=2)


def test_drawing_in_small_blocks_changes_nothing(monkeypatch):
    values, control = [0.1, 0.9, 0.4, 0.3, 0.8], [0.2, 0.5, 0.1, 0.3, 0.7]
    at_once = paired_bootstrap(values, control, resamples=100)
    monkeypatch.setattr(statistics, "_DRAWS_AT_A_TIME", 7 * len(values))
    assert paired_bootstrap(values, control, resamples=100) == at_once


def test_memory_is_bounded_by_the_block_not_by_all_the_draws(monkeypatch):
    monkeypatch.setattr(statistics, "_DRAWS_AT_A_TIME", 20_000)
    values = [0.5] * 2000
    tracemalloc.start()
    paired_bootstrap(values, values, resamples=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # a million draws of 8 bytes at once would be eight times that


def test_exchanging_method_and_control_mirrors_the_interval():
    values, control = [0.1, 0.9, 0.4, 0.3], [0.2, 0.5, 0.1, 0.3]
    there, back = paired_bootstrap(values, control), paired_bootstrap(control, values)
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))


def test_permuting_the_rows_of_both_alike_leaves_the_difference():
    values, control, weights = [0.1, 0.9, 0.4, 0.3], [0.2, 0.5, 0.1, 0.3], [1.0, 2.0, 3.0, 4.0]
    order = [2, 0, 3, 1]
    shuffled = paired_bootstrap(
        [values[i] for i in order], [control[i] for i in order], weights=[weights[i] for i in order]
    )
    assert shuffled.difference == pytest.approx(paired_bootstrap(values, control, weights=weights).difference)


def test_one_row_tells_a_difference_but_no_limits_to_it():
    assert paired_bootstrap([3.0], [1.0]) == (2.0, -np.inf, np.inf)


@pytest.mark.parametrize(
    ("values", "control", "weights", "message"),
    [
        ([1.0], [1.0, 2.0], None, "got 1 values, 2 of the control"),
        ([1.0, 2.0], [1.0, 2.0], [1.0], "1 weights"),
        ([], [], None, "at least one row"),
        ([float("nan"), 1.0], [0.0, 0.0], None, "finite"),
        ([1.0, 1.0], [0.0, 0.0], [1.0, 0.0], "above zero"),
    ],
    ids=["lengths", "weights", "no rows", "nan", "zero weight"],
)
def test_what_cannot_be_compared_is_told_to_the_user(values, control, weights, message):
    with pytest.raises(CoterieError, match=message):
        paired_bootstrap(values, control, weights=weights)


def test_zero_at_the_end_of_an_interval_is_not_excluded():
    assert [excludes_zero(interval) for interval in ([0.1, 0.2], [-0.2, -0.1], [0.0, 0.2], [-0.1, 0.1], None)] == [
        True,
        True,
        False,
        False,
        False,
    ]
