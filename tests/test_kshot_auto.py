"""`coterie fit kshot-auto` judges what to do with a bank's adapters on left-out shots, and does what they show."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import coterie
from coterie.backbone.loading import load_backbone
from coterie.combiners.layers import LayerCombiner
from coterie.data.batching import PromptFormat
from coterie.data.examples import Example, load_examples
from coterie.errors import CoterieError
from coterie.evaluation import kshot_auto
from coterie.experts.bank import load_bank
from coterie.experts.names import BACKBONE
from coterie.methods import make_grid
from coterie.methods.common import assign_folds
from coterie.methods.kshot import judge as judging
from coterie.methods.kshot.judge import Judged
from coterie.mixture import Mixture
from coterie.records.task_choice import TaskChoiceRecord
from coterie.routers.fixed import FixedRouter
from coterie.settings.groups import ModelSettings
from kshot_place import FIT, rows_of
from tiny import write_rows

PLAIN = {**FIT, "expert_dropout": 0.0}
AUTO = {**PLAIN, "judge_folds": 3, "rank_by": "both", "diversity": "updates"}
"""Adapters are ranked as published."""
UNTRAINED = ("least-loss", "backbone", "best-by-shots", "uniform-weights")
WAYS = (*UNTRAINED, "kshot-only", "kshot-gathered")


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("shots") / "shots.jsonl", rows_of("pick", 7, seed=77))


@pytest.fixture(scope="module")
def open_data(pool_file, tmp_path_factory) -> dict:
    kept = str(tmp_path_factory.mktemp("embeddings"))
    return {"pool": [str(pool_file)], "budget": 6, "encoder": "hidden", "embeddings": kept}


@pytest.fixture(scope="module")
def fitted(bank, shots, open_data, tmp_path_factory) -> tuple[Path, Judged]:
    """A run, and the losses that it was chosen by."""
    output, found = tmp_path_factory.mktemp("kshot-auto") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kshot_auto, "judge", lambda *given: found.append(judging.judge(*given)) or found[0])
        coterie.kshot_auto(bank, str(shots), output=output, **AUTO, **open_data)
    return output, found[0]


def record_of(folder: Path) -> TaskChoiceRecord:
    return TaskChoiceRecord.model_validate(json.loads((folder / "auto.json").read_text()))


def selection_of(folder: Path) -> dict:
    return json.loads((folder / "selection" / "selection.json").read_text())


def losses(mixture: Mixture, examples: list[Example]) -> torch.Tensor:
    found = mixture.score(examples, [one.response for one in examples])
    return -found.logprobs / found.tokens


def judged_as(monkeypatch, chosen: str) -> None:
    """Let the left-out shots say that one way is by far the best."""
    noise = torch.linspace(0, 0.1, 7)
    nll = {name: noise + (1.0 if name == chosen else 2.0 + 0.1 * place) for place, name in enumerate(WAYS)}
    monkeypatch.setattr(kshot_auto, "judge", lambda *_: Judged(nll, torch.full((7,), 5.0)))


def test_what_was_chosen_is_written_with_its_reasons(fitted):
    folder, judged = fitted
    record, mixture = record_of(folder), Mixture.from_pretrained(folder, device="cpu")
    assert mixture.method == "kshot-auto" and mixture.bank.names == record.adapters
    assert (record.shots, record.folds) == (7, 3)
    costs = dict(zip(WAYS, (1, 0, 1, 2, 2, 2), strict=True))
    assert torch.equal(judged.nll["best-by-shots"], judged.nll["least-loss"]), "here that is one adapter"
    del costs["best-by-shots"]  # which is not tried twice
    assert {one.name: one.cost for one in record.candidates} == costs and record.candidates[0].name == "least-loss"
    for one in record.candidates:
        mean = (judged.nll[one.name] * judged.tokens).sum() / judged.tokens.sum()
        assert one.nll == pytest.approx(float(mean), abs=1e-6)
    page = (folder / "auto.md").read_text()
    assert page == record.page() and all(sentence in page for sentence in record.sentences)
    assert not (folder / "working").exists()


def test_a_shot_is_judged_by_what_the_other_shots_alone_make(fitted, bank, shots, tmp_path):
    """Parity with the slow way: choose, and fit, on the shots of the other parts, and score those of the part."""
    _, judged = fitted
    examples = load_examples(shots)
    folds = assign_folds([0] * 7, 3, 0)
    for fold in range(3):
        left, known = ([n for n in range(7) if (folds[n] == fold) == out] for out in (True, False))
        rows = [json.loads(line) for line in shots.read_text().splitlines()]
        file = write_rows(tmp_path / f"known-{fold}.jsonl", [rows[n] for n in known])
        run = tmp_path / f"run-{fold}"
        mixture = coterie.methods.kshot(bank, str(file), output=run, **PLAIN)
        own = [examples[n] for n in left]
        torch.testing.assert_close(judged.nll["kshot-only"][left], losses(mixture, own), atol=1e-4, rtol=1e-4)
        grid = make_grid(mixture, ["backbone", "best-by-shots", "uniform-weights"])
        for name in ("backbone", "best-by-shots", "uniform-weights"):
            found = losses(grid.cell(name), own)
            torch.testing.assert_close(judged.nll[name][left], found, atol=1e-4, rtol=1e-4)
        adapters = [one for one in selection_of(run)["adapters"] if one["rank_sum"] is not None]
        least = min(adapters, key=lambda one: (one["nll"], one["name"]))["name"]
        alone = untouched(bank, {least: 1.0})
        torch.testing.assert_close(judged.nll["least-loss"][left], losses(alone, own), atol=1e-4, rtol=1e-4)


def test_unless_told_otherwise_adapters_are_those_of_the_least_loss(bank, shots, tmp_path):
    how = {name: value for name, value in AUTO.items() if name not in ("rank_by", "diversity", "max_new_tokens")}
    coterie.kshot_auto(bank, str(shots), output=tmp_path / "run", **how)
    selection = selection_of(tmp_path / "run")
    order = sorted(selection["adapters"], key=lambda one: (one["perplexity"], one["name"]))
    assert selection["chosen"] == [one["name"] for one in order[:2]]
    assert all(one["accuracy"] is None for one in order), "no answer is written for it"
    assert min(order, key=lambda one: one["nll"]) is order[0]
    tried = [one.name for one in record_of(tmp_path / "run").candidates]
    assert set(tried) == set(WAYS) - {"best-by-shots", "kshot-gathered"}


def untouched(bank: Path, weights: dict[str, float]) -> Mixture:
    """The bank's adapters as they are, with these weights."""
    model = json.loads((bank / "bank.json").read_text())["base_model"]["id"]
    backbone = load_backbone(ModelSettings(model=model, device="cpu"))
    experts = load_bank({name: bank / "experts" / name for name in weights}, backbone.model)
    prompts = PromptFormat(backbone.tokenizer)
    return Mixture(backbone, experts, FixedRouter(weights), LayerCombiner(), prompts, "kshot-auto")


def test_open_data_that_a_left_out_shot_brought_in_is_left_out_with_it(bank, shots, open_data, tmp_path, monkeypatch):
    trained: list[int] = []
    plain: Callable = judging.tune

    def counting(folder, task, experts, rows, settings):
        trained.append(len(rows))
        return plain(folder, task, experts, rows, settings)

    monkeypatch.setattr(judging, "tune", counting)
    run = tmp_path / "run"
    coterie.kshot_auto(bank, str(shots), output=run, **AUTO, **open_data)
    gathered = [json.loads(line) for line in (run / "gathered" / "gathered.jsonl").read_text().splitlines()]
    folds, names = assign_folds([0] * 7, 3, 0), [one.id for one in load_examples(shots)]
    expected = []
    for fold in range(3):
        away = {name for name, own in zip(names, folds.tolist(), strict=True) if own == fold}
        kept = 7 - len(away)
        expected += [kept, kept + sum(row["nearest_shot"] not in away for row in gathered)]
    assert trained == expected and sum(expected) < 3 * (7 + 7 + 6)


@pytest.mark.parametrize("chosen", UNTRAINED)
def test_a_way_that_trains_nothing_answers_as_the_adapters_of_the_bank_do(chosen, bank, shots, tmp_path, monkeypatch):
    judged_as(monkeypatch, chosen)
    coterie.kshot_auto(bank, str(shots), output=tmp_path / "run", **AUTO)
    mixture, record = Mixture.from_pretrained(tmp_path / "run", device="cpu"), record_of(tmp_path / "run")
    assert record.chosen == chosen and not (tmp_path / "run" / "gates.json").exists()
    selection = selection_of(tmp_path / "run")
    known = [one for one in selection["adapters"] if one["rank_sum"] is not None]
    least = min(known, key=lambda one: (one["nll"], one["name"]))["name"]
    weights = {
        "least-loss": {least: 1.0},
        "backbone": {"null": 1.0},
        "best-by-shots": {selection["adapters"][0]["name"]: 1.0},
        "uniform-weights": dict.fromkeys(selection["chosen"], 0.5),
    }[chosen]
    assert record.adapters == tuple(weights)
    examples = load_examples(shots)
    rival = untouched(bank, {least: 1.0} if chosen == "backbone" else weights)
    if chosen == "backbone":
        rival = make_grid(rival, [BACKBONE]).cell(BACKBONE)
    torch.testing.assert_close(losses(mixture, examples), losses(rival, examples), atol=1e-4, rtol=1e-5)
    prompts = [one.prompt[-1].content for one in examples[:2]]
    answers = [own.generate(prompts, max_new_tokens=4) for own in (mixture, rival)]
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]


@pytest.mark.parametrize("chosen", ["kshot-only", "kshot-gathered"])
def test_a_way_that_trains_ends_with_the_mixture_that_fit_kshot_moe_makes(
    chosen, bank, shots, open_data, tmp_path, monkeypatch
):
    judged_as(monkeypatch, chosen)
    coterie.kshot_auto(bank, str(shots), output=tmp_path / "auto", **AUTO, **open_data)
    added = open_data if chosen == "kshot-gathered" else {}
    coterie.methods.kshot(bank, str(shots), output=tmp_path / "moe", **PLAIN, **added)
    record = record_of(tmp_path / "auto")
    files = [f"experts/{name}/adapter_model.safetensors" for name in record.adapters]
    for file in (*files, "router/gates.safetensors", "gates.json"):
        assert (tmp_path / "auto" / file).read_bytes() == (tmp_path / "moe" / file).read_bytes(), file
    assert record.chosen == chosen and len(files) == 2 and record.expected < -0.9
    names = ["kshot-auto", "kshot-only", "kshot-gathered"]
    grid = make_grid(Mixture.from_pretrained(tmp_path / "auto", device="cpu"), names)
    own, *others = (losses(grid.cell(name), load_examples(shots)) for name in names)
    same = [torch.allclose(own, other, atol=1e-5) for other in others]
    assert same == [name == chosen for name in names[1:]]


def test_the_published_mixture_is_not_what_evidence_chose(fitted):
    mixture = Mixture.from_pretrained(fitted[0], device="cpu")
    grid = make_grid(mixture, ["kshot-auto", "best-by-shots"])
    assert grid.cell("kshot-auto").router is mixture.router
    with pytest.raises(
        CoterieError, match="kshot-moe, which always trains on the gathered rows, is kshot-gathered here"
    ):
        grid.cell("kshot-moe")


def test_an_interrupted_fit_ends_with_the_files_of_an_undisturbed_one(
    fitted, bank, shots, open_data, tmp_path, monkeypatch
):
    done: list[str] = []
    plain: Callable = judging.tune

    def until(folder, task, experts, rows, settings):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(str(folder))
        return plain(folder, task, experts, rows, settings)

    monkeypatch.setattr(judging, "tune", until)
    with pytest.raises(KeyboardInterrupt):
        coterie.kshot_auto(bank, str(shots), output=tmp_path / "run", **AUTO, **open_data)
    assert not (tmp_path / "run").exists()
    done.append("")
    coterie.kshot_auto(bank, str(shots), output=tmp_path / "run", **AUTO, **open_data)
    assert [Path(name).parent.name for name in done[4:]] == ["1", "1", "2", "2"]  # the first part is not judged again
    for file in ("auto.json", "auto.md", "mixture.json"):
        assert (tmp_path / "run" / file).read_bytes() == (fitted[0] / file).read_bytes(), file


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (lambda lines: lines[:6], "has no adapter that was scored on all 7 shots; make it again with coterie select"),
        (lambda lines: lines[::-1], "has no adapter that was scored on all 7 shots; make it again with coterie select"),
        (lambda lines: [line.replace('"nll"', '"loss"') for line in lines], "line 1, 'nll': is missing, got nothing"),
        (lambda lines: [line.replace("sum-2", "gone") for line in lines], "has the adapter 'gone', which "),
    ],
    ids=["cut off", "another order", "no loss", "not in the bank"],
)
def test_scores_that_judge_nothing_are_told_before_anything_is_spent(lines, told, bank, shots, tmp_path, run):
    select = ("--shots", shots, "--keep", 2, "--max-new-tokens", 6, "--device", "cpu")
    assert run("select", bank, *select, "--output", tmp_path / "select")[0] == 0
    file = tmp_path / "select" / "scores.jsonl"
    file.write_text("\n".join(lines(file.read_text().splitlines())) + "\n")
    words = ("--bank", bank, "--shots", shots, "--selected", tmp_path / "select", "--device", "cpu")
    code, out, err = run("fit", "kshot-auto", *words, "--output", tmp_path / "run")
    assert (code, out) == (2, "") and told in err.strip().splitlines()[-1]
    assert not list(tmp_path.glob("run*"))


def test_too_few_shots_are_told_before_anything_is_scored(bank, tmp_path, run):
    few = write_rows(tmp_path / "few.jsonl", rows_of("pick", 5, seed=77))
    code, out, err = run(
        "fit", "kshot-auto", "--bank", bank, "--shots", few, "--output", tmp_path / "run", "--device", "cpu"
    )
    assert (code, out) == (2, "") and err.strip().splitlines()[-1] == (
        "error: 5 examples are too few to tell what is good for the task, which takes 6 or more; give more, or type "
        "coterie fit kshot-moe, which tries nothing"
    )
    assert not list(tmp_path.glob("run*"))


def test_the_command_prints_its_page_and_the_evaluation_tells_why(fitted, bank, shots, tmp_path, run):
    flags = [word for name, value in AUTO.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, out, _ = run("fit", "kshot-auto", "--bank", bank, "--shots", shots, "--output", tmp_path / "run", *flags)
    assert code == 0 and out.startswith((tmp_path / "run" / "auto.md").read_text().rstrip())
    assert "kshot-gathered" not in [one.name for one in record_of(tmp_path / "run").candidates]  # without open data
    words = ("--methods", "backbone,kshot-auto", "--control", "backbone", "--no-generate", "--device", "cpu")
    code, _, _ = run("eval", fitted[0], "--data", shots, "--output", tmp_path / "eval", *words)
    assert code == 0 and run("report", tmp_path / "eval")[0] == 0
    assert record_of(fitted[0]).sentences[1] in (tmp_path / "eval" / "report.html").read_text()
