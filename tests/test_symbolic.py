"""Symbolic-MoE from pool to answers: endpoints that are good at one thing each, over real HTTP, and tiny models."""

import json
import re
from collections import Counter

import pytest
import torch

import tiny
from conftest import write_rows
from coterie.combiners.aggregate import elect, synthesis_request
from coterie.data.examples import Example, Message, load_examples
from coterie.errors import CoterieError
from coterie.experts.expert_pool import init_pool
from coterie.grading.grade import after_thinking, is_right
from coterie.methods.symbolic.aggregator import make_up
from coterie.methods.symbolic.fit import load_symbolic
from coterie.methods.symbolic.profile import PROFILE, read_profile
from coterie.methods.symbolic.skills import keyword_asks, settled
from coterie.settings.commands import ExpertPoolSettings
from coterie.settings.groups import SamplingSettings, SkillSettings
from helpers import refused
from stub_server import Got, Sent, completion
from symbolic_place import EXPERTS, lines, question, respond, right_answer, rows


def test_a_profile_says_who_is_good_at_what(place, run):
    data = write_rows(place.folder / "val.jsonl", rows(10))
    code, out, _ = run("profile", place.pool, "--data", data, "--encoder", "none", "--json")
    record = json.loads(out)
    assert code == 0 and record["skills"] == ["algebra", "history"]
    assert record["right"] == [[5, 0], [0, 5], [0, 0]] and record["trials"] == [[5, 5]] * 3
    assert place.asked() == {"mathematician": 10 + 5 * 10, "historian": 10, "wise": 10}, "the first expert names skills"
    kept = lines(place.pool / PROFILE / "validation.jsonl")
    assert kept[0]["skills"] == ["algebra"] and kept[0]["scores"] == {"maths": 1, "past": -1, "judge": -1}
    assert kept[0]["replies"]["maths"]["text"].endswith("The answer is 100.")
    before = len(place.stub.requests)
    code, out, _ = run("profile", place.pool, "--data", data, "--encoder", "none", "--overwrite")
    assert code == 0 and len(place.stub.requests) == before, "all replies are kept by the hash of what was asked"
    assert out.splitlines()[0].split() == ["expert", "right", "failed", "algebra", "history"]
    assert out.splitlines()[1].split() == ["maths", "50%", "0", "+5", "-5"]


def test_skills_can_come_from_the_rows(place, run):
    data = write_rows(place.folder / "val.jsonl", rows(4))
    code, out, _ = run("profile", place.pool, "--data", data, "--skills", "category", "--json")
    assert code == 0 and json.loads(out)["right"] == [[2, 0], [0, 2], [0, 0]]
    assert sum(place.asked().values()) == 3 * 4


@pytest.mark.parametrize(
    ("categories", "sources", "given", "by"),
    [
        ("aabb", "ccdd", {}, "category"),
        ("    ", "ccdd", {}, "source"),
        ("aab ", "ccdd", {}, "source"),  # one row has none
        ("abcd", "ccdd", {}, "source"),  # each its own
        ("aaaa", "cccc", {}, "keywords"),  # one for all
        ("    ", "    ", {}, "keywords"),
        ("aabb", "ccdd", {"skills": "source"}, "source"),
        ("aabb", "ccdd", {"skills": "keywords"}, "keywords"),
        ("aabb", "ccdd", {"skill_expert": "maths"}, "keywords"),
    ],
)
def test_rows_bring_their_skills_where_most_share_them(categories, sources, given, by):
    labels = zip(categories, sources, strict=True)
    examples = [
        Example("q", (Message("user", "hi"),), source=own.strip() or None, category=kind.strip() or None)
        for kind, own in labels
    ]
    assert settled(SkillSettings(**given), examples) == SkillSettings(**{**given, "skills": by})


def test_a_profile_takes_the_rows_categories_unless_it_is_told_how_to_ask_and_says_so(place, run, caplog):
    data = write_rows(place.folder / "val.jsonl", rows(4))
    code, out, _ = run("profile", place.pool, "--data", data, "--json")
    assert code == 0 and json.loads(out)["skills_by"]["skills"] == "category"
    assert sum(place.asked().values()) == 3 * 4, "nobody is asked for keywords"
    assert "the rows' category is the skill that they need" in caplog.text
    assert read_profile(place.pool / PROFILE).how.skills == "category"


def test_questions_that_share_no_skill_are_told_once_by_profile_and_fit(place, run, caplog):
    data = write_rows(place.folder / "val.jsonl", rows(3))  # of algebra, history, algebra
    fit = ("fit", "symbolic-moe", "--experts", place.pool, "--output", place.folder / "run", "--aggregator", "judge")
    for words in (("profile", place.pool, "--data", data, "--skills", "category"), fit):
        caplog.clear()
        assert run(*words)[0] == 0
        assert caplog.text.count("1 of 3 questions share no skill with another; where skills are unknown") == 1
    caplog.clear()
    more = write_rows(place.folder / "more.jsonl", rows(4))
    assert run("profile", place.pool, "--data", more, "--skills", "category", "--overwrite")[0] == 0
    assert "share no skill" not in caplog.text


def test_a_failing_expert_is_reported_and_counts_as_untried(place, run):
    def faulty(got: Got) -> Sent:
        return Sent(500, {}) if got.body["model"] == "historian" else respond(got)

    place.stub.respond = faulty
    data = write_rows(place.folder / "val.jsonl", rows(4))
    words = ("--data", data, "--skills", "category", "--json", "--retries", 0)
    code, out, err = run("profile", place.pool, *words)
    assert code == 0 and json.loads(out)["trials"] == [[2, 2], [0, 0], [2, 2]]
    assert json.loads(out)["failed"] == {"maths": 0, "past": 4, "judge": 0}
    assert str(read_profile(place.pool / PROFILE)).splitlines()[2].split()[:3] == ["past", "0%", "4"]
    place.stub.respond = respond
    code, out, _ = run("profile", place.pool, *words, "--overwrite")
    assert code == 0 and json.loads(out)["trials"] == [[2, 2]] * 3, "what failed is asked for again"


def test_an_answer_without_content_is_wrong_and_not_missing(place, run):
    def thoughtful(got: Got) -> Sent:
        if int(re.search(r"the number (\d+)", got.question)[1]) < 4:  # all tokens went into reasoning
            return Sent(200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]})
        return completion(right_answer(got.question))

    place.stub.respond = thoughtful
    data = write_rows(place.folder / "val.jsonl", rows(8))
    code, out, _ = run("profile", place.pool, "--data", data, "--skills", "category")
    assert code == 0 and out.splitlines()[1].split() == ["maths", "50%", "0", "+0", "+0"]
    profile = read_profile(place.pool / PROFILE).profile
    assert (profile.right.tolist(), profile.trials.tolist()) == ([[2, 2]] * 3, [[4, 4]] * 3)


def test_a_pool_in_which_nobody_answers_has_no_profile(place, run):
    place.stub.respond = lambda got: Sent(401, {})
    data = write_rows(place.folder / "val.jsonl", rows(4))
    result = run("profile", place.pool, "--data", data, "--skills", "category", "--retries", 0)
    refused(result, "no expert answered any question; the first failed with: .* check the key in COTERIE_KEY_MATHS")
    assert [path.name for path in place.pool.iterdir()] == ["pool.json"]


def test_the_best_aggregator_is_found_on_made_up_tasks(fitted):
    record = json.loads((fitted.folder / "run" / "mixture.json").read_text())
    judged = record["combiner"]["judged"]
    accuracy = [r / t for r, t in zip(judged["overall_right"], judged["overall_trials"], strict=True)]
    assert dict(zip(judged["experts"], accuracy, strict=True)) == {
        "majority": pytest.approx(0.3, abs=0.31),  # three different answers: a draw
        "weighted-vote": 1.0,  # the others' profile names the expert that is right
        "maths": 0.0,
        "past": 0.0,
        "judge": 1.0,
    }
    assert record["combiner"]["aggregator"] == "weighted-vote", "of equals the one that costs nothing"
    assert record["method"] == "symbolic-moe" and list(record["pool"]) == ["maths", "past", "judge"]


def test_made_up_tasks_hold_one_right_answer_and_wrong_ones_without_thinking(fitted):
    profiled = read_profile(fitted.pool / PROFILE)
    tasks = make_up(profiled, 100)
    assert [task.number for task in tasks] == list(range(10))
    for task in tasks:
        assert len(task.texts) == 3 and len(set(task.experts)) == 3
        assert task.experts[task.right] == ("maths", "past")[task.number % 2]
        assert task.texts[task.right] == f"The answer is {100 + task.number}."
    assert len({task.right for task in tasks}) == 3, "answers are shuffled"
    assert [t.experts for t in make_up(profiled, 100)] == [t.experts for t in tasks]
    assert [t.experts for t in make_up(profiled, 100, seed=1)] != [t.experts for t in tasks]
    assert len(make_up(profiled, 4)) == 4
    for row in profiled.rows:
        row["scores"] = dict.fromkeys(row["scores"], 1.0)
    assert make_up(profiled, 100) == [], "questions that all answer rightly make no task"


def test_every_question_reaches_the_expert_that_knows(fitted, run):
    before = fitted.asked()
    file = write_rows(fitted.folder / "q.jsonl", [{"instruction": row["instruction"]} for row in rows(6, first=50)])
    output = fitted.folder / "answers.jsonl"
    code, out, _ = run("generate", fitted.folder / "run", "--input", file, "--output", output)
    assert code == 0 and out.strip() == f"{output}: 6 answers"
    answers = lines(output)
    assert [row["text"] for row in answers] == [f"The answer is {150 + n}." for n in range(6)]
    assert [row["skills"] for row in answers] == [["algebra"], ["history"]] * 3
    assert answers[0]["recruits"] == {"maths": 3, "past": 0, "judge": 0}
    assert [given["expert"] for given in answers[0]["answers"]] == ["maths"] * 3
    assert answers[0]["cost"] == {"calls": 1, "prompt_tokens": 7, "tokens": 3, "seconds": pytest.approx(0, abs=5)}
    asked = fitted.asked() - before
    assert asked == {"mathematician": 5 * 6 + 3, "historian": 3}, "greedy repeats are asked once"
    assert not (fitted.folder / "answers.jsonl.replies.jsonl").exists()


def test_a_model_makes_one_answer_of_several(fitted, run):
    words = (
        "--pool",
        fitted.pool,
        "--output",
        fitted.folder / "other",
        "--aggregator",
        "judge",
        "--sampler",
        "softmax",
    )
    assert run("fit", "symbolic-moe", *words, "--no-replacement")[0] == 0
    code, out, _ = run("generate", fitted.folder / "other", question("algebra", 7), "--json")
    record = json.loads(out)
    assert code == 0 and record["text"] == "The answer is 107." and record["aggregator"] == "judge"
    assert record["synthesis"]["text"].startswith("<think>")
    assert record["cost"]["calls"] == 4
    sent = fitted.stub.requests[-1].question
    assert "Answer 3:\nThe answer is" in sent and "<think>" not in sent and question("algebra", 7) in sent


def test_inputs_of_prompts_join_as_those_of_the_profile(fitted, run):
    """The template is that of the profile's rows, which the run keeps."""
    assert json.loads((fitted.folder / "run" / "mixture.json").read_text())["input_template"] is None
    record = fitted.pool / PROFILE / "run.yaml"
    record.write_text(record.read_text().replace("input_template: null", "input_template: '{input} {instruction}'"))
    words = ("--experts", fitted.pool, "--output", fitted.folder / "other", "--aggregator", "majority")
    assert run("fit", "symbolic-moe", *words)[0] == 0
    row = {"instruction": "with the number 7?", "input": "A question of algebra"}
    file = write_rows(fitted.folder / "q.jsonl", [row])
    code, out, _ = run("generate", fitted.folder / "other", "--input", file, "--json")
    assert code == 0 and json.loads(out)["prompt"] == question("algebra", 7)


def test_a_vote_stands_in_for_an_aggregator_that_fails(fitted, run):
    words = ("--pool", fitted.pool, "--output", fitted.folder / "other", "--aggregator", "judge", "--recruits", 1)
    assert run("fit", "symbolic-moe", *words)[0] == 0
    fitted.stub.respond = lambda got: Sent(500, {}) if got.body["model"] == "wise" else respond(got)
    output = fitted.folder / "answers.jsonl"
    command = ("generate", fitted.folder / "other", question("algebra", 7), "--output", output, "--retries", 0)
    assert run(*command)[0] == 0
    (record,) = lines(output)
    assert record["text"] == "The answer is 107." and record["aggregator"] == "weighted-vote"
    assert "answered 500" in record["synthesis"]["error"]
    kept = output.with_name("answers.jsonl.replies.jsonl")
    assert len(lines(kept)) == 6, "five lists of keywords and one answer"
    before, fitted.stub.respond = len(fitted.stub.requests), respond
    assert run(*command)[0] == 2 and run(*command, "--overwrite")[0] == 0
    assert lines(output)[0]["aggregator"] == "judge"
    assert len(fitted.stub.requests) == before + 1 and not kept.exists()


def test_an_interrupted_run_asks_only_for_what_is_missing(fitted, run):
    file = write_rows(fitted.folder / "q.jsonl", [{"instruction": row["instruction"]} for row in rows(6, first=50)])
    output = fitted.folder / "answers.jsonl"
    command = ("generate", fitted.folder / "run", "--input", file, "--output", output, "--concurrency", 1)
    seen = []

    def killed(got: Got) -> Sent:
        seen.append(got)
        return respond(got)

    fitted.stub.respond = killed
    code, _, _ = run(*command)
    whole, asked = lines(output), len(seen)
    output.unlink()
    kept = output.with_name("answers.jsonl.replies.jsonl")
    kept.write_text("")
    fitted.stub.respond = lambda got: Sent(401, {}) if len(seen) >= asked + 20 else killed(got)
    run(*command)  # the server turns everything away after twenty replies
    assert len(lines(kept)) == 20
    fitted.stub.respond = killed
    code, _, _ = run(*command, "--overwrite")
    again = lines(output)
    assert code == 0 and len(seen) == 2 * asked
    assert [(row["text"], row["recruits"]) for row in again] == [(row["text"], row["recruits"]) for row in whole]


def test_without_any_answer_there_is_a_record_that_says_why(fitted, run):
    fitted.stub.respond = lambda got: respond(got) if "Keywords" in got.question else Sent(400, {})
    code, out, _ = run("generate", fitted.folder / "run", question("algebra", 7), "--json")
    record = json.loads(out)
    assert code == 0 and record["text"] == "" and record["finish_reason"] == "failed"
    assert {"answered 400" in given["error"] for given in record["answers"]} == {True}


def test_the_same_seed_gives_the_same_recruits(fitted, run):
    words = (
        "--pool",
        fitted.pool,
        "--output",
        fitted.folder / "other",
        "--aggregator",
        "majority",
        "--sampler",
        "softmax",
    )
    assert run("fit", "symbolic-moe", *words, "--min-share", 0)[0] == 0
    file = write_rows(fitted.folder / "q.jsonl", [{"instruction": row["instruction"]} for row in rows(20, first=50)])

    def recruits(seed: int) -> list[dict[str, float]]:
        out = run("generate", fitted.folder / "other", "--input", file, "--json", "--seed", seed)[1]
        return [json.loads(line)["recruits"] for line in out.splitlines()]

    assert recruits(1) == recruits(1) != recruits(2)


def test_another_method_answers_by_name(fitted, run):
    asked = ("generate", fitted.folder / "run", question("history", 7), "--json", "--method")
    assert json.loads(run(*asked, "best-single")[1])["recruits"] == {"maths": 1, "past": 0, "judge": 0}
    assert json.loads(run(*asked, "past")[1])["text"] == "The answer is 107."
    record = json.loads(run(*asked, "self-consistency")[1])
    assert record["recruits"]["maths"] == 5 and record["cost"]["calls"] == 5
    assert sum(json.loads(run(*asked, "random-experts")[1])["recruits"].values()) == 3
    refused(run(*asked, "majorty"), "no method or expert is called 'majorty'. Did you mean 'majority'")


KEY = "sk-very-secret-0123456789"


def test_the_key_stands_in_no_file_and_no_log(place, run, monkeypatch, caplog):
    def leaking(got: Got) -> Sent:
        if got.body["model"] == "wise":
            return Sent(400, {"error": {"message": f"bad key {got.key}"}})
        return completion(respond(got).body["choices"][0]["message"]["content"] + f" (by {got.key})")

    place.stub.respond = leaking
    for name in EXPERTS:
        monkeypatch.setenv(f"COTERIE_KEY_{name.upper()}", KEY)
    caplog.set_level("DEBUG")
    data = write_rows(place.folder / "val.jsonl", rows(4))
    printed = [run("profile", place.pool, "--data", data, "--encoder", "none", "--retries", 0)]
    printed += [run("fit", "symbolic-moe", "--experts", place.pool, "--output", place.folder / "run", "--retries", 0)]
    output = place.folder / "answers.jsonl"
    printed += [run("generate", place.folder / "run", question("algebra", 3), "--output", output, "--retries", 0)]
    assert [code for code, _, _ in printed] == [0, 0, 0]
    assert {got.key for got in place.stub.requests} == {f"Bearer {KEY}"}
    files = [path for path in place.folder.rglob("*") if path.is_file()]
    assert len(files) > 6 and all(KEY.encode() not in path.read_bytes() for path in files)
    assert KEY not in caplog.text and KEY not in str(printed)


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["experts", "init", "POOL", "--expert", "a=x"], r"exists; choose another folder"),
        (["profile", "/nowhere", "--data", "VAL"], r"make it with: coterie experts init /nowhere"),
        (["profile", "POOL", "--data", "/no.jsonl", "--overwrite"], r"/no.jsonl does not exist"),
        (["profile", "POOL", "--data", "VAL"], r"profile exists; choose another --output, or add --overwrite"),
        (
            ["profile", "POOL", "--data", "VAL", "--overwrite", "--skills", "choice"],
            r"the endpoint 'maths' does not give",
        ),
        (["profile", "POOL", "--data", "VAL", "--overwrite", "--skill-expert", "math"], r"Did you mean 'maths'"),
        (
            ["profile", "POOL", "--data", "VAL", "--overwrite", "--score", "likelihood"],
            r"cannot be had from the endpoint",
        ),
        (["profile", "POOL", "--data", "BARE", "--overwrite"], r"no row of .* has an answer that can be checked"),
        (["profile", "POOL", "--data", "VAL", "--overwrite", "--encoder", "minilmm"], r"Did you mean 'minilm'"),
        (["fit", "symbolic-moe", "--experts", "POOL", "--output", "RUN"], r"exists; choose another --output"),
        (
            ["fit", "symbolic-moe", "--experts", "POOL", "--output", "NEW", "--aggregator", "mayority"],
            r"Did you mean 'majority'",
        ),
        (["fit", "symbolic-moe", "--experts", "POOL", "--output", "NEW", "--sampler", "best"], r"sampler"),
        (["generate", "RUN", "hi", "--router", "uniform"], r"--router does not apply to symbolic-moe"),
        (["generate", "RUN", "hi", "--top-k-experts", "2"], r"--top-k-experts does not apply"),
        (["generate", "RUN", "hi", "--every", "2"], r"--every does not apply"),
        (["generate", "RUN", "hi", "--n", "2", "--temperature", "1"], r"--n does not apply to symbolic-moe"),
        (["generate", "RUN", "hi", "--stream"], r"leave --stream out"),
        (["generate", "RUN", " "], r"prompt 1 is empty"),
        (["route", "RUN", "hi"], r"coterie generate, plan and eval take it"),
    ],
)
def test_bad_calls_are_refused(fitted, run, words, pattern):
    bare = write_rows(fitted.folder / "bare.jsonl", [{"instruction": "hi", "response": "ho"}])
    places = {"POOL": fitted.pool, "RUN": fitted.folder / "run", "NEW": fitted.folder / "new", "BARE": bare}
    places["VAL"] = fitted.folder / "val.jsonl"
    refused(run(*(places.get(word, word) for word in words)), pattern)
    assert not (fitted.folder / "new").exists() and not list(fitted.folder.glob("**/*.partial"))


def test_a_pool_without_a_profile_cannot_be_fitted(place, run):
    refused(
        run("fit", "symbolic-moe", "--experts", place.pool, "--output", place.folder / "r"),
        "make it with: coterie profile",
    )


def test_a_profile_of_other_weights_is_not_fitted(fitted, run):
    init_pool(
        ExpertPoolSettings(
            folder=str(fitted.pool),
            expert=[f"{name}={fitted.stub.url}#{model}-2" for name, model in EXPERTS.items()],
            overwrite=True,
        )
    )
    words = ("--pool", fitted.pool, "--output", fitted.folder / "other")
    refused(run("fit", "symbolic-moe", *words), "the profile in .* is of other experts; type: coterie profile")


@pytest.mark.parametrize("change", ["combiner", "router", "pool", "aggregator"])
def test_a_broken_run_is_refused(fitted, change):
    path = fitted.folder / "run" / "mixture.json"
    record = json.loads(path.read_text())
    if change == "aggregator":
        record["combiner"]["aggregator"] = "nobody"
    else:
        record[change] = None
    path.write_text(json.dumps(record))
    with pytest.raises(CoterieError, match="is broken|names experts|lists no experts"):
        load_symbolic(fitted.folder / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"scores": {}},
        {"replies": {"nobody": {}}},
        {"replies": {"maths": {"text": 3}}},
        {"skills": "x"},
        {"scores": 3},
    ],
)
def test_broken_validation_records_are_refused(fitted, change):
    path = fitted.folder / "run" / "validation.jsonl"
    first, *others = lines(path)
    write_rows(path, [{**first, **change}, *others])
    with pytest.raises(CoterieError, match="validation.jsonl(, line 1, '| does not fit)"):
        load_symbolic(fitted.folder / "run")


# ------------------------------------------------------------------------------------------------ votes and synthesis


def test_thinking_is_cut():
    assert after_thinking("<think>a</think> b") == "b"
    assert after_thinking("a</think>b</think>\nc ") == "c"
    assert after_thinking("said <think>never closed") == "said"
    assert after_thinking("<think>never closed") == "" and after_thinking(" plain ") == "plain"


def test_a_majority_counts_and_a_weighted_vote_weighs():
    readings, weights = ["x", "y", "x", "z"], [0.1, 0.5, 0.2, 0.2]
    assert elect("majority", readings, weights, "s") == 0
    assert elect("weighted-vote", readings, weights, "s") == 1
    assert elect("weighted-vote", ["x", "y", "x"], [0.3, 0.5, 0.3], "s") == 0
    assert elect("majority", ["", "", "y"], [1.0, 1.0, 1.0], "s") == 2, "what cannot be read does not vote"
    assert elect("majority", ["", ""], [1.0, 1.0], "s") == 0
    for how in ("majority", "weighted-vote"):
        draws = Counter(elect(how, ["x", "y"], [1.0, 1.0], f"{seed}") for seed in range(400))
        assert draws[0] == pytest.approx(200, abs=40)
        assert elect(how, ["x", "y"], [1.0, 1.0], "7") == elect(how, ["x", "y"], [1.0, 1.0], "7")


def test_the_synthesis_is_asked_with_numbered_answers():
    asked = synthesis_request("Why {x}?", ["one {0}", "two"])
    assert "Answer 1:\none {0}\n\nAnswer 2:\ntwo\n" in asked and "Why {x}?" in asked


def test_keywords_are_sampled_five_times_a_question():
    asks = keyword_asks("namer", ["a", "b"])
    assert [(ask.sampling.seed, ask.sampling.temperature) for ask in asks] == [(seed, 0.7) for seed in range(5)] * 2


def test_an_answer_is_judged_without_its_thinking():
    (row,) = load_examples([{"instruction": "1+1?", "response": "2", "answer": "2"}])
    assert is_right("<think>The answer is 3.</think>The answer is 2.", row) is True
    assert is_right("<think>The answer is 2.", row) is False


# -------------------------------------------------------------------------------------------------- tiny real models


@pytest.fixture
def local_pool(tmp_path, run_folder, model_folder):
    experts = [f"{name}={run_folder / 'experts' / name}" for name in ("cluster-0", "cluster-1", "cluster-2")]
    init_pool(ExpertPoolSettings(folder=str(tmp_path / "pool"), expert=[*experts, f"plain={model_folder}"]))
    return tmp_path / "pool"


def test_models_too_small_to_answer_are_profiled_by_likelihood(local_pool, run, tmp_path):
    data = write_rows(
        tmp_path / "val.jsonl", [{**row, "category": row["source"]} for row in tiny.make_rows(12, seed=4)]
    )
    words = ("--skills", "category", "--score", "likelihood", "--device", "cpu")
    code, out, _ = run("profile", local_pool, "--data", data, *words, "--json")
    record = json.loads(out)
    assert code == 0 and record["skills"] == ["sum", "spell", "pick"]
    values = 2 * torch.tensor(record["right"]) - torch.tensor(record["trials"])
    assert values[3].max() < 0 < values[:3].max(), "the untrained model is the least likely to answer as the data do"
    code, out, _ = run("fit", "symbolic-moe", "--experts", local_pool, "--output", tmp_path / "run")
    assert code == 0 and "weighted-vote makes one answer" in out
    questions = write_rows(tmp_path / "q.jsonl", [{"instruction": "add 3 4", "category": "sum"}])
    words = ("--input", questions, "--json", "--max-new-tokens", 4, "--device", "cpu")
    first = run("generate", tmp_path / "run", *words)
    assert first[0] == 0 and sum(json.loads(first[1])["recruits"].values()) == 3
    texts = [json.loads(run("generate", tmp_path / "run", *words)[1])["text"] for _ in range(2)]
    assert texts == [json.loads(first[1])["text"]] * 2


def test_a_choice_finds_the_skills_and_fills_in_for_rows_without_a_category(local_pool, run, tmp_path):
    kinds = [{**row, "category": row["source"]} for row in tiny.make_rows(6, seed=4)]
    data = write_rows(tmp_path / "val.jsonl", kinds)
    common = ("--score", "likelihood", "--device", "cpu", "--data", data, "--json")
    code, out, _ = run("profile", local_pool, *common, "--skills", "choice", "--skill-expert", "plain")
    record = json.loads(out)
    assert (
        code == 0 and record["options"] == ["sum", "spell", "pick"] and set(record["skills"]) <= set(record["options"])
    )
    assert run("profile", local_pool, *common, "--skills", "category", "--overwrite")[0] == 0
    assert run("fit", "symbolic-moe", "--experts", local_pool, "--output", tmp_path / "run")[0] == 0
    code, out, _ = run("generate", tmp_path / "run", "add 3 4", "--json", "--max-new-tokens", 3, "--device", "cpu")
    assert code == 0 and set(json.loads(out)["skills"]) <= {"sum", "spell", "pick"} and json.loads(out)["skills"]


def test_a_run_s_experts_are_held_to_what_they_were(local_pool, run, tmp_path, model_folder):
    record = json.loads((local_pool / "pool.json").read_text())
    record["experts"]["plain"]["sha256"] = "0" * 64
    (local_pool / "pool.json").write_text(json.dumps(record))
    data = write_rows(tmp_path / "val.jsonl", tiny.make_rows(6, seed=4))
    refused(run("profile", local_pool, "--data", data), "'plain' .* has other weights than when")


def test_sampling_settings_are_those_of_the_command(fitted, run):
    run("generate", fitted.folder / "run", question("algebra", 7), "--max-new-tokens", 9, "--temperature", 0.5)
    sent = [got.body for got in fitted.stub.requests if "Keywords" not in got.question][-3:]
    assert {(body["max_tokens"], body["temperature"]) for body in sent} == {(9, 0.5)}
    assert sorted(body["seed"] for body in sent) == [0, 1, 2], "an expert that is drawn again answers anew"
    assert SamplingSettings().temperature == 0
