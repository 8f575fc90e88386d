"""The summary of evaluated rows, and the printed table."""

import random

import pytest

from coterie.errors import CoterieError
from coterie.evaluation.statistics import paired_bootstrap
from coterie.evaluation.table import TableRow, format_table, summarise


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
