"""Methods compared on held-out rows: one batch for all, plain records of who said what, and the way back in."""

import json
import re

import pytest

from conftest import write_rows
from coterie.methods.symbolic.methods import METHODS
from helpers import refused
from stub_server import Got, Sent, completion
from symbolic_place import lines, respond, rows


@pytest.fixture
def evaluate(fitted, run):
    """Evaluate the fitted run on eight rows."""
    data = write_rows(fitted.folder / "test.jsonl", rows(8, first=50))

    def command(*words: object):
        output = fitted.folder / "eval"
        return run("eval", fitted.folder / "run", "--data", data, "--output", output, "--resamples", 100, *words)

    return command


def test_all_methods_are_compared_in_one_batch(fitted, evaluate):
    before = fitted.asked()
    code, out, _ = evaluate("--json")
    summary = json.loads(out)
    accuracy = {row["method"]: row["accuracy"] for row in summary["table"] if row["source"] == "all"}
    assert code == 0 and list(accuracy) == list(METHODS)
    assert accuracy["symbolic-moe"] == accuracy["majority"] == accuracy["weighted-vote"] == 1.0
    assert accuracy["best-single"] == accuracy["self-consistency"] == 0.5, "one expert knows half of the questions"
    assert summary["control"] == "best-single" and summary["recruits"] == {"maths": 12, "past": 12, "judge": 0}
    asked = fitted.asked() - before
    assert asked["mathematician"] <= 5 * 8 + 8 + 5 * 8, "keywords, one greedy answer each, five samples each"
    assert asked["historian"] <= 8 and asked["wise"] <= 8
    assert (fitted.folder / "eval" / "evaluation.json").exists()


def test_the_records_tell_who_said_what_and_at_which_cost(fitted, evaluate):
    assert evaluate("--methods", "symbolic-moe,best-single,past")[0] == 0
    first, second, *_ = lines(fitted.folder / "eval" / "rows.jsonl")
    assert first["skills"] == ["algebra"] and first["weights"] == {"maths": 1, "past": 0, "judge": 0}
    assert [given["correct"] for given in first["recruited"]["answers"]] == [True] * 3
    assert {given["expert"] for given in second["recruited"]["answers"]} == {"past"}
    assert first["methods"]["past"]["correct"] is False and first["methods"]["past"]["text"] == "The answer is 2."
    outcome = first["recruited"]
    assert [given["expert"] for given in outcome["answers"]] == ["maths"] * 3 and outcome["synthesis"] is None
    assert outcome["cost"]["tokens"] == 3, "greedy repeats are one reply"
    summary = json.loads((fitted.folder / "eval" / "evaluation.json").read_text())
    assert summary["profile"]["right"] == [[5, 0], [0, 5], [0, 0]]
    assert summary["costs"]["symbolic-moe"]["calls"] == 1 and summary["costs"]["best-single"]["calls"] == 1
    assert summary["routing_by_category"]["history"] == {"maths": 0, "past": 1, "judge": 0}


def test_the_report_tells_who_was_recruited_and_who_was_right(fitted, evaluate, run):
    fitted.stub.respond = lambda got: completion("<b>odd</b>") if "number 57" in got.question else respond(got)
    assert evaluate()[0] == 0
    code, out, _ = run("report", fitted.folder / "eval")
    page = (fitted.folder / "eval" / "report.html").read_text()
    assert code == 0 and "symbolic-moe" in page and "weighted-vote" in page
    section = page.partition('<section id="recruiting">')[2].partition("</section>")[0]
    assert section.count('<td class="cell s10">5/5</td>') == 2 and section.count('<td class="cell s0">0/5</td>') == 4
    recruited = re.findall(r"<span>(\w+)</span></th><td class=.number.>(\d+)</td>.*?lead.>(.*?)<", section)
    rows_ = lines(fitted.folder / "eval" / "rows.jsonl")
    said = [given for row in rows_ for given in row["recruited"]["answers"]]
    for name, answers, right in recruited:
        own = [given["correct"] for given in said if given["expert"] == name]
        assert int(answers) == len(own) and right == (f"{100 * sum(own) / len(own):.1f}%" if own else "–")
    assert [name for name, _, _ in recruited] == ["maths", "past", "judge"]
    assert section.count("<details") == 8 and "&lt;b&gt;odd" in section and "<b>odd" not in section
    assert "The answer is 150." in section and "no skill known" in section


def test_a_report_on_other_methods_has_no_such_section(fitted, evaluate, run):
    assert evaluate("--methods", "best-single,past")[0] == 0
    folder = fitted.folder / "eval"
    rows_ = [{**row, "recruited": None} for row in lines(folder / "rows.jsonl")]
    write_rows(folder / "rows.jsonl", rows_)
    assert run("report", folder)[0] == 0 and 'id="recruiting"' not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"right": [[1]]}, "'right' should be 3 lists of 2 numbers"),
        ({"trials": [["x", 1]] * 3}, "'profile', 'trials' 1 1: should be a valid number"),
        ({"skills": 3}, "'profile', 'skills': should be a valid tuple"),
    ],
)
def test_broken_records_are_refused_by_the_report(fitted, evaluate, run, change, pattern):
    assert evaluate("--methods", "symbolic-moe")[0] == 0
    path = fitted.folder / "eval" / "evaluation.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "profile": {**summary["profile"], **change}}))
    refused(run("report", fitted.folder / "eval"), pattern)


def test_an_interrupted_evaluation_goes_on_with_the_replies_it_had(fitted, evaluate):
    asked: list[Got] = []

    def broken(got: Got) -> Sent:
        asked.append(got)
        if len(asked) > 30:
            raise ConnectionResetError  # the server is killed, and so is the evaluation below
        return respond(got)

    fitted.stub.respond = broken
    words = ("--methods", "symbolic-moe,best-single", "--concurrency", 1, "--retries", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coterie.evaluation.symbolic.answer_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err = evaluate(*words)
    assert code == 130 and "goes on where it stopped" in err
    kept = len(lines(fitted.folder / "eval.partial" / "working" / "replies.jsonl"))
    assert kept == 30
    fitted.stub.respond = respond
    before = len(fitted.stub.requests)
    assert evaluate(*words)[0] == 0
    assert len(fitted.stub.requests) - before == 5 * 8 - 30 + 8 + 4  # keywords left; maths on all, past on its four
    assert not (fitted.folder / "eval.partial").exists()


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--methods", "symbolic-moe,elrea"], r"no method or expert is called 'elrea'"),
        (["--methods", "symbolic-moe", "--control", "past"], r"to compare with among those evaluated is called 'past'"),
        (["--no-generate"], r"--no-generate leaves nothing to measure"),
        (["--few-shot", "x.jsonl"], r"--few-shot does not apply"),
    ],
)
def test_bad_calls_are_refused(fitted, evaluate, words, pattern):
    before = len(fitted.stub.requests)
    refused(evaluate(*words), pattern)
    assert not list(fitted.folder.glob("eval*")) and len(fitted.stub.requests) == before


def test_the_control_is_the_single_expert_that_does_best(fitted, evaluate):
    code, out, _ = evaluate("--methods", "symbolic-moe,past,maths", "--json")
    found = json.loads(out)
    right = {line["method"]: line["accuracy"] for line in found["table"] if line["source"] == "all"}
    assert code == 0 and found["control_among"] == ["past", "maths"]
    assert found["control"] == max(("past", "maths"), key=right.__getitem__)
