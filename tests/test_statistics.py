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
    accuracy_difference,
    excludes_zero,
    holm,
    mcnemar,
    mean_difference,
    mean_interval,
    ratio_interval,
    rows_to_see,
    sign_flip_test,
    sign_flip_tests,
)


def slow_bootstrap(above, below, resamples, confidence, seed):
    """The same estimator and interval, one resample and one row at a time."""
    draw, estimates = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = [int(row) for row in draw.integers(len(above), size=len(above))]
        estimates.append(sum(above[row] for row in rows) / sum(below[row] for row in rows))
    estimates.sort()

    def at(share):
        place = share * (resamples - 1)
        first = int(place)
        last = min(first + 1, resamples - 1)
        return estimates[first] + (place - first) * (estimates[last] - estimates[first])

    return at((1 - confidence) / 2), at((1 + confidence) / 2)


# ------------------------------------------------------------------------------------------------- bootstrap of a ratio

ABOVE, BELOW = np.array([0.1, 0.9, 0.4, 0.3, 0.7]), np.array([1.0, 2.0, 5.0, 0.5, 3.0])


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_ratios_interval_equals_a_loop_over_resamples_and_rows(confidence):
    found = ratio_interval(ABOVE, BELOW, resamples=150, confidence=confidence, seed=3)
    assert found == pytest.approx(slow_bootstrap(ABOVE, BELOW, 150, confidence, 3))


def test_equal_seeds_give_equal_intervals_and_other_seeds_others():
    assert ratio_interval(ABOVE, BELOW, seed=1) == ratio_interval(ABOVE, BELOW, seed=1)
    assert ratio_interval(ABOVE, BELOW, seed=1) != ratio_interval(ABOVE, BELOW, seed=2)


def test_drawing_in_small_blocks_changes_nothing(monkeypatch):
    at_once = ratio_interval(ABOVE, BELOW, resamples=100)
    monkeypatch.setattr(statistics, "_DRAWS_AT_A_TIME", 7 * len(ABOVE))
    assert ratio_interval(ABOVE, BELOW, resamples=100) == at_once


def test_memory_is_bounded_by_the_block_not_by_all_the_draws(monkeypatch):
    monkeypatch.setattr(statistics, "_DRAWS_AT_A_TIME", 20_000)
    tracemalloc.start()
    ratio_interval(np.ones(2000), np.ones(2000), resamples=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # a million draws of 8 bytes at once would be eight times that


# ------------------------------------------------------------------------------------------------ difference of means


def test_the_difference_is_the_mean_and_with_weights_the_ratio_of_sums():
    assert mean_difference([1.0, 2.0, 6.0], [0.0, 0.0, 3.0]).value == pytest.approx(6 / 3)
    assert mean_difference([1.0, 2.0], [0.0, 0.0], weights=[3.0, 1.0]).value == pytest.approx((3 * 1 + 1 * 2) / 4)


def test_the_difference_of_micro_averages_is_the_micro_average_of_differences():
    own, control, tokens = [0.5, 1.5, 4.5], [1.0, 2.0, 4.0], [1.0, 3.0, 4.0]
    gap = np.average(own, weights=tokens) - np.average(control, weights=tokens)
    assert mean_difference(own, control, weights=tokens).value == pytest.approx(gap)


def test_weights_count_by_proportion_only():
    values, control, weights = [0.1, 0.9, 0.4], [0.2, 0.5, 0.1], [1.0, 2.0, 5.0]
    once = mean_difference(values, control, weights=weights)
    assert mean_difference(values, control, weights=[7 * w for w in weights]) == pytest.approx(once)
    equal = mean_difference(values, control, weights=[7.0] * 3)
    assert equal == pytest.approx(mean_difference(values, control))


def test_with_equal_weights_the_interval_is_students():
    values, control = [0.1, 0.9, 0.4, 0.3], [0.2, 0.5, 0.1, 0.6]
    gaps = [own - other for own, other in zip(values, control, strict=True)]
    assert mean_difference(values, control)[1:] == pytest.approx(mean_interval(gaps))


def test_the_error_is_that_of_leaving_rows_out_one_by_one():
    values, weights = np.array([0.1, 0.9, 0.4, 0.3]), np.array([1.0, 2.0, 3.0, 4.0])
    left_out = [np.average(np.delete(values, i), weights=np.delete(weights, i)) for i in range(4)]
    error = np.sqrt(3 / 4 * np.square(left_out - np.mean(left_out)).sum())
    found = mean_difference(values.tolist(), [0.0] * 4, weights=weights.tolist())
    worth = weights.sum() ** 2 / (weights**2).sum()
    assert found.high - found.value == pytest.approx(error * scipy.stats.t.ppf(0.975, worth - 1))
    assert found.value - found.low == pytest.approx(found.high - found.value)


@pytest.mark.parametrize("rows", [10, 30, 100])
@pytest.mark.parametrize("spread", [0.0, 0.6], ids=["equal", "weighted"])
def test_93_to_97_of_100_intervals_of_means_hold_the_true_difference(rows, spread):
    draw = np.random.default_rng(rows)
    held, repeats = 0, 2000
    for _ in range(repeats):
        hardness, weights = draw.normal(size=rows) * 5, np.exp(draw.normal(size=rows) * spread)
        own, control = (hardness + draw.gamma(9, 1 / 3, rows) for _ in range(2))
        found = mean_difference((own + 0.3).tolist(), control.tolist(), weights=weights.tolist())
        held += found.low <= 0.3 <= found.high
    assert 0.93 <= held / repeats <= 0.97


def test_pairing_takes_out_how_hard_the_rows_are():
    draw = np.random.default_rng(1)
    hardness, gaps = draw.normal(size=50) * 100, draw.normal(size=50)
    found = mean_difference((hardness + gaps).tolist(), hardness.tolist())
    assert found == pytest.approx(mean_difference(gaps.tolist(), [0.0] * 50))


def test_exchanging_method_and_control_mirrors_the_interval():
    values, control = [0.1, 0.9, 0.4, 0.3], [0.2, 0.5, 0.1, 0.3]
    there, back = mean_difference(values, control), mean_difference(control, values)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_permuting_the_rows_of_both_alike_changes_nothing():
    values, control, weights = np.array([[0.1, 0.9, 0.4, 0.3], [0.2, 0.5, 0.1, 0.3], [1.0, 2.0, 3.0, 4.0]])
    order = [2, 0, 3, 1]
    once, again = (
        mean_difference(v.tolist(), c.tolist(), weights=w.tolist())
        for v, c, w in ((values, control, weights), (values[order], control[order], weights[order]))
    )
    assert again == pytest.approx(once)


@pytest.mark.parametrize("gaps", [[2.0], [0.0] * 5, [0.1 + 0.2] * 3, [1e9] * 4], ids=["one", "none", "alike", "large"])
def test_rows_that_do_not_vary_give_no_limits(gaps):
    found = mean_difference([0.7 + gap for gap in gaps], [0.7] * len(gaps), weights=[1.0 + i for i in range(len(gaps))])
    assert found.value == pytest.approx(gaps[0])
    assert found[1:] == (-np.inf, np.inf)


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
        mean_difference(values, control, weights=weights)


# ------------------------------------------------------------------------------------------- difference of accuracies


def verdicts(gained, lost, both, neither=0):
    own = [True] * gained + [False] * lost + [True] * both + [False] * neither
    return own, [False] * gained + [True] * lost + [True] * both + [False] * neither


@pytest.mark.parametrize("rows", [5, 20, 400])
def test_where_the_two_agree_everywhere_the_bounds_have_a_closed_form(rows):
    bound = 1.959964**2 / (rows + 1.959964**2)
    assert accuracy_difference(*verdicts(0, 0, rows)) == pytest.approx((0, -bound, bound), abs=1e-6)


def slow_score(own, control, gap):
    """The score statistic with the rate of losses that maximises the likelihood, searched on a fine grid."""
    n = len(own)
    gained = sum(a and not b for a, b in zip(own, control, strict=True))
    lost = sum(b and not a for a, b in zip(own, control, strict=True))
    rates = np.linspace(max(0, -gap), (1 - gap) / 2, 200_001)[1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        fit = gained * np.log(rates + gap) + lost * np.log(rates) + (n - gained - lost) * np.log(1 - 2 * rates - gap)
    rate = rates[np.nanargmax(fit)]
    return (gained - lost - n * gap) / np.sqrt(n * (2 * rate + gap * (1 - gap)))


@pytest.mark.parametrize("table", [(5, 2, 10, 3), (1, 8, 20, 20), (12, 12, 30, 46)], ids=str)
def test_at_the_ends_of_the_interval_the_score_is_that_of_the_level(table):
    own, control = verdicts(*table)
    found = accuracy_difference(own, control)
    assert slow_score(own, control, found.low) == pytest.approx(1.95996, abs=1e-3)
    assert slow_score(own, control, found.high) == pytest.approx(-1.95996, abs=1e-3)


@pytest.mark.parametrize(("rows", "least", "most"), [(10, 0.94, 1.0), (30, 0.93, 0.97), (100, 0.93, 0.97)])
@pytest.mark.parametrize("rates", [(0.3, 0.2), (0.2, 0.1), (0.4, 0.1), (0.2, 0.2), (0.5, 0.2)], ids=str)
def test_the_exact_share_of_intervals_of_accuracies_that_hold_the_truth(rows, least, most, rates):
    """Counts of 10 rows are so few that no interval of this kind can be close to 95% from above."""
    gained, lost = rates
    held = 0.0
    for win in range(rows + 1):
        for loss in range(rows + 1 - win):
            counts = [win, loss, rows - win - loss]
            chance = scipy.stats.multinomial.pmf(counts, rows, [gained, lost, 1 - gained - lost])
            if chance > 1e-7:
                found = accuracy_difference(*verdicts(*counts))
                held += chance * (found.low <= gained - lost <= found.high)
    assert least <= held <= most


def test_all_won_and_all_lost_reach_the_end():
    assert accuracy_difference(*verdicts(8, 0, 0)).high == 1
    assert accuracy_difference(*verdicts(0, 8, 0)).low == -1
    assert accuracy_difference(*verdicts(8, 0, 0)).low == pytest.approx(-accuracy_difference(*verdicts(0, 8, 0)).high)


def test_methods_that_agree_on_few_rows_may_still_differ_and_on_many_rows_less():
    reaches = [accuracy_difference(*verdicts(0, 0, n)).high for n in (5, 20, 100, 1000)]
    assert reaches == sorted(reaches, reverse=True)
    assert reaches[0] > 0.4 and reaches[-1] < 0.005


def test_a_difference_shows_at_the_promised_number_of_rows_and_not_at_half_of_it():
    draw, gained, lost = np.random.default_rng(0), 0.175, 0.125
    own, control = verdicts(175, 125, 700)
    needed = rows_to_see(own, control)
    power = []
    for rows in (needed, needed // 2):
        wins, losses, _ = draw.multinomial(rows, [gained, lost, 1 - gained - lost], 400).T
        pairs = zip(wins, losses, strict=True)
        power.append(np.mean([mcnemar([True] * w + [False] * x, [False] * w + [True] * x) < 0.05 for w, x in pairs]))
    assert 0.74 < power[0] < 0.86
    assert power[1] < 0.6


def test_where_methods_never_differ_the_rate_is_the_gap_itself():
    assert rows_to_see([True] * 10, [True] * 10) == rows_to_see([True] * 20, [False] + [True] * 19)


# --------------------------------------------------------------------------------------------------------------- tests


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


# ------------------------------------------------------------------------------------------ sign flips of several


def brute_joint_p(methods, control):
    """Westfall and Young's step-down maxT over every way to turn signs, one method and one way at a time."""
    gaps = {
        name: [Fraction(a) - Fraction(b) for a, b in zip(own, control, strict=True)] for name, own in methods.items()
    }
    squares = {name: sum(gap * gap for gap in own) for name, own in gaps.items()}

    def size(name, signs):  # the squared sum in squared standard errors
        return sum(s * gap for s, gap in zip(signs, gaps[name], strict=True)) ** 2 / squares[name]

    rows = len(control)
    left = sorted(methods, key=lambda name: size(name, [1] * rows), reverse=True)
    found, least = {}, Fraction(0)
    while left:
        seen = size(left[0], [1] * rows)
        ways = [max(size(name, signs) for name in left) >= seen for signs in product([1, -1], repeat=rows)]
        least = max(least, Fraction(sum(ways), len(ways)))
        found[left.pop(0)] = least
    return {name: float(found[name]) for name in methods}


@pytest.mark.parametrize("seed", range(6))
def test_several_methods_have_the_p_values_of_the_slow_step_down(seed):
    draw = np.random.default_rng(seed)
    control = draw.integers(100, size=7).astype(float)
    methods = {name: (control + draw.integers(-9, 30, size=7)).tolist() for name in ("a", "b", "c", "d")}
    found = sign_flip_tests(methods, control.tolist())
    assert list(found) == list(methods)
    assert found == pytest.approx(brute_joint_p(methods, control.tolist()))


@pytest.mark.parametrize("rows", [8, 60])
def test_methods_that_are_alike_count_as_one(rows):
    draw = np.random.default_rng(2)
    control = draw.normal(size=rows)
    own = (control - 0.3 + draw.normal(size=rows)).tolist()
    alone = sign_flip_test(own, control.tolist())
    assert 0.01 < alone < 0.5
    assert set(sign_flip_tests(dict.fromkeys("abcdefgh", own), control.tolist()).values()) == {alone}


def test_unlike_methods_are_adjusted_for_their_number_and_a_copy_of_the_control_is_not_told_apart():
    draw = np.random.default_rng(3)
    control = draw.normal(size=100)
    noise = {f"{n}": (control + draw.normal(size=100)).tolist() for n in range(20)}
    alone = {name: sign_flip_test(own, control.tolist()) for name, own in noise.items()}
    found = sign_flip_tests({**noise, "copy": control.tolist()}, control.tolist())
    assert found["copy"] == 1
    assert 5 * min(alone.values()) < min(found.values())
    assert all(found[name] >= alone[name] for name in noise)


def test_among_many_methods_that_are_noise_one_is_called_different_as_rarely_as_was_promised():
    draw, calls = np.random.default_rng(0), 0
    for seed in range(300):
        methods = {f"{n}": draw.normal(size=20).tolist() for n in range(10)}
        calls += min(sign_flip_tests(methods, draw.normal(size=20).tolist(), flips=199, seed=seed).values()) < 0.1
    assert calls / 300 == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 300) ** 0.5)


def test_no_methods_have_no_p_values():
    assert sign_flip_tests({}, [1.0]) == {}


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
