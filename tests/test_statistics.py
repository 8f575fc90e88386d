"""Paired comparisons: the bootstrap, the summary of evaluated rows, and the printed table."""

import random
import tracemalloc

import numpy as np
import pytest

from coterie.errors import CoterieError
from coterie.evaluation import statistics
from coterie.evaluation.statistics import TableRow, excludes_zero, format_table, paired_bootstrap, summarise


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


def result(correct=None, nll=1.0, tokens=1):
    return {"text": "", "correct": correct, "extracted": None, "nll": nll, "tokens": tokens, "finish_reason": "stop"}


def row(source="", **methods):
    return {"id": "0", "source": source, "methods": methods}


@pytest.fixture
def rows():
    """Four rows of two sources with hand-made scores of `base` and `new`."""
    return [
        row("maths", base=result(True, 1.0, 1), new=result(True, 0.5, 1)),
        row("maths", base=result(False, 2.0, 3), new=result(True, 1.5, 3)),
        row("chat", base=result(None, 4.0, 4), new=result(None, 4.5, 4)),
        row("chat", base=result(None, 0.0, 0), new=result(None, 0.0, 0)),
    ]


def by_name(table):
    return {(line["source"], line["method"]): line for line in table}


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


# --------------------------------------------------------------------------------------------------------- summary


def test_a_summary_has_these_exact_values(rows):
    lines = by_name(summarise(rows, ["base", "new"], "base", ["chat", "maths"]))
    every = lines["all", "new"]
    assert (every["rows"], every["graded"]) == (4, 2)
    assert (lines["all", "base"]["accuracy"], every["accuracy"], every["accuracy_difference"]) == (0.5, 1.0, 0.5)
    assert lines["all", "base"]["nll"] == pytest.approx((1 * 1.0 + 3 * 2.0 + 4 * 4.0) / 8)
    assert every["nll"] == pytest.approx((1 * 0.5 + 3 * 1.5 + 4 * 4.5) / 8)
    assert every["nll_difference"] == pytest.approx((-0.5 - 1.5 + 2.0) / 8)
    assert every["accuracy_interval"] == [0.0, 1.0]
    assert every["nll_interval"] == pytest.approx([-0.5, 0.5])
    assert lines["maths", "new"]["nll_difference"] == pytest.approx(-0.5)


def test_the_control_has_no_difference_and_an_ungraded_source_no_accuracy(rows):
    lines = by_name(summarise(rows, ["base", "new"], "base", ["chat", "maths"]))
    control, ungraded = lines["maths", "base"], lines["chat", "new"]
    for name in ("accuracy_difference", "accuracy_interval", "nll_difference", "nll_interval"):
        assert control[name] is None
    assert (ungraded["graded"], ungraded["accuracy"], ungraded["accuracy_difference"]) == (0, None, None)


def test_one_measured_row_has_a_difference_without_an_interval(rows):
    chat = by_name(summarise(rows, ["base", "new"], "base", ["chat", "maths"]))["chat", "new"]
    assert (chat["nll_difference"], chat["nll_interval"]) == (0.5, None)


def test_a_single_source_is_not_summed_up_twice(rows):
    assert [line["source"] for line in summarise(rows[:2], ["base", "new"], "base", ["maths"])] == ["all", "all"]
    table = summarise(rows, ["base", "new"], "base", ["chat", "maths"])
    assert [(line["source"], line["method"]) for line in table] == [
        (source, method) for source in ("all", "chat", "maths") for method in ("base", "new")
    ]


def test_shuffled_rows_give_the_same_summary_but_for_the_draws(rows):
    shuffled = random.Random(0).sample(rows, len(rows))
    for summed, other in zip(
        summarise(rows, ["base", "new"], "base", ["chat", "maths"]),
        summarise(shuffled, ["base", "new"], "base", ["chat", "maths"]),
        strict=True,
    ):
        for name in ("rows", "graded", "accuracy", "accuracy_difference", "nll", "nll_difference"):
            assert summed[name] == pytest.approx(other[name])


def test_the_interval_of_a_summary_is_that_of_its_graded_rows_weighed_by_tokens(rows):
    rows = [*rows, row("maths", base=result(True, 3.0, 2), new=result(False, 1.0, 2))]
    line = by_name(summarise(rows, ["base", "new"], "base", [""], resamples=300, seed=5))["all", "new"]
    accuracy = paired_bootstrap([1.0, 1.0, 0.0], [1.0, 0.0, 1.0], resamples=300, seed=5)
    nll = paired_bootstrap(
        [0.5, 1.5, 4.5, 1.0], [1.0, 2.0, 4.0, 3.0], weights=[1.0, 3.0, 4.0, 2.0], resamples=300, seed=5
    )
    assert line["accuracy_interval"] == [accuracy.low, accuracy.high]
    assert line["nll_interval"] == [nll.low, nll.high]


def test_rows_that_do_not_fit_together_are_told_to_the_user(rows):
    with pytest.raises(CoterieError, match="'nwe'.*Did you mean 'new'"):
        summarise(rows, ["base", "new"], "nwe", ["maths"])
    with pytest.raises(CoterieError, match="row 4 has no result of the method 'new'"):
        summarise([*rows, row("chat", base=result())], ["base", "new"], "base", ["maths"])
    with pytest.raises(CoterieError, match="scored 9 and 7 tokens"):
        summarise([row("a", base=result(tokens=7), new=result(tokens=9))], ["base", "new"], "base", ["a"])


# ----------------------------------------------------------------------------------------------------------- table


def test_zero_at_the_end_of_an_interval_is_not_excluded():
    assert [excludes_zero(interval) for interval in ([0.1, 0.2], [-0.2, -0.1], [0.0, 0.2], [-0.1, 0.1], None)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def line(method, source, graded, accuracy, nll, accuracy_gap=(None, None), nll_gap=(None, None)) -> TableRow:
    """One line of a table; a gap is a difference and its interval."""
    return {
        "method": method, "source": source, "rows": 40, "graded": graded,
        "accuracy": accuracy, "accuracy_difference": accuracy_gap[0], "accuracy_interval": accuracy_gap[1],
        "nll": nll, "nll_difference": nll_gap[0], "nll_interval": nll_gap[1],
    }  # fmt: skip


def test_the_table_reads_like_this():
    table = [
        line("base", "all", 38, 0.5, 2.0),
        line("better", "all", 38, 0.75, 1.5, (0.25, [0.1, 0.4]), (-0.5, [-0.61, -0.4])),
        line("same", "all", 38, 0.5, 2.01, (0.0, [-0.0513, 0.05]), (0.01, [-0.02, 0.03])),
        line("base", "", 0, None, 1.0),
        line("better", "", 0, None, 1.5, (None, None), (0.5, None)),
    ]
    assert format_table(table).splitlines() == [
        "all rows: 40 rows, 38 graded",
        "                        accuracy  difference, 95% interval      NLL  difference, 95% interval",
        "base                       50.0%                             2.0000",
        "better                     75.0%  +25.0 [+10.0, +40.0] *     1.5000  -0.5000 [-0.6100, -0.4000] *",
        "same                       50.0%  +0.0 [-5.1, +5.0]          2.0100  +0.0100 [-0.0200, +0.0300]",
        "",
        "no source: 40 rows, 0 graded",
        "                        accuracy  difference, 95% interval      NLL  difference, 95% interval",
        "base                           -                             1.0000",
        "better                         -                             1.5000  +0.5000",
        "",
        "Compared with base over all rows, significant (*): the higher accuracy of better and the lower NLL",
        "of better; not significant: the accuracy of same and the NLL of same.",
    ]


def test_the_table_fits_into_100_columns_whatever_the_names_and_numbers():
    long = "a-method-with-a-very-long-name"
    rows = [row("s", base=result(True, 0.0, 5), **{long: result(False, 9.9, 5)}) for _ in range(3)]
    lines = format_table(summarise(rows, ["base", long], "base", ["s", "t"])).splitlines()
    assert max(map(len, lines)) <= 100


def test_the_last_sentence_is_careful_where_there_is_little_to_say(rows):
    few = format_table(summarise(rows, ["base", "new"], "base", [""])).replace("\n", " ")
    assert "no difference is significant, but 4 rows are too few to trust these intervals." in few
    alone = format_table(summarise(rows, ["base"], "base", [""]))
    assert alone.endswith("No two methods were measured, so there is no difference to test.")
