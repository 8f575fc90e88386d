"""The summary of evaluated rows, and the printed table."""

import math
import random

import numpy as np
import pytest

from coterie.errors import CoterieError
from coterie.evaluation import table as summaries
from coterie.evaluation.statistics import (
    accuracy_difference,
    holm,
    mcnemar,
    mean_difference,
    ratio_interval,
    sign_flip_test,
)
from coterie.records.evaluation import RowRecord, TableRow


def summarise(rows, *arguments, **options):
    """The summary of rows, both as plain values."""
    records = [RowRecord(**{"prompt": "?", **row}) for row in rows]
    return [line.plain() for line in summaries.summarise(records, *arguments, **options)]


def format_table(lines):
    return summaries.format_table([TableRow(**line) for line in lines])


def result(correct=None, nll=1.0, tokens=1, **more):
    shared = {"text": "", "extracted": None, "finish_reason": "stop"}
    return {**shared, "correct": correct, "nll": nll, "tokens": tokens, **more}


def answered(correct):
    """What a method leaves that writes answers and has no likelihood of a reference."""
    return result(correct, nll=None, tokens=0)


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
    assert every["accuracy_interval"] == pytest.approx([-0.4864, 0.9055], abs=1e-4)
    assert every["nll_interval"] == pytest.approx([-2.9707, 2.9707], abs=1e-4)
    assert lines["maths", "new"]["nll_difference"] == pytest.approx(-0.5)


def test_the_control_has_no_difference_and_an_ungraded_source_no_accuracy(rows):
    lines = by_name(summarise(rows, ["base", "new"], "base", ["chat", "maths"]))
    control, ungraded = lines["maths", "base"], lines["chat", "new"]
    assert control["control"] == ungraded["control"] == "base"
    for measure in ("accuracy", "nll"):
        assert [control[f"{measure}_{name}"] for name in ("difference", "interval", "p")] == [None] * 3
    assert ungraded["accuracy_p"] is None
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
    accuracy = accuracy_difference([True, True, False], [True, False, True])
    nll = mean_difference([0.5, 1.5, 4.5, 1.0], [1.0, 2.0, 4.0, 3.0], weights=[1.0, 3.0, 4.0, 2.0])
    assert line["accuracy_interval"] == [accuracy.low, accuracy.high]
    assert line["nll_interval"] == [nll.low, nll.high]


def test_rows_that_do_not_fit_together_are_told_to_the_user(rows):
    with pytest.raises(CoterieError, match="'nwe'.*Did you mean 'new'"):
        summarise(rows, ["base", "new"], "nwe", ["maths"])
    with pytest.raises(CoterieError, match="row 4 has no result of the method 'new'"):
        summarise([*rows, row("chat", base=result())], ["base", "new"], "base", ["maths"])
    with pytest.raises(CoterieError, match="scored 9 and 7 tokens"):
        summarise([row("a", base=result(tokens=7), new=result(tokens=9))], ["base", "new"], "base", ["a"])


def many_rows(count, *methods, seed=0):
    """Random results, `base` right on odd rows, every later method better than the one before."""
    draw = np.random.default_rng(seed)

    def scored(correct, nll, tokens):
        return result(bool(correct), nll + draw.normal() / 9, tokens)

    rows = []
    for number in range(count):
        tokens = 1 + number % 7
        scores = {"base": scored(number % 2, 2.0, tokens)}
        for rank, name in enumerate(methods):
            scores[name] = scored(draw.uniform() < 0.4 + 0.15 * rank, 2.0 - rank / 20, tokens)
        rows.append(row("maths" if number % 3 else "chat", **scores))
    return rows


def values(rows, method, field):
    return [row["methods"][method][field] for row in rows]


def test_p_values_are_adjusted_within_one_source_and_one_measure():
    rows = many_rows(60, "a", "b", "c")
    table = by_name(summarise(rows, ["base", "a", "b", "c"], "base", ["chat", "maths"], seed=7))
    for source in ("all", "chat", "maths"):
        part = [row for row in rows if source in ("all", row["source"])]
        right = {name: mcnemar(values(part, name, "correct"), values(part, "base", "correct")) for name in "abc"}
        tokens = [float(count) for count in values(part, "base", "tokens")]
        likely = {
            name: sign_flip_test(values(part, name, "nll"), values(part, "base", "nll"), weights=tokens, seed=7)
            for name in "abc"
        }
        assert {name: table[source, name]["accuracy_p"] for name in "abc"} == holm(right)
        assert {name: table[source, name]["nll_p"] for name in "abc"} == holm(likely)
        assert len({*holm(right).values(), *holm(likely).values()}) > 2  # they are not all capped at 1


def test_methods_that_were_not_measured_do_not_count_as_comparisons():
    rows = many_rows(40, "a", "b")
    for row in rows:
        row["methods"]["silent"] = result(None, nll=None, tokens=0)
    names = ["base", "a", "b"]
    without = summarise(rows, names, "base", [""])
    within = summarise(rows, [*names, "silent"], "base", [""])
    assert within[:3] == without
    assert (within[3]["accuracy_p"], within[3]["nll_p"]) == (None, None)


def test_f1_is_the_mean_over_rows_that_have_it():
    rows = [
        row("a", base=result(f1=0.25), new=result()),
        row("a", base=result(f1=1.0), new=result(f1=None)),
        row("a", base=result(), new=result(f1=0.0)),
        row("b", base=result(f1=0.0), new=result()),
    ]
    table = by_name(summarise(rows, ["base", "new"], "base", ["a", "b"]))
    assert [table["all", name]["f1"] for name in ("base", "new")] == [pytest.approx(1.25 / 3), 0]
    assert (table["a", "base"]["f1"], table["b", "new"]["f1"]) == (0.625, None)


def test_a_method_that_only_answers_has_an_accuracy_and_no_nll():
    rows = [row("", base=result(number > 4, 1.0, 3), votes=answered(True)) for number in range(10)]
    rows[3]["methods"]["votes"]["tokens"] = 3
    for control, method in (("base", "votes"), ("votes", "base")):
        table = by_name(summarise(rows, ["base", "votes"], control, [""]))
        votes, compared = table["all", "votes"], table["all", method]
        assert (votes["accuracy"], votes["nll"], votes["oracle_share"]) == (1, None, None)
        assert abs(compared["accuracy_difference"]) == 0.5 and compared["accuracy_p"] == 2 / 2**5
        assert [compared[f"nll_{name}"] for name in ("difference", "interval", "p")] == [None] * 3


# --------------------------------------------------------------------------------------------------------- control


def strongest(*scores):
    """The strongest of `a`, `b` and `c`, given each row's (correct, NLL) of every one."""
    names = "abc"[: len(scores[0])]
    rows = [{name: result(*one) for name, one in zip(names, own, strict=True)} for own in scores]
    return summaries.strongest([RowRecord(prompt="?", methods=own) for own in rows], names)


def test_the_strongest_rival_has_the_highest_accuracy_then_the_lowest_nll_then_comes_first():
    assert strongest([(True, 2.0), (False, 1.0)], [(True, 2.0), (True, 1.0)]) == "a"
    assert strongest([(True, 2.0), (True, 1.0)]) == "b"
    assert strongest([(None, 2.0), (None, 1.0), (None, 1.5)]) == "b"
    assert strongest([(True, None), (True, 1.0)]) == "b"
    assert strongest([(False, 1.0), (False, 1.0)]) == "a"


def test_p_values_pay_for_a_control_that_was_chosen_by_the_rows():
    """Of eight methods that are all alike the best of five is the control; 5% of the trials may have a false call."""
    draw, trials, calls = np.random.default_rng(0), 2000, {1: 0, 5: 0}
    for _ in range(trials):
        scores = draw.normal(size=8)  # means of many rows: two of them are sqrt(2) standard errors apart
        behind = (scores[:5].max() - np.delete(scores, scores[:5].argmax())) / 2**0.5
        p_values = {str(number): math.erfc(abs(gap) / 2**0.5) for number, gap in enumerate(behind)}
        for choices in calls:
            calls[choices] += min(summaries._adjusted(p_values, choices).values()) < 0.05
    assert calls[5] < 0.05 * trials < 0.08 * trials < calls[1]


def test_a_chosen_control_multiplies_p_but_not_beyond_one(rows):
    once = by_name(summarise(rows, ["base", "new"], "base", [""]))["all", "new"]
    thrice = by_name(summarise(rows, ["base", "new"], "base", [""], choices=3))["all", "new"]
    for measure in ("accuracy_p", "nll_p"):
        assert thrice[measure] == min(1.0, 3 * once[measure])


# ---------------------------------------------------------------------------------------------------------- oracle


ORACLE = ("base", "new", "oracle")


def with_oracle(*scores):
    """Rows of (tokens, NLL of base, of new, of the oracle)."""
    names = ("base", "new", "oracle")
    return [
        row("", **{name: result(nll=v, tokens=n) for name, v in zip(names, nll, strict=True)}) for n, *nll in scores
    ]


def oracle_columns(rows, methods=ORACLE, **options):
    table = by_name(summarise(rows, methods, "base", [""], **options))
    return {name: (table["all", name]["oracle_share"], table["all", name]["oracle_share_interval"]) for name in methods}


def test_the_share_of_the_oracles_gain_is_of_token_weighted_means():
    found = oracle_columns(with_oracle((1, 2.0, 1.5, 1.0), (3, 4.0, 4.0, 2.0), (6, 1.0, 1.25, 1.0)))
    assert found["new"][0] == pytest.approx((1 * 0.5 + 3 * 0 - 6 * 0.25) / (1 * 1.0 + 3 * 2.0))
    assert found["base"] == found["oracle"] == (None, None)


def test_the_interval_of_the_share_draws_methods_and_tokens_together():
    scores = [(1, 2.0, 1.5, 1.0), (3, 4.0, 3.9, 2.0), (6, 1.5, 1.25, 1.0), (2, 3.0, 3.1, 2.5)]
    share, interval = oracle_columns(with_oracle(*scores), resamples=300, seed=4)["new"]
    tokens, base, new, oracle = np.array(scores).T
    expected = ratio_interval(tokens * (base - new), tokens * (base - oracle), resamples=300, seed=4)
    assert interval == list(expected) and interval[0] < share < interval[1]
    same = oracle_columns(with_oracle(*((n, b, b - 0.5 * (b - o), o) for n, b, _, o in scores)))["new"]
    assert same == (pytest.approx(0.5), pytest.approx([0.5, 0.5]))  # half the gain on each row is half on any rows


def test_without_a_gain_of_the_oracle_there_is_no_share():
    assert oracle_columns(with_oracle((1, 2.0, 1.0, 2.0), (1, 3.0, 2.0, 3.0)))["new"] == (None, None)
    assert oracle_columns(with_oracle((1, 2.0, 1.0, 2.5), (1, 3.0, 2.0, 3.0)))["new"] == (None, None)


def test_where_the_gain_may_be_nothing_the_share_has_no_interval():
    assert oracle_columns(with_oracle((1, 2.0, 1.5, 1.0), (1, 3.0, 3.0, 3.0)))["new"] == (0.5, None)
    assert oracle_columns(with_oracle((1, 2.0, 1.5, 1.0)))["new"] == (0.5, None)


def test_the_share_needs_both_base_and_oracle_and_rows_that_all_three_have():
    rows = with_oracle((1, 2.0, 1.5, 1.0), (1, 3.0, 2.0, 1.0))
    assert oracle_columns(rows, ("base", "new"))["new"] == (None, None)
    rows[1]["methods"]["new"] = answered(True)
    assert oracle_columns(rows)["new"][0] == 0.5
    rows[0]["methods"]["new"] = answered(True)
    assert oracle_columns(rows)["new"] == (None, None)


# ----------------------------------------------------------------------------------------------------------- table


GAP = {"accuracy_difference": None, "accuracy_interval": None, "accuracy_p": None}
GAP |= {"nll_difference": None, "nll_interval": None, "nll_p": None}


def line(method, source, graded, accuracy, nll, **more):
    """One line of a table; what is not given was not measured."""
    base = {"method": method, "source": source, "control": "base", "rows": 40, "graded": graded, "f1": None}
    oracle = {"oracle_share": None, "oracle_share_interval": None}
    return {**base, **GAP, **oracle, "accuracy": accuracy, "nll": nll, **more}


def right(difference, interval, p):
    return {"accuracy_difference": difference, "accuracy_interval": interval, "accuracy_p": p}


def likely(difference, interval, p):
    return {"nll_difference": difference, "nll_interval": interval, "nll_p": p}


LEGEND = [
    "* significant: p < 0.05. Each interval is of its one difference, not corrected for their number.",
    "p: McNemar's exact test (accuracy), paired sign-flip test (NLL); Holm-adjusted within each list.",
]


def test_the_table_reads_like_this():
    table = [
        line("base", "all", 38, 0.5, 2.0),
        line("better", "all", 38, 0.75, 1.5, **right(0.25, [0.1, 0.4], 0.04), **likely(-0.5, [-0.61, -0.4], 0.0004)),
        line("same", "all", 38, 0.5, 2.01, **right(0.0, [-0.0513, 0.05], 1.0), **likely(0.01, [0.001, 0.03], 0.051)),
        line("base", "", 0, None, 1.0),
        line("better", "", 0, None, 1.5, **likely(0.5, None, 1.0)),
    ]
    assert format_table(table).splitlines() == [
        "all rows: 40 rows, 38 graded",
        "        accuracy  difference, 95% interval      p",
        "base       50.0%",
        "better     75.0%  +25.0 [+10.0, +40.0] *    0.040",
        "same       50.0%  +0.0 [-5.1, +5.0]         1.000",
        "",
        "           NLL  difference, 95% interval           p",
        "base    2.0000",
        "better  1.5000  -0.5000 [-0.6100, -0.4000] *  <0.001",
        "same    2.0100  +0.0100 [+0.0010, +0.0300]     0.051",
        "",
        "no source: 40 rows, 0 graded",
        "           NLL  difference, 95% interval      p",
        "base    1.0000",
        "better  1.5000  +0.5000                   1.000",
        "",
        *LEGEND,
        "Compared with base over all rows, by Holm-adjusted p < 0.05 (comparisons: 2 of accuracy and 2 of",
        "NLL), significant: higher accuracy of better; lower NLL of better. Not significant: accuracy of",
        "same; NLL of same.",
    ]


def test_f1_the_oracle_and_answers_without_likelihood_have_their_places():
    share = {"oracle_share": 0.254, "oracle_share_interval": [-0.1, 0.3]}
    table = [
        line("base", "all", 40, 0.5, 2.0, f1=0.625),
        line("worse", "all", 40, 0.5, 9.0, oracle_share=-70.0, **likely(7.0, [6.5, 7.5], 0.03)),
        line("votes", "all", 40, 0.4, None, **right(-0.1, [-0.2, 0.0], 0.2)),
        line("new", "all", 40, 0.5, 1.75, f1=0.7, **share, **likely(-0.25, [-0.5, 0.1], 0.2)),
        line("oracle", "all", 40, None, 1.0, **likely(-1.0, [-1.5, -0.5], 0.01)),
    ]
    assert format_table(table).splitlines() == [
        "all rows: 40 rows, 40 graded",
        "        accuracy  difference, 95% interval      p     F1",
        "base       50.0%                                   62.5%",
        "worse      50.0%",
        "votes      40.0%  -10.0 [-20.0, +0.0]       0.200",
        "new        50.0%                                   70.0%",
        "oracle         -",
        "",
        "           NLL  difference, 95% interval          p  of the oracle's gain",
        "base    2.0000",
        "worse   9.0000  +7.0000 [+6.5000, +7.5000] *  0.030  <-999%",
        "votes        -",
        "new     1.7500  -0.2500 [-0.5000, +0.1000]    0.200  25% [-10%, 30%]",
        "oracle  1.0000  -1.0000 [-1.5000, -0.5000] *  0.010",
        "",
        *LEGEND,
        "The oracle's gain is how far its NLL lies below that of base; a method's share has a 95% interval.",
        "Compared with base over all rows, by Holm-adjusted p < 0.05 (comparisons: 1 of accuracy and 3 of",
        "NLL), significant: higher NLL of worse; lower NLL of oracle. Not significant: accuracy of votes; NLL",
        "of new.",
    ]


def test_a_star_stands_where_the_difference_is_significant_and_nowhere_else():
    """Ten of ten rows won by eight methods: each interval excludes zero, but Holm's correction leaves some open."""
    names = [f"m{number}" for number in range(8)]
    verdicts = {"base": result(False), **{name: result(True) for name in names}}
    text = format_table(summarise([row("", **verdicts) for _ in range(7)], ["base", *names], "base", [""]))
    assert "0.125" in text  # 8 * 2 / 2**7
    assert " *" not in text.replace("* significant", "").replace("\n", "")


def test_cut_answers_are_counted_for_every_method():
    cut, whole = ({**result(True), "finish_reason": reason} for reason in ("length", "stop"))
    rows = [row("", base=cut, new=cut if number else whole) for number in range(3)]
    text = format_table(summarise(rows, ["base", "new"], "base", [""]))
    assert [line.split()[-1] for line in text.splitlines()[1:4]] == ["cut", "3", "2"]
    assert "cut: answers that the limit of --max-new-tokens broke off." in text
    assert "cut" not in format_table(summarise([row("", base=whole, new=whole)], ["base", "new"], "base", [""]))


@pytest.mark.parametrize("nll", [9.9, 1e30])
def test_the_table_fits_into_100_columns_whatever_the_names_and_numbers(nll):
    long = "a-method-with-a-very-long-name-such-as-nobody-would-ever-give-to-one-of-theirs"
    scores = {"base": result(True, 0.1, 5), long: result(False, nll, 5, f1=1.0), "oracle": result(None, 0.0, 5)}
    rows = [row("s", **scores) for _ in range(3)]
    lines = format_table(summarise(rows, ["base", long, "oracle"], "base", ["s", "t"])).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("a-method-with-a") and line.endswith("<-999% [<-999%, <-999%]") for line in lines)


def test_the_last_sentence_is_careful_where_there_is_little_to_say(rows):
    few = format_table(summarise(rows, ["base", "new"], "base", [""])).replace("\n", " ")
    assert "(comparisons: 1 of accuracy and 1 of NLL), no difference is significant." in few
    assert few.endswith("would show from about 1,568 graded rows on.") and "Not significant" not in few
    enough = format_table(summarise(many_rows(2500, "a"), ["base", "a"], "base", [""]))
    assert "would show from" not in enough
    alone = format_table(summarise(rows, ["base"], "base", [""]))
    assert alone.endswith("No two methods were measured, so there is no difference to test.") and "p:" not in alone


def test_an_unmeasured_method_before_the_control_is_not_taken_for_it():
    rows = [row("", silent=result(None, nll=None, tokens=0), base=result(), new=result()) for _ in range(3)]
    text = format_table(summarise(rows, ["silent", "base", "new"], "base", [""]))
    assert "Compared with base over all rows" in text and "comparisons: 1 of NLL" in text
