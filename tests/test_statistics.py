"""Paired comparisons on plain arrays, against slow and obvious versions."""

import tracemalloc
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import scipy.stats

from coterie.errors import CoterieError
from coterie.evaluation import statistics
from coterie.evaluation.statistics import (
    excludes_zero,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    ratio_interval,
    sign_flip_test,
)


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
    assert paired_bootstrap([1.0, 2.0, 6.0], [0.0, 0.0, 3.0]).value == pytest.approx(6 / 3)
    assert paired_bootstrap([1.0, 2.0], [0.0, 0.0], weights=[3.0, 1.0]).value == pytest.approx((3 * 1 + 1 * 2) / 4)


def test_the_difference_of_micro_averages_is_the_micro_average_of_differences():
    own, control, tokens = [0.5, 1.5, 4.5], [1.0, 2.0, 4.0], [1.0, 3.0, 4.0]
    gap = np.average(own, weights=tokens) - np.average(control, weights=tokens)
    assert paired_bootstrap(own, control, weights=tokens).value == pytest.approx(gap)


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
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_permuting_the_rows_of_both_alike_leaves_the_difference():
    values, control, weights = [0.1, 0.9, 0.4, 0.3], [0.2, 0.5, 0.1, 0.3], [1.0, 2.0, 3.0, 4.0]
    order = [2, 0, 3, 1]
    shuffled = paired_bootstrap(
        [values[i] for i in order], [control[i] for i in order], weights=[weights[i] for i in order]
    )
    assert shuffled.value == pytest.approx(paired_bootstrap(values, control, weights=weights).value)


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


# --------------------------------------------------------------------------------------------------- ratio of sums


def test_the_interval_of_a_ratio_draws_numerator_and_denominator_from_the_same_rows():
    above, below = np.array([1.0, 2.0, 6.0, 0.5]), np.array([2.0, 4.0, 12.0, 1.0])
    assert ratio_interval(above, below) == pytest.approx((0.5, 0.5))  # every row has it, so every resample has


def test_the_paired_interval_is_that_of_the_ratio_to_the_weights():
    own, control, weights = np.array([0.1, 0.9, 0.4]), np.array([0.2, 0.5, 0.1]), np.array([1.0, 2.0, 5.0])
    paired = paired_bootstrap(own.tolist(), control.tolist(), weights=weights.tolist(), resamples=300, seed=2)
    assert ratio_interval(weights * (own - control), weights, resamples=300, seed=2) == paired[1:]


def test_a_denominator_that_may_be_nothing_leaves_no_bounds():
    above = np.ones(5)
    assert ratio_interval(above, np.array([1.0, 1.0, 1.0, 1.0, -1.0])) == (-np.inf, np.inf)
    assert ratio_interval(above, np.array([1.0, 0.0, 0.0, 0.0, 0.0])) == (-np.inf, np.inf)
    assert ratio_interval(above[:1], above[:1]) == (-np.inf, np.inf)


# --------------------------------------------------------------------------------------------------------- McNemar


def discordant(gains, losses, ties=3):
    """Results of two methods: so many rows that one alone has right, that the other alone has, that both have."""
    return [True] * gains + [False] * losses + [True] * ties, [False] * gains + [True] * losses + [True] * ties


@pytest.mark.parametrize(
    ("gains", "losses", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),  # 2 * 1/2
        (5, 0, Fraction(2, 32)),
        (1, 5, Fraction(2 * (1 + 6), 64)),
        (8, 2, Fraction(2 * (1 + 10 + 45), 1024)),
        (3, 3, 1),  # twice more than a half
    ],
)
def test_mcnemar_has_these_exact_values(gains, losses, p):
    assert mcnemar(*discordant(gains, losses)) == pytest.approx(float(p), rel=1e-15)


@pytest.mark.parametrize(("gains", "losses"), [(7, 2), (2, 7), (40, 61), (300, 300), (0, 30), (6000, 5700)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_rows(gains, losses):
    expected = scipy.stats.binomtest(gains, gains + losses).pvalue
    assert mcnemar(*discordant(gains, losses)) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_ignores_rows_on_which_both_agree_and_which_one_is_the_control():
    own, control = discordant(9, 2)
    assert mcnemar(own, control) == mcnemar(control, own) == mcnemar(*discordant(9, 2, ties=500)) < 0.1


def test_mcnemar_of_more_rows_than_floats_can_count_is_still_a_number():
    assert mcnemar(*discordant(1100, 1000)) == pytest.approx(scipy.stats.binomtest(1000, 2100).pvalue)
    assert mcnemar(*discordant(2000, 0)) == 0  # 2 ** -1999 is below the least float


def test_mcnemar_refuses_unequal_lengths():
    with pytest.raises(CoterieError, match="got 1 and 2"):
        mcnemar([True], [True, False])


# ------------------------------------------------------------------------------------------------------- sign flips


def brute_sign_flip_p(values, control, weights):
    """The share of all ways to exchange method and control whose difference is as far from zero as the one seen."""
    fractions = [Fraction(w) * (Fraction(v) - Fraction(c)) for v, c, w in zip(values, control, weights, strict=True)]
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, fractions, strict=True)))
        for signs in product([1, -1], repeat=len(fractions))
    ]
    return sum(total >= abs(sum(fractions)) for total in sums) / len(sums)


def test_few_rows_are_counted_exactly():
    draw = np.random.default_rng(0)
    for rows in (1, 2, 5, 9):
        values, control = draw.integers(10, size=(2, rows)).astype(float).tolist()
        weights = draw.integers(1, 6, size=rows).astype(float).tolist()
        assert sign_flip_test(values, control, weights=weights) == brute_sign_flip_p(values, control, weights)


def test_three_gains_of_three_have_a_p_of_two_in_eight():
    assert sign_flip_test([2.0, 3.0, 7.0], [1.0, 1.0, 1.0]) == 2 / 8
    assert sign_flip_test([2.0, 3.0, 7.0, 5.0], [1.0, 1.0, 1.0, 5.0]) == 2 / 8  # a tie tells nothing
    assert sign_flip_test([5.0, 5.0], [5.0, 5.0]) == 1


@pytest.mark.parametrize("tenths", [(-5, 2, 5), (-2, 7, -7, 1), (4, 7, 0, -2, -4), (1, -3, 3, 1, -5, -3)])
def test_sums_that_differ_by_rounding_alone_are_ties(tenths):
    rows = [number / 10 for number in tenths]  # in floats some of these sums come out a little below their equals
    assert sign_flip_test(rows, [0.0] * len(rows)) == brute_sign_flip_p(tenths, [0] * len(rows), [1] * len(rows))


def test_rows_without_a_difference_leave_few_rows_to_count():
    assert sign_flip_test([1.0, 2.0, 3.0] + [4.0] * 500, [0.0, 0.0, 0.0] + [4.0] * 500) == 2 / 8


def test_random_flips_come_near_the_exact_share_and_scipys():
    draw = np.random.default_rng(4)
    values, control = draw.normal(size=(2, 12))
    weights = draw.integers(1, 9, size=12).astype(float)
    arrays = values.tolist(), control.tolist()
    exact = sign_flip_test(*arrays, weights=weights.tolist())
    scipys = scipy.stats.permutation_test(
        (weights * (values - control),), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert exact == pytest.approx(scipys.pvalue)
    drawn = sign_flip_test(*arrays, weights=weights.tolist(), flips=4000, seed=1)
    assert drawn == pytest.approx(exact, abs=0.04)  # five standard deviations of 4000 coins are 0.04 or less
    assert drawn != exact


def test_random_flips_never_give_less_than_one_of_all_that_were_looked_at():
    assert sign_flip_test([1.0] * 60, [0.0] * 60, flips=99) == 1 / 100
    assert sign_flip_test([1.0] * 60, [0.0] * 60) == 1 / 10_000


def test_under_the_null_p_values_are_uniform():
    draw = np.random.default_rng(0)
    found = []
    for seed in range(400):
        hardness, noise = draw.normal(size=20), draw.normal(size=(2, 20))
        tokens = draw.integers(1, 30, size=20).astype(float).tolist()
        own, control = (hardness + noise).tolist()
        found.append(sign_flip_test(own, control, weights=tokens, flips=199, seed=seed))
    for level in (0.05, 0.25, 0.5, 0.9):
        below = np.mean([p <= level for p in found])
        assert below == pytest.approx(level, abs=4 * (level * (1 - level) / 400) ** 0.5)


def test_a_shift_that_rows_share_is_found():
    draw = np.random.default_rng(1)
    control = draw.normal(size=80)
    assert sign_flip_test((control + 0.1 + 0.1 * draw.normal(size=80)).tolist(), control.tolist()) < 0.001


def test_sign_flips_depend_on_neither_the_direction_nor_the_scale_of_weights():
    values, control, weights = [0.1, 0.9, 0.4, 0.3], [0.2, 0.5, 0.1, 0.1], [1.0, 2.0, 5.0, 3.0]
    once = sign_flip_test(values, control, weights=weights)
    assert sign_flip_test(control, values, weights=weights) == once
    assert sign_flip_test(values, control, weights=[7 * w for w in weights]) == once < 1


def test_sign_flips_refuse_what_the_bootstrap_refuses():
    with pytest.raises(CoterieError, match="at least one row"):
        sign_flip_test([], [])
    with pytest.raises(CoterieError, match="finite"):
        sign_flip_test([float("nan")], [0.0])


# ------------------------------------------------------------------------------------------------------------- Holm


def test_holm_has_these_hand_worked_values():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    # sorted: d 4 * 0.005, a 3 * 0.01, c 2 * 0.03, b 1 * 0.04 but not below c
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]


def test_holm_of_a_published_list_of_p_values():
    # The p-values of Benjamini and Hochberg 1995, sec. 3.2, worked by hand: the sixth is 10 * 0.0278, more than both
    # 9 * 0.0298 and 8 * 0.0344, so those two are raised to it; 6 * 0.3240 is above 1, and so are all after it.
    given = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719]
    given += [0.6528, 0.7590, 1.0]
    known = [0.0015, 0.0056, 0.0247, 0.1140, 0.2211, 0.2780, 0.2780, 0.2780, 0.3213] + [1.0] * 6
    found = holm({str(number): p for number, p in enumerate(given)})
    assert list(found.values()) == pytest.approx(known)


def test_holm_never_lowers_a_p_value_keeps_their_order_and_stops_at_one():
    draw = np.random.default_rng(0)
    for _ in range(50):
        given = {str(number): p for number, p in enumerate(draw.uniform(size=8).tolist())}
        found = holm(given)
        order = sorted(given, key=lambda name: given[name])
        assert all(given[name] <= found[name] <= 1 for name in given)
        assert all(found[a] <= found[b] for a, b in zip(order, order[1:], strict=False))
        assert found[order[0]] == min(1, 8 * given[order[0]])


def test_holm_leaves_one_comparison_alone_and_equal_ones_equal():
    assert holm({"a": 0.03}) == {"a": 0.03}
    assert holm({}) == {}
    assert holm({"a": 0.02, "b": 0.02}) == pytest.approx({"a": 0.04, "b": 0.04})


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(CoterieError, match="of 'a'"):
        holm({"a": p})


# -------------------------------------------------------------------------------------------------- mean of seeds


def test_the_t_interval_has_these_hand_worked_values():
    # mean 2, standard deviation 1, t of 2 degrees of freedom at 97.5% is 4.302653
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)
    assert mean_interval([5.0, 5.0, 5.0]) == (5, 5)
    assert mean_interval([5.0]) == (-np.inf, np.inf)


def test_the_t_interval_ends_where_the_t_test_is_at_its_level():
    values = [0.3, 0.8, -0.2, 0.5]
    for end in mean_interval(values, 0.9):
        assert scipy.stats.ttest_1samp(values, end).pvalue == pytest.approx(0.1)
