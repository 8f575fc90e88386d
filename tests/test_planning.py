"""A plan is what the work then takes: loads and calls exactly, tokens as the profile's replies went."""

import json

import pytest

import tiny
from conftest import write_rows
from coterie.experts.expert_pool import init_pool
from coterie.mixture.scheduler import ExpertScheduler
from coterie.settings.commands import ExpertPoolSettings
from symbolic_place import lines, question, rows


def test_a_plan_counts_what_the_answers_then_cost(fitted, run):
    words = ("--pool", fitted.pool, "--output", fitted.folder / "other", "--aggregator", "judge", "--no-replacement")
    assert run("fit", "symbolic-moe", *words, "--sampler", "softmax", "--retries", 0)[0] == 0
    file = write_rows(fitted.folder / "q.jsonl", [{"instruction": row["instruction"]} for row in rows(6, first=50)])
    asked = ("--input", file, "--max-new-tokens", 500)
    before = fitted.asked()
    code, out, _ = run("plan", fitted.folder / "other", *asked, "--json")
    plan = json.loads(out)
    assert code == 0 and fitted.asked() == before, "nobody is asked"
    assert plan["questions"] == 6 and plan["is_exact"] is False and plan["groups"] == {}
    assert run("generate", fitted.folder / "other", *asked, "--output", fitted.folder / "a.jsonl")[0] == 0
    really = fitted.asked() - before
    assert {name: tally["calls"] for name, tally in plan["experts"].items()} == {
        "maths": really["mathematician"],
        "past": really["historian"],
        "judge": really["wise"],
    }
    calls = plan["experts"]["past"]["calls"]
    assert plan["experts"]["past"]["tokens"] == 3 * calls, "the stub's replies have three tokens"
    assert plan["experts"]["past"]["most_tokens"] == 500 * calls
    assert plan["experts"]["past"]["prompt_tokens"] == pytest.approx(7 * calls, abs=calls)


def test_replies_that_are_there_already_cost_nothing(fitted, run):
    file = write_rows(fitted.folder / "q.jsonl", [{"instruction": row["instruction"]} for row in rows(4, first=50)])
    output = fitted.folder / "a.jsonl"
    words = ("--input", file, "--output", output)
    replies = output.with_name("a.jsonl.replies.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(replies), "unlink", lambda path, missing_ok=False: None)
        assert run("generate", fitted.folder / "run", *words)[0] == 0
    plan = json.loads(run("plan", fitted.folder / "run", *words, "--json")[1])
    assert plan["is_exact"] is True and plan["experts"] == {}
    some = [line for line in lines(replies) if "Keywords" in line["text"]]
    write_rows(replies, some)
    plan = json.loads(run("plan", fitted.folder / "run", *words, "--json")[1])
    assert plan["is_exact"] is True and {n: t["calls"] for n, t in plan["experts"].items()} == {"maths": 2, "past": 2}
    assert len(lines(replies)) == len(some), "planning writes no replies"


def test_a_plan_is_shown_as_tables(fitted, run):
    code, out, _ = run("plan", fitted.folder / "run", question("algebra", 3))
    heads, maths = out.splitlines()[2:4]
    assert code == 0 and out.startswith("1 questions (skills are not known yet")
    assert heads.split() == ["expert", "kind", "calls", "prompt", "tokens", "tokens", "at", "most"]
    assert maths.split()[:3] == ["maths", "endpoint", "6"]


@pytest.fixture
def local_run(tmp_path, run_folder, model_folder, run):
    """Two base models, three experts, profiled by likelihood and fitted."""
    other = tiny.save_model(tmp_path / "other", seed=1)
    experts = [f"{name}={run_folder / 'experts' / name}" for name in ("cluster-0", "cluster-1")]
    init_pool(ExpertPoolSettings(folder=str(tmp_path / "pool"), expert=[*experts, f"other={other}"]))
    data = write_rows(tmp_path / "val.jsonl", [{**row, "category": row["source"]} for row in tiny.make_rows(9, seed=4)])
    words = ("--skills", "category", "--score", "likelihood", "--device", "cpu")
    assert run("profile", tmp_path / "pool", "--data", data, *words)[0] == 0
    words = ("--sampler", "softmax", "--no-replacement", "--min-share", 0, "--aggregator", "other")
    assert run("fit", "symbolic-moe", "--experts", tmp_path / "pool", "--output", tmp_path / "run", *words)[0] == 0
    return tmp_path / "run"


def test_loads_and_memory_are_those_of_the_work(local_run, run, model_folder, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "q.jsonl", [{"instruction": "add 1 2", "category": "sum"}, {"instruction": "add 3 4"}])
    words = ("--input", file, "--device", "cpu", "--max-new-tokens", 4)
    plan = json.loads(run("plan", local_run, *words, "--memory", 0.003, "--json")[1])
    names = {str(model_folder): ["cluster-0", "cluster-1"], str(tmp_path / "other"): ["other"]}
    assert {name: group["experts"] for name, group in plan["groups"].items()} == names
    assert {name: group["loads"] for name, group in plan["groups"].items()} == dict.fromkeys(names, 1)
    assert plan["peak_bytes"] == max(group["bytes"] for group in plan["groups"].values())
    roomy = json.loads(run("plan", local_run, *words, "--memory", 1, "--json")[1])
    assert roomy["peak_bytes"] == sum(group["bytes"] for group in plan["groups"].values())
    assert plan["experts"]["other"]["calls"] >= 2 and plan["is_exact"] is False
    seen = []
    monkeypatch.setattr(ExpertScheduler, "__exit__", lambda s, *_: seen.append((dict(s.loads), s.peak)))
    assert run("generate", local_run, *words, "--memory", 0.003)[0] == 0
    assert seen == [(dict.fromkeys(names, 1), plan["peak_bytes"])]


@pytest.mark.parametrize(("how", "asked"), [("choice", 2), ("category", 1)])
def test_choices_are_counted_for_the_questions_that_are_then_asked(tmp_path, run_folder, run, how, asked):
    """A choice is read off for every question; where rows bring their categories, for those that bring none."""
    pool, experts = tmp_path / "pool", run_folder / "experts"
    init_pool(ExpertPoolSettings(folder=str(pool), expert=[f"{n}={experts / n}" for n in ("cluster-0", "cluster-1")]))
    data = write_rows(tmp_path / "val.jsonl", [{**row, "category": row["source"]} for row in tiny.make_rows(6, seed=4)])
    assert run("profile", pool, "--data", data, "--skills", how, "--score", "likelihood", "--device", "cpu")[0] == 0
    fitted = ("fit", "symbolic-moe", "--experts", pool, "--output", tmp_path / "run", "--recruits", 1)
    assert run(*fitted, "--sampler", "top", "--min-share", 0, "--aggregator", "majority")[0] == 0
    file = write_rows(tmp_path / "q.jsonl", [{"instruction": "add 1 2", "category": "sum"}, {"instruction": "add 3 4"}])
    plan = json.loads(run("plan", tmp_path / "run", "--input", file, "--device", "cpu", "--json")[1])
    calls = sum(tally["calls"] for tally in plan["experts"].values())
    assert calls - 2 == asked + 1, "two answers; a choice for each question asked, and for none"


def test_nothing_is_loaded_for_a_plan(local_run, run, tmp_path, monkeypatch):
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("coterie.mixture.memory.load_local", load)
    code, out, err = run("plan", local_run, "add 1 2", "--device", "cpu")
    assert code == 0 and "loads" in out and "answers of" not in err, "and no progress is shown"
