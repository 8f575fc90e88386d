"""The spread of results over evaluations of mixtures that were fitted with other seeds."""

import json
import math
import sys

import pytest
import scipy.stats

import coterie
from coterie import cli
from coterie.artifacts import write_json
from coterie.errors import CoterieError
from coterie.evaluation.seeds import format_spread, read_spread, spread
from coterie.evaluation.table import summarise
from coterie.records.evaluation import RowRecord


def line(method, accuracy=None, nll=None, *, above=(None, None), source="all"):
    """A row of a table; `above` holds the differences of accuracy and NLL to the control."""
    measured = {"accuracy": accuracy, "accuracy_difference": above[0], "nll": nll, "nll_difference": above[1]}
    return {"method": method, "source": source, "rows": 8, "graded": 8, **measured}


def evaluation(*lines, **changes):
    shared = {"format": 1, "mixture": "runs/elrea", "data": "test.jsonl", "rows": 8, "control": "base", "sources": []}
    methods = ["base", *(line["method"] for line in lines)]
    return {**shared, "methods": methods, "experts": [], "table": list(lines), **changes}


def seeds(*pairs):
    """Evaluations in which `base` has accuracy 0.5 and NLL 2, and `new` has these differences to it."""
    return [
        evaluation(line("base", 0.5, 2.0), line("new", 0.5 + right, 2.0 + nll, above=(right, nll)))
        for right, nll in pairs
    ]


def test_a_spread_has_these_hand_worked_values():
    base, new = spread(seeds((0.1, -0.5), (0.2, -0.5), (0.3, -0.2)))
    assert (base["method"], base["accuracy_difference"], base["nll_difference"]) == ("base", None, None)
    assert (new["method"], new["control"]) == ("new", "base")
    reach = 4.302653 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5%, standard deviation 0.1
    expected = {"n": 3, "mean": 0.2, "sd": 0.1, "min": 0.1, "max": 0.3}
    found = new["accuracy_difference"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["interval"] == pytest.approx([0.2 - reach, 0.2 + reach], rel=1e-6)
    assert new["accuracy"]["mean"] == pytest.approx(0.7)
    assert [new["nll"][name] for name in ("mean", "sd", "min", "max")] == pytest.approx([1.6, 0.03**0.5, 1.5, 1.8])
    assert new["nll_difference"]["mean"] == pytest.approx(-0.4)


def test_the_order_of_the_evaluations_changes_nothing():
    given = seeds((0.125, -0.5), (0.25, -0.25), (0.5, 0.5))  # sums of these have no rounding that depends on order
    assert spread(given) == spread(given[::-1])


def test_the_spread_of_summaries_reads_their_lines_over_all_rows():
    def scored(correct, nll):
        return {"correct": correct, "nll": nll, "tokens": 2}

    def one(right, nll):
        methods = {"base": scored(False, 2.0), "new": scored(right, nll)}
        rows = [RowRecord(prompt="?", source=source, methods=methods) for source in "abab"]
        lines = [line.plain() for line in summarise(rows, ["base", "new"], "base", ["a", "b"])]
        return evaluation(*lines, rows=4)

    found = spread([one(True, 1.0), one(False, 1.5)])[1]
    assert (found["accuracy"]["min"], found["accuracy"]["max"], found["nll_difference"]["mean"]) == (0, 1, -0.75)


def test_two_seeds_have_a_deviation_and_no_interval():
    found = spread(seeds((0.1, -0.5), (0.3, -0.5)))[1]["accuracy_difference"]
    assert found["sd"] == pytest.approx(0.2 / math.sqrt(2)) and found["interval"] is None


def test_a_measure_counts_the_evaluations_that_have_it():
    given = seeds((0.1, -0.5), (0.2, -0.5), (0.3, -0.5))
    given[0]["table"][1].update(accuracy=None, accuracy_difference=None, nll=None, nll_difference=None)
    given[1]["table"][1].update(nll=None, nll_difference=None)
    found = spread(given)[1]
    assert (found["accuracy"]["n"], found["nll"]["n"], found["nll"]["sd"]) == (2, 1, None)
    for other in given:
        other["table"][1].update(nll=None, nll_difference=None)
    assert spread(given)[1]["nll"] is None


def test_methods_that_not_all_evaluations_have_are_left_out():
    given = [
        evaluation(line("base", 0.5), line("a", 0.5), line("b", 0.5)),
        evaluation(line("b", 0.5), line("c", 0.5), line("base", 0.5), line("a", 0.5, source="maths")),
    ]
    assert [row["method"] for row in spread(given)] == ["base", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "other.jsonl"}, "evaluations 1 and 3 have 'test.jsonl' and 'other.jsonl' as data"),
        ({"rows": 9}, "1 and 3 have 8 and 9 as rows"),
        ({"control": "new"}, "1 and 3 have 'base' and 'new' as control"),
        ({"table": []}, "no method stands in the tables of all"),
        ({"table": None}, "evaluation 3, 'table': should be .*, got null; give what `coterie eval` wrote"),
        ({"rows": "8"}, "evaluation 3, 'rows': should be a valid integer"),
        ({"table": [{**line("new"), "nll": float("nan")}]}, "evaluation 3, 'table' 1, 'nll': should be a finite"),
        (
            {"table": [{**line("new"), "accuracy": "high"}]},
            "evaluation 3, 'table' 1, 'accuracy': should be a valid number",
        ),
        ({"table": [{"method": "new"}]}, "evaluation 3, 'table' 1, 'source': is missing"),
    ],
)
def test_what_cannot_be_compared_is_told_to_the_user(change, message):
    given = seeds((0.1, 0.0), (0.1, 0.0), (0.1, 0.0))
    given[2] |= change
    with pytest.raises(CoterieError, match=message):
        spread(given)


def test_one_evaluation_has_no_spread():
    with pytest.raises(CoterieError, match="at least two seeds; got 1"):
        spread(seeds((0.1, 0.0)))


# ----------------------------------------------------------------------------------------------------- plain text


def test_the_spread_reads_like_this():
    assert format_spread(spread(seeds((0.1, -0.5), (0.12, -0.5), (0.11, -0.2)))).splitlines() == [
        "accuracy",
        "      n   mean   sd    min    max",
        "base  3  50.0%  0.0  50.0%  50.0%",
        "new   3  61.0%  1.0  60.0%  62.0%",
        "",
        "accuracy above base, points",
        "     n   mean   sd    min    max  95% interval of the mean",
        "new  3  +11.0  1.0  +10.0  +12.0  [+8.5, +13.5]",
        "",
        "NLL",
        "      n    mean      sd     min     max",
        "base  3  2.0000  0.0000  2.0000  2.0000",
        "new   3  1.6000  0.1732  1.5000  1.8000",
        "",
        "NLL above base",
        "     n     mean      sd      min      max  95% interval of the mean",
        "new  3  -0.4000  0.1732  -0.5000  -0.2000  [-0.8303, +0.0303]",
        "",
        "Over 3 seeds, the 95% t-interval of the mean difference to base excludes zero for higher accuracy of",
        "new. It includes zero for NLL of new. Intervals are over seeds on these same rows, and are not",
        "corrected for their number (2).",
    ]


def conclusion(*pairs):
    return format_spread(spread(seeds(*pairs))).split("\n\n")[-1].replace("\n", " ")


def test_the_last_sentences_say_what_few_or_equal_seeds_allow():
    assert conclusion((0.1, -0.5), (0.3, -0.4)).startswith("Two seeds show no spread worth testing")
    equal = conclusion((0.1, -0.5), (0.1, -0.4), (0.1, 0.9))
    assert "excludes zero for none. It includes zero for NLL of new. " in equal
    assert "The same with every seed: accuracy of new. " in equal
    assert "not corrected for their number (1)." in equal
    alone = format_spread(spread([evaluation(line("base", 0.5)) for _ in range(3)]))
    assert alone.endswith("no difference to test.") and "NLL" not in alone


@pytest.mark.parametrize("gaps", [(0.1, 0.11, 0.3), (0.1, 0.11, 0.31, -0.02), (-0.1, -0.1, -0.12), (0.0, 0.2, 0.1)])
def test_zero_is_excluded_where_the_t_test_is_significant(gaps):
    significant = scipy.stats.ttest_1samp(gaps, 0).pvalue < 0.05
    text = conclusion(*((gap, 0.0) for gap in gaps))
    way = "higher" if sum(gaps) > 0 else "lower"
    assert (f"excludes zero for {way} accuracy of new" in text) == significant
    assert ("includes zero for accuracy of new" in text) == (not significant)


def test_long_names_and_many_methods_stay_within_100_columns():
    names = ["base", *(f"a-method-of-{'many-' * 15}words-{number}" for number in range(9))]
    given = [
        evaluation(*(line(name, 0.1 * seed, 1e4, above=(-0.9, 1e9 * seed)) for name in names)) for seed in range(4)
    ]
    assert max(map(len, format_spread(spread(given)).splitlines())) <= 100


# -------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folders(tmp_path):
    paths = [tmp_path / f"eval-{number}" for number in range(3)]
    for path, one in zip(paths, seeds((0.1, -0.5), (0.2, -0.5), (0.3, -0.2)), strict=True):
        write_json(path / "evaluation.json", one)
    return paths


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*words: object):
        monkeypatch.setattr(sys, "argv", ["coterie", "spread", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return command


def test_the_command_prints_what_python_returns(run, folders):
    rows = coterie.read_spread(folders)
    assert rows == coterie.spread(seeds((0.1, -0.5), (0.2, -0.5), (0.3, -0.2)))
    code, out, _ = run(*folders)
    assert (code, out) == (0, coterie.format_spread(rows) + "\n")
    code, out, _ = run(*folders, "--json")
    assert code == 0 and [json.loads(text) for text in out.splitlines()] == rows


def test_folders_that_cannot_be_compared_are_one_line_and_exit_2(run, folders, tmp_path):
    for words, message in (
        (folders[:1], "at least two seeds"),
        ([*folders, folders[0].parent / "eval-1" / ".." / "eval-0"], "eval-0 is given twice"),
        ([folders[0], tmp_path / "nowhere"], "nowhere holds no evaluation.json; make one with"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_folders_are_read_by_name_too(folders, monkeypatch):
    monkeypatch.chdir(folders[0].parent)
    assert read_spread(["eval-0", "eval-1", "eval-2"]) == read_spread(folders)
