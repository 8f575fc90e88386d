"""From a few examples and a bank of adapters to a task's mixture: scoring, choosing, training, rivals."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import coterie
from conftest import write_rows
from coterie.backbone.loading import load_backbone
from coterie.data.batching import IGNORED, PromptFormat
from coterie.data.examples import load_examples
from coterie.errors import CoterieError
from coterie.evaluation.compare import evaluate
from coterie.experts.bank import load_adapter
from coterie.grading.grade import is_right
from coterie.methods import load_grid, make_grid, train_extras
from coterie.methods.kshot import choose_adapters as selecting
from coterie.methods.kshot import fit as kshot
from coterie.methods.kshot import shot_scoring
from coterie.methods.kshot import train as tuning
from coterie.methods.kshot.methods import METHODS
from coterie.methods.kshot.run import KshotRun
from coterie.methods.kshot.shot_scoring import candidate_count
from coterie.mixture import Mixture
from coterie.settings.commands import KshotSettings, TrainExtrasSettings
from coterie.settings.groups import ExtrasSettings, ModelSettings, SelectAdaptersSettings
from coterie.settings.reading import from_flat
from helpers import adapters_alive, refused
from kshot_place import FAST, FIT, rows_of
from stub_server import completion, serving


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "shots.jsonl", rows_of("pick", 5, seed=77))


def selection_of(folder: Path) -> dict:
    return json.loads((folder / "selection.json").read_text())


def row(record: dict, name: str) -> dict:
    return next(own for own in record["adapters"] if own["name"] == name)


def test_those_that_were_trained_on_the_task_are_chosen(bank, shots, tmp_path):
    found = coterie.select(bank, str(shots), output=tmp_path / "select", keep=2, diversity="none", **FAST)
    assert set(found.chosen) == {"pick-2", "pick-3"}
    record = selection_of(tmp_path / "select")
    assert record == found.record.plain() and record["shots"] == 5
    assert {one["score"] - one["rank_sum"] - one["rank_diversity"] for one in record["subsets"]} == {0}
    assert sorted(own["rank_sum"] for own in record["adapters"]) == [own["rank_sum"] for own in record["adapters"]]
    assert [own["candidate"] for own in record["adapters"]] == [True] * 3 + [False] * 3  # the better half of six


@pytest.mark.parametrize(("keep", "given", "count"), [(1, None, 3), (4, None, 4), (2, 5, 5), (3, 2, 3)])
def test_candidates_are_the_better_half_of_a_small_bank_and_never_fewer_than_are_kept(keep, given, count):
    assert candidate_count(SelectAdaptersSettings(keep=keep, candidates=given), 6) == count
    assert candidate_count(SelectAdaptersSettings(), 15) == candidate_count(SelectAdaptersSettings(), 900) == 8


def test_every_adapter_is_told_why_it_is_in_or_out(bank, shots, tmp_path, run):
    words = ("--shots", shots, "--keep", 2, "--max-new-tokens", 6, "--device", "cpu")
    output = tmp_path / "select"
    code, out, err = run("select", bank, *words, "--output", output)
    record = selection_of(output)
    assert code == 0 and out.splitlines()[-1] == f"{output}: 2 of 6 adapters chosen: {', '.join(record['chosen'])}"
    assert err.splitlines()[-1] == (
        f"next: coterie fit kshot-auto --bank {bank} --shots {shots} --selected {output} --output runs/task"
    )
    score = {frozenset(one["names"]): one for one in record["subsets"]}
    assert len(score) == 3  # all pairs of three candidates
    for place, (own, line) in enumerate(zip(record["adapters"], out.splitlines()[1:], strict=False), start=1):
        assert line.split()[0] == own["name"] and line.endswith(own["why"])
        if place > 3:
            told = f"out: number {place} of 6 by accuracy and perplexity, only the best 3 are candidates"
            assert own["why"] == told and own["similarity"] is None
            continue
        assert f"{own['similarity']:.2f}" in line
        rivals = [one for names, one in score.items() if (own["name"] in names) != own["chosen"]]
        least, chosen = min(one["score"] for one in rivals), score[frozenset(record["chosen"])]["score"]
        what = "without" if own["chosen"] else "with"
        assert re.match(rf"{'in' if own['chosen'] else 'out'}: the best group {what} it has {least} \(", own["why"])
        assert f"the chosen one {chosen} (" in own["why"]


def test_all_candidates_that_are_kept_are_told_so(bank, shots, tmp_path):
    record = coterie.select(bank, str(shots), output=tmp_path / "select", keep=3, **FAST).record
    assert [one.why for one in record.adapters if one.chosen] == [
        f"in: number {place} of 6 by accuracy and perplexity, and all 3 candidates are kept" for place in (1, 2, 3)
    ]


def test_scores_are_those_of_every_adapter_alone(bank, shots, model_folder, tmp_path):
    """Each adapter's likelihoods are those that PEFT gives, and its answers those of a mixture of it alone."""
    coterie.select(bank, str(shots), output=tmp_path / "select", keep=2, group_size=4, **FAST)
    cells = [json.loads(line) for line in (tmp_path / "select" / "scores.jsonl").read_text().splitlines()]
    examples = {example.id: example for example in load_examples(shots)}
    for name in ("sum-2", "pick-3"):
        backbone = load_backbone(ModelSettings(model=str(model_folder), device="cpu"))
        prompts = PromptFormat(backbone.tokenizer)
        model = PeftModel.from_pretrained(backbone.model, bank / "experts" / name).eval()
        for cell in (cell for cell in cells if cell["adapter"] == name):
            token_row = prompts.row(examples[cell["shot"]])
            labels = torch.tensor([token_row.labels()])
            with torch.no_grad():
                loss = model(torch.tensor([token_row.ids]), labels=labels).loss
                written = model.generate(
                    torch.tensor([token_row.prompt().ids]), max_new_tokens=6, do_sample=False, use_cache=False
                )
            assert cell["nll"] == pytest.approx(loss.item(), abs=1e-4)
            assert cell["tokens"] == int((labels != IGNORED).sum())
            new = written[0, token_row.prompt_length :]
            assert cell["text"] == backbone.tokenizer.decode(new, skip_special_tokens=True)
            assert cell["correct"] == is_right(cell["text"], examples[cell["shot"]])


def test_how_many_adapters_are_loaded_together_changes_nothing(bank, shots, tmp_path, monkeypatch):
    sizes: list[int] = []
    plain = selecting.load_bank

    def counting(folders, model):
        sizes.append(len(folders))
        return plain(folders, model)

    for module in (selecting, shot_scoring):
        monkeypatch.setattr(module, "load_bank", counting)
    found = {}
    for size in (1, 4):
        sizes.clear()
        output = tmp_path / f"select-{size}"
        record = coterie.select(
            bank, str(shots), output=output, keep=2, candidates=2, group_size=size, **FAST
        ).record.plain()
        assert max(sizes) == max(size, 2)  # the candidates are compared together
        found[size] = [(own["name"], own["accuracy"], own["rank_sum"]) for own in record["adapters"]], record["chosen"]
    assert found[1] == found[4]


def test_no_more_adapters_than_one_group_are_in_memory(bank, shots, tmp_path, monkeypatch):
    alive = adapters_alive(monkeypatch)
    coterie.select(bank, str(shots), output=tmp_path / "x", keep=1, candidates=2, halving=2, group_size=2, **FAST)
    assert len(alive) >= 6 and max(alive) == 2


def test_halving_ends_with_the_numbers_of_full_scoring_and_tells_whom_it_left_out(bank, shots, tmp_path):
    full = coterie.select(bank, str(shots), output=tmp_path / "full", keep=1, candidates=2, **FAST).record.plain()
    halved = coterie.select(
        bank, str(shots), output=tmp_path / "half", keep=1, candidates=2, halving=2, **FAST
    ).record.plain()
    assert [(own["shots"], own["scored"], own["kept"]) for own in halved["halving"]] == [
        (2, 6, 3),
        (4, 3, 2),
        (5, 2, 2),
    ]
    assert full["halving"] == []
    dropped = [own["name"] for own in halved["adapters"] if own["dropped"] == "halving"]
    assert {row(halved, name)["why"] for name in dropped} == {
        f"out: not among the best on its {count} shots (--halving)" for count in (2, 4)
    }
    assert len(dropped) == 4 and all(row(halved, name)["rank_sum"] is None for name in dropped)
    for own in halved["adapters"]:
        if own["dropped"] is None:
            assert own["accuracy"] == row(full, own["name"])["accuracy"]
            assert own["perplexity"] == pytest.approx(row(full, own["name"])["perplexity"], abs=1e-4)


def test_planted_leaks_are_told_and_dropped_where_asked(bank, shelf, shots, tmp_path, run, caplog):
    known = load_examples(shelf / "pick-2.jsonl")
    planted = [json.loads(line) for line in (shelf / "pick-2.jsonl").read_text().splitlines()][:2]
    test_set = write_rows(tmp_path / "test.jsonl", planted)
    flags = ("--shots", shots, "--exclude", test_set, "--keep", 2, "--max-new-tokens", 4, "--device", "cpu")
    code, _, _ = run("select", bank, *flags, "--output", tmp_path / "told")
    assert code == 0 and "pick-2 was trained on 2 of the shots and excluded rows and takes part" in caplog.text
    told = selection_of(tmp_path / "told")
    assert {own["name"]: own["leak"] for own in told["adapters"] if own["leak"]} == {"pick-2": 2}
    assert row(told, "pick-2")["known_rows"] == len(known) and "pick-2" in told["chosen"]
    code, out, _ = run("select", bank, *flags, "--output", tmp_path / "dropped", "--exclude-leaks")
    dropped = selection_of(tmp_path / "dropped")
    assert code == 0 and re.search(
        r"^pick-2 +- +- +- +- +out: knows 2 of the shots and excluded rows", out, re.MULTILINE
    )
    assert row(dropped, "pick-2")["dropped"] == "leak" and "pick-2" not in dropped["chosen"]


def test_interrupted_scoring_goes_on(bank, shots, tmp_path, monkeypatch):
    plain, scored = shot_scoring._score_shots, []

    def until(stop: int):
        def score(scoring, names, places):
            if len(scored) == stop:
                raise KeyboardInterrupt
            scored.append(tuple(names))
            return plain(scoring, names, places)

        return score

    options = {"output": tmp_path / "select", "keep": 2, "group_size": 2, **FAST}
    monkeypatch.setattr(shot_scoring, "_score_shots", until(2))
    with pytest.raises(KeyboardInterrupt):
        coterie.select(bank, str(shots), **options)
    assert not (tmp_path / "select").exists()
    first = list(scored)
    monkeypatch.setattr(shot_scoring, "_score_shots", until(99))
    scored.clear()
    record = coterie.select(bank, str(shots), **options).record.plain()
    assert len(first) == 2 and len(scored) == 1 and not set(first) & set(scored)
    monkeypatch.undo()
    assert record == coterie.select(bank, str(shots), **{**options, "output": tmp_path / "again"}).record.plain()


def test_signals_can_be_taken_alone(bank, shots, tmp_path):
    record = coterie.select(
        bank, str(shots), output=tmp_path / "p", keep=1, rank_by="perplexity", diversity="none", device="cpu"
    ).record.plain()
    assert all(own["accuracy"] is None and own["rank_sum"] == own["rank_perplexity"] for own in record["adapters"])
    best = min(record["adapters"], key=lambda own: own["perplexity"])
    assert record["chosen"] == [best["name"]]
    assert [own["score"] for own in record["subsets"]] == sorted(own["rank_sum"] for own in record["subsets"])


def test_bad_calls_get_one_line(bank, shots, tmp_path, run):
    def refused(*words, told: str) -> None:
        code, out, err = run("select", *words, "--output", tmp_path / "none", "--device", "cpu")
        last = err.strip().splitlines()[-1]
        assert (code, out) == (2, "") and last.startswith("error: ") and told in last
        assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()

    refused(tmp_path, "--shots", shots, told="holds no bank.json, so it is no bank")
    refused(bank, "--shots", shots, "--keep", 7, told="6 adapters to choose from, fewer than --keep 7")
    refused(bank, "--shots", shots, "--rationales", "nobody/here/at-all", told="nobody/here/at-all")
    bare = write_rows(tmp_path / "bare.jsonl", [{"instruction": "hi", "response": "ho"}])
    code, _, err = run("select", bank, "--shots", bare, "--keep", 1, "--output", tmp_path / "x", "--device", "cpu")
    assert code == 2 and err.strip().splitlines()[-1].endswith("add the field answer, or --rank-by perplexity")


@pytest.mark.parametrize("order", ["answer-first", "rationale-first"])
def test_rationales_are_written_once_with_the_answer_shown(order, bank, tmp_path):
    asked: list[str] = []

    def respond(got):
        asked.append(got.question)
        return completion(f"Because of reason {len(asked)}.")

    shots = write_rows(tmp_path / f"{order}.jsonl", rows_of("pick", 3, seed=len(order)))
    with serving(respond) as stub:
        for number in (1, 2):
            coterie.select(
                bank, str(shots), output=tmp_path / f"select-{number}", keep=1, rationales=f"{stub.url}#writer",
                rationale_order=order, **FAST,
            )  # fmt: skip
    examples = load_examples(shots)
    assert len(asked) == 3  # the second time they are there already
    assert all(any(e.instruction in text and e.response in text for text in asked) for e in examples)
    cells = [json.loads(line) for line in (tmp_path / "select-2" / "scores.jsonl").read_text().splitlines()]
    plain = coterie.select(bank, str(shots), output=tmp_path / "plain", keep=1, **FAST).scores
    assert all(cell["tokens"] > own["tokens"] for cell, own in zip(cells, plain, strict=True))


# ----------------------------------------------------------------------------------------------------- the mixture


@pytest.fixture(scope="session")
def task_shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("task") / "shots.jsonl", rows_of("pick", 5, seed=77))


def fit(bank: Path, shots: Path, output: Path, **settings) -> Mixture:
    flat = {**FIT, "bank": str(bank), "shots": [str(shots)], "output": str(output), **settings}
    return coterie.methods.fit_kshot(from_flat(KshotSettings, flat))


@pytest.fixture(scope="session")
def task_run(bank, task_shots, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("task-run") / "run"
    fit(bank, task_shots, output, expert_dropout=0.0, keep=3)
    return output


def test_the_run_holds_plain_adapters_gates_and_why_they_were_chosen(task_run, model_folder, bank):
    mixture = Mixture.from_pretrained(task_run, device="cpu")
    chosen = json.loads((task_run / "selection" / "selection.json").read_text())["chosen"]
    assert mixture.method == "kshot-moe" and list(mixture.bank.names) == chosen
    assert mixture.router.gates.top_k == 2 and mixture.router.gates.score == "linear"
    for name in chosen:
        backbone = load_backbone(ModelSettings(model=str(model_folder), device="cpu"))
        PeftModel.from_pretrained(backbone.model, task_run / "experts" / name)
        before, after = (
            (folder / "experts" / name / "adapter_model.safetensors").read_bytes() for folder in (bank, task_run)
        )
        assert before != after  # the experts were trained, too
    gates = json.loads((task_run / "gates.json").read_text())
    assert gates["experts"] == chosen and sum(gates["load"]) == pytest.approx(1, abs=1e-4)
    assert 0 < gates["entropy"] <= math.log(2) + 1e-6  # two experts act at a token
    entries = [json.loads(line) for line in (task_run / "metrics.jsonl").read_text().splitlines()]
    assert all(sum(entry["expert_load"]) == pytest.approx(1, abs=1e-4) for entry in entries)
    assert not (task_run / "tuned").exists()


def test_training_lowers_the_loss_on_the_shots(task_run, task_shots, bank):
    """The mixture that was trained predicts the shots better than the same adapters in even parts."""
    examples = load_examples(task_shots)
    found = evaluate(
        Mixture.from_pretrained(task_run, device="cpu"), examples, methods=["kshot-moe", "uniform-weights"],
        control="uniform-weights", generate=False,
    )  # fmt: skip
    nll = {own["method"]: own["nll"] for own in found.summary["table"] if own["source"] == "all"}
    assert nll["kshot-moe"] < nll["uniform-weights"]


def test_open_data_is_gathered_and_trained_on(bank, task_shots, pool_file, tmp_path):
    settings = {"pool": [str(pool_file)], "budget": 4, "encoder": "hidden", "embeddings": str(tmp_path / "kept")}
    mixture = fit(bank, task_shots, tmp_path / "run", **settings)
    gathered = load_examples(tmp_path / "run" / "gathered" / "gathered.jsonl")
    assert len(gathered) == 4
    task_run = KshotRun.open(mixture, ExtrasSettings())
    assert len(task_run.tokenised(task_run.gathered)) == 4 + 5
    alone = fit(bank, task_shots, tmp_path / "alone")
    weights = [m.bank.adapters[0]["model.layers.0.self_attn.q_proj"].down for m in (mixture, alone)]
    assert not torch.equal(*weights)


def test_gates_only_leave_the_experts_as_they_are(bank, task_shots, tmp_path):
    mixture = fit(bank, task_shots, tmp_path / "run", train="gates", gate_start="arrow")
    assert mixture.router.gates.score == "arrow"
    for name in mixture.bank.names:
        before = load_adapter(bank / "experts" / name, mixture.backbone.model)
        own = mixture.bank.adapters[mixture.bank.index(name)]
        assert all(torch.allclose(own[path].up, pair.up, atol=1e-6) for path, pair in before.items())


def test_a_loaded_run_routes_and_answers_as_the_fitted_one(bank, task_shots, tmp_path, run):
    made = fit(bank, task_shots, tmp_path / "run", gate_start="arrow", top_k=1)
    loaded = Mixture.from_pretrained(tmp_path / "run", device="cpu")
    assert loaded.router.gates.score == "arrow"
    question = "?? (A) abcd (B) 7 ??"
    assert torch.allclose(made.route([question]).weights, loaded.route([question]).weights)
    answers = [m.generate([question], max_new_tokens=5)[0] for m in (made, loaded)]
    assert answers[0].token_ids == answers[1].token_ids
    code, out, _ = run("generate", tmp_path / "run", question, "--max-new-tokens", 5, "--json", "--device", "cpu")
    assert code == 0 and json.loads(out)["token_ids"] == list(answers[0].token_ids)


def test_an_interrupted_fit_ends_with_the_files_of_an_undisturbed_one(
    bank, task_shots, task_run, tmp_path, monkeypatch
):
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kshot, "tune", broken)
    with pytest.raises(KeyboardInterrupt):
        fit(bank, task_shots, tmp_path / "run", expert_dropout=0.0, keep=3)
    monkeypatch.undo()
    monkeypatch.setattr(kshot, "choose", broken)  # the choice is not made again
    fit(bank, task_shots, tmp_path / "run", expert_dropout=0.0, keep=3)
    for file in ("selection/selection.json", "gates.json", "mixture.json", "router/gates.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (task_run / file).read_bytes(), file


def test_experts_that_could_not_be_read_back_are_told_before_they_are_trained(bank, task_shots, tmp_path, monkeypatch):
    plain = tuning.write_adapter

    def spoilt(folder, config, adapter):
        plain(folder, {**config, "r": 99, "rank_pattern": {}}, adapter)

    trained = []
    monkeypatch.setattr(tuning, "write_adapter", spoilt)
    monkeypatch.setattr(tuning, "train_mixture", lambda *_: trained.append(True))
    with pytest.raises(CoterieError, match="r = 99 and lora_alpha = .* do not fit"):
        fit(bank, task_shots, tmp_path / "run")
    assert not trained


def test_a_collapsed_gate_is_told(bank, task_shots, tmp_path, monkeypatch, caplog):
    plain = tuning.start_gates

    def one_sided(kind, backbone, adapters, names, *, top_k, seed):
        gates = plain(kind, backbone, adapters, names, top_k=None, seed=seed)
        for gate in gates.layers.values():
            gate.zero_()
        floors = {path: torch.tensor([50.0] + [0.0] * (len(names) - 1)) for path in gates.layers}
        return replace(gates, floors=floors)

    monkeypatch.setattr(tuning, "start_gates", one_sided)
    fit(bank, task_shots, tmp_path / "run")
    assert "the gates give more than 90% of all weight to pick-" in caplog.text


def test_the_record_repeats_the_run(task_run, tmp_path, run):
    record = tmp_path / "run.yaml"
    record.write_text((task_run / "run.yaml").read_text().replace(str(task_run), str(tmp_path / "again")))
    code, out, _ = run("run", record)
    assert code == 0 and out.startswith(f"{tmp_path / 'again'}: 3 experts (")
    assert (tmp_path / "again" / "gates.json").read_bytes() == (task_run / "gates.json").read_bytes()


# ------------------------------------------------------------------------------------- what was chosen before is taken


@pytest.fixture(scope="module")
def made_before(bank, task_shots, pool_file, tmp_path_factory) -> Path:
    """A folder with what `select` and `gather` have made for the task."""
    folder = tmp_path_factory.mktemp("before")
    coterie.select(bank, str(task_shots), output=folder / "select", keep=2, **FAST)
    common = {"encoder": "hidden", "model": str(bank_model(bank)), "device": "cpu", "embeddings": str(folder / "kept")}
    coterie.gather(str(task_shots), str(pool_file), output=folder / "gather", budget=4, **common)
    return folder


def bank_model(bank: Path) -> str:
    return coterie.open_bank(bank).base_model["id"]


def task_words(bank, shots, output) -> list[object]:
    training = ["--epochs", 1, "--learning-rate", 5e-3, "--batch-size", 4, "--device", "cpu"]
    return ["fit", "kshot-moe", "--bank", bank, "--shots", shots, "--output", output, *training]


def test_a_fit_of_what_was_selected_and_gathered_is_the_fit_that_does_both(
    made_before, bank, task_shots, pool_file, tmp_path, run, monkeypatch
):
    fit(
        bank, task_shots, tmp_path / "whole", pool=[str(pool_file)], budget=4, encoder="hidden",
        embeddings=str(made_before / "kept"),
    )  # fmt: skip
    for name in ("choose", "write_gathered"):
        monkeypatch.setattr(kshot, name, lambda *_: pytest.fail("done anew"))
    reused = ["--selected", made_before / "select", "--gathered", made_before / "gather"]
    code, out, _ = run(*task_words(bank, task_shots, tmp_path / "parts"), *reused)
    assert code == 0 and out.startswith(f"{tmp_path / 'parts'}: 2 experts (")
    whole, parts = ({p.relative_to(f) for p in f.rglob("*")} for f in (tmp_path / "whole", tmp_path / "parts"))
    assert {path for path in whole if path.parts[0] != "cached"} == parts
    files = ["mixture.json", "gates.json", "gathered/gathered.jsonl", "router/gates.safetensors"]
    for file in [*files, *(str(path) for path in whole if path.name == "adapter_model.safetensors")]:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes(), file
    rivals = load_grid(Mixture.from_pretrained(tmp_path / "parts", device="cpu"), ["kshot-moe"])
    opened = KshotRun.open(rivals.own, ExtrasSettings())
    assert opened.pools == [str(pool_file)] and len(opened.gathered) == 4


def test_what_was_made_for_another_task_is_refused(made_before, bank, shelf, task_shots, tmp_path, run):
    other = write_rows(tmp_path / "other.jsonl", rows_of("sum", 5, seed=7))
    selected, gathered = ("--selected", made_before / "select"), ("--gathered", made_before / "gather")
    words = task_words(bank, other, tmp_path / "x")
    refused(run(*words, *selected), "select was made for other shots; give the same --shots and --limit, or make it")
    refused(run(*words, *gathered), "gather was made for other shots; give the same --shots and --limit, or make it")
    words = task_words(bank, task_shots, tmp_path / "x")
    refused(run(*words, *gathered, "--exclude", other), "gather was made for other excluded rows")
    refused(
        run(*words, "--selected", made_before / "gather"), "gather is a folder of gathered rows, not a choice of ad"
    )
    refused(run(*words, "--gathered", tmp_path), "was not made by coterie gather; give the --output of that command")
    chosen = selection_of(made_before / "select")["chosen"]
    smaller = shutil.copytree(bank, tmp_path / "smaller")
    coterie.bank_remove(smaller, chosen[0])
    words = task_words(smaller, task_shots, tmp_path / "x")
    refused(run(*words, *selected), f"was made for another adapter {chosen[0]} than .* holds; select from this bank")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_settings_of_what_is_taken_as_it_is_are_refused(made_before, bank, task_shots, pool_file, tmp_path, run):
    words = task_words(bank, task_shots, tmp_path / "x")
    selected, gathered = ("--selected", made_before / "select"), ("--gathered", made_before / "gather")
    refused(run(*words, *selected, "--keep", 3), "--keep says how adapters are chosen; leave out --selected, or this")
    refused(run(*words, *selected, "--rationales", "smollm2-135m"), "--rationales says how adapters are chosen")
    refused(run(*words, *gathered, "--pool", pool_file), "--gathered was gathered already; leave one of them out")
    refused(
        run(*words, *gathered, "--budget", 3), "--budget says how open data is gathered; add --pool, or leave it out"
    )


# -------------------------------------------------------------------------------------------------------- the rivals


@pytest.fixture(scope="session")
def rivals(bank, task_shots, pool_file, tmp_path_factory):
    """A run with open data, evaluated with every method of the table."""
    folder = tmp_path_factory.mktemp("rivals")
    fit(
        bank, task_shots, folder / "run", pool=[str(pool_file)], budget=4, encoder="hidden", candidates=3,
        embeddings=str(folder / "kept"),
    )  # fmt: skip
    train_extras(from_flat(TrainExtrasSettings, {"mixture": str(folder / "run"), "device": "cpu"}))
    test = write_rows(folder / "test.jsonl", rows_of("pick", 3, seed=123))
    found = evaluate(
        Mixture.from_pretrained(folder / "run", device="cpu"), load_examples(test), methods=list(METHODS),
        max_new_tokens=4,
    )  # fmt: skip
    return folder / "run", found.summary


def test_every_method_of_the_table_is_evaluated(rivals):
    folder, summary = rivals
    table = {own["method"]: own for own in summary["table"] if own["source"] == "all"}
    assert set(table) == set(METHODS)
    assert summary["selection"]["chosen"] == list(Mixture.from_pretrained(folder, device="cpu").bank.names)
    assert summary["gathering"]["fates"]["chosen"] == 4 and summary["gates"]["experts"]


def test_rivals_are_what_they_are_called(rivals, bank):
    folder, _ = rivals
    mixture = Mixture.from_pretrained(folder, device="cpu")
    grid = load_grid(mixture, list(METHODS))
    selection = json.loads((folder / "selection" / "selection.json").read_text())
    for name in selection["chosen"]:
        before = load_adapter(bank / "experts" / name, mixture.backbone.model)
        same = grid.mixture.bank.adapters[grid.mixture.bank.index(f"untuned-{name}")]
        assert all(torch.equal(same[path].up, pair.up) for path, pair in before.items())
    by_accuracy = sorted(selection["adapters"], key=lambda own: (own["rank_accuracy"], own["rank_perplexity"]))[:2]
    assert grid.extras["by-accuracy"].bank.names == tuple(f"accuracy-{own['name']}" for own in by_accuracy)
    assert grid.extras["kshot-only"].bank.names == tuple(f"shots-{name}" for name in selection["chosen"])
    weights = json.loads((folder / "methods" / "lorahub" / "ingredient.json").read_text())["weights"]
    assert len(weights) == 3 and all(abs(value) <= 1.5 for value in weights.values())


def test_an_ablation_that_changes_nothing_is_the_mixture_itself(rivals):
    folder, summary = rivals
    selection = json.loads((folder / "selection" / "selection.json").read_text())
    same = [
        name
        for name in ("by-accuracy", "by-perplexity", "no-diversity")
        if {
            own.split("-", 1)[1]
            for own in json.loads((folder / "methods" / name / "ingredient.json").read_text())["experts"]
        }
        == set(selection["chosen"])
    ]
    table = {own["method"]: own["nll"] for own in summary["table"] if own["source"] == "all"}
    assert all(table[name] == pytest.approx(table["kshot-moe"], abs=1e-5) for name in same)
    assert table["kshot-only"] != pytest.approx(table["kshot-moe"], abs=1e-5)


def test_what_has_changed_since_is_not_trained_on(rivals, bank, tmp_path):
    folder, _ = rivals
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "methods")
    record = (copy / "run.yaml").read_text()
    shots = write_rows(tmp_path / "other.jsonl", rows_of("pick", 5, seed=1))
    (copy / "run.yaml").write_text(record.replace("shots.jsonl", "gone.jsonl"))
    with pytest.raises(CoterieError, match="does not exist"):
        make_grid(Mixture.from_pretrained(copy, device="cpu"), ["best-tuned"], ExtrasSettings())
    old = next(line.split("- ")[1] for line in record.splitlines() if line.endswith("shots.jsonl"))
    (copy / "run.yaml").write_text(record.replace(old, str(shots)))
    with pytest.raises(CoterieError, match="shots is not what .* was fitted on any more"):
        make_grid(Mixture.from_pretrained(copy, device="cpu"), ["best-tuned"], ExtrasSettings())
