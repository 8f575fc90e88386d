"""One expert per domain: trained or brought along, routed by centroids, evaluated side by side."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import coterie
import tiny
from conftest import write_rows
from coterie import methods
from coterie.artifacts import read_json, read_jsonl
from coterie.backbone.loading import load_backbone
from coterie.data.examples import load_all, load_examples
from coterie.errors import CoterieError
from coterie.evaluation.compare import evaluate, run_evaluation
from coterie.features.embedding import with_answers
from coterie.methods import common
from coterie.methods.registry import family_of, make_grid
from coterie.methods.token_level import domains, fit
from coterie.methods.token_level.methods import domain_sources
from coterie.mixture import Mixture
from coterie.settings.commands import EvaluationSettings, FromAdaptersSettings, TokenLevelSettings
from coterie.settings.groups import ExtrasSettings, ModelSettings
from coterie.settings.reading import from_flat
from helpers import same_answers

DOMAINS = ("law", "maths")
QUESTIONS = load_examples(tiny.make_rows(6, seed=21))
FIT = {
    "encoder": "hidden",
    "learning_rate": 1e-2,
    "batch_size": 4,
    "epochs": 1,
    "rank": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("domains")
    rows = tiny.make_rows(24, seed=3)
    return {
        name: write_rows(folder / f"{name}.jsonl", [{**row, "source": f"{name}-set"} for row in rows[place::2]])
        for place, name in enumerate(DOMAINS)
    }


@pytest.fixture(scope="module")
def fitted(files, model_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("fit") / "run"
    methods.token_level(str(model_folder), {name: str(file) for name, file in files.items()}, output=output, **FIT)
    return output


def build(output: Path, adapters, files, **options) -> Mixture:
    flat = {
        "adapter": [f"{name}={folder}" for name, folder in adapters.items()],
        "centroid_data": [f"{name}={file}" for name, file in files.items()],
        "output": str(output),
        "encoder": "hidden",
        "device": "cpu",
        **options,
    }
    return methods.fit_from_adapters(from_flat(FromAdaptersSettings, flat))


@pytest.fixture(scope="module")
def adapters(fitted) -> dict[str, Path]:
    return {name: fitted / "experts" / name for name in DOMAINS}


@pytest.fixture
def bank(adapters, files, model_folder, tmp_path) -> Path:
    """The adapters in a bank that knows what each was trained on."""
    named = [f"{name}={folder}" for name, folder in adapters.items()]
    trained_on = [f"{name}={file}" for name, file in files.items()]
    coterie.bank_add(tmp_path / "bank", named, model=str(model_folder), trained_on=trained_on, device="cpu")
    return tmp_path / "bank"


def test_a_bank_is_routed_by_what_its_cards_say_that_it_was_trained_on(bank, adapters, files, tmp_path):
    found = methods.from_adapters(bank, output=tmp_path / "found", encoder="hidden", device="cpu")
    wanted = build(tmp_path / "wanted", adapters, files)
    assert found.bank.names == wanted.bank.names == DOMAINS
    routed = [one.route([question.instruction for question in QUESTIONS]).weights for one in (found, wanted)]
    assert torch.equal(*routed)
    assert [adapter.trouble for adapter in coterie.verify_bank(bank, device="cpu")] == [None, None]


def embeddings(mixture, files) -> dict[str, torch.Tensor]:
    tokenizer = mixture.backbone.tokenizer
    found = {}
    for name, file in files.items():
        rows = [with_answers(mixture.prompts.row(example), tokenizer) for example in load_all([str(file)])]
        found[name] = mixture.router.router.extractor.extract(rows)
    return found


def test_a_fit_gives_a_folder_that_loads_and_answers(fitted):
    mixture = Mixture.from_pretrained(fitted, device="cpu")
    assert (mixture.method, mixture.bank.names, mixture.combiner.kind) == ("token-level", DOMAINS, "layers")
    assert {path.name for path in fitted.iterdir()} == {
        *(
            "README.md",
            "domains.jsonl",
            "experts",
            "metrics.jsonl",
            "mixture.json",
            "router",
            "run.yaml",
            "stages.jsonl",
        )
    }
    answer = mixture.generate(QUESTIONS[:1], max_new_tokens=5)[0]
    assert answer.trace.experts == DOMAINS
    assert len({row["stage"] for row in read_jsonl(fitted / "metrics.jsonl")}) == 2
    saved = fitted.parent / "copy"
    mixture.save_pretrained(saved)
    copy = Mixture.from_pretrained(saved, device="cpu")
    assert copy.generate(QUESTIONS[:1], max_new_tokens=5)[0] == answer
    assert domain_sources(copy) == domain_sources(mixture) == {"law-set": "law", "maths-set": "maths"}


def test_every_expert_learns_from_its_own_data_alone(fitted, files, model_folder, tmp_path):
    methods.token_level(str(model_folder), {"law": str(files["law"])}, output=tmp_path / "alone", **FIT)
    file = "experts/law/adapter_model.safetensors"
    both, alone = load_file(fitted / file), load_file(tmp_path / "alone" / file)
    assert both.keys() == alone.keys()
    assert all(torch.equal(both[name], alone[name]) for name in both)
    assert any(bool(both[name].any()) for name in both if "lora_B" in name)


def test_a_centroid_is_the_mean_embedding_of_questions_with_their_answers(fitted, files):
    """Hidden states lie close together, so the mean over the experts is taken away."""
    mixture = Mixture.from_pretrained(fitted, device="cpu")
    means = {name: rows.mean(dim=0) for name, rows in embeddings(mixture, files).items()}
    centre = torch.stack(list(means.values())).mean(dim=0)
    torch.testing.assert_close(mixture.router.router.centre, centre)
    for name, mean in means.items():
        torch.testing.assert_close(mixture.router.router.centroids[name][0], mean - centre)


def test_adapters_that_exist_make_the_same_mixture(fitted, adapters, files, tmp_path):
    built = build(tmp_path / "built", adapters, files)
    wanted = Mixture.from_pretrained(fitted, device="cpu").generate(QUESTIONS, max_new_tokens=4)
    assert built.generate(QUESTIONS, max_new_tokens=4) == wanted
    assert Mixture.from_pretrained(tmp_path / "built", device="cpu").generate(QUESTIONS, max_new_tokens=4) == wanted
    assert read_json(tmp_path / "built" / "mixture.json")["method"] == "token-level"


def test_several_centroids_stand_in_the_middle_of_their_parts(adapters, files, tmp_path):
    built = build(tmp_path / "built", adapters, files, centroids=2)
    features = embeddings(built, files)
    router = built.router.router
    for name, rows in features.items():
        centroids = router.centroids[name]
        assert centroids.shape[0] == 2
        centred = rows - router.centre
        own = (centred @ centroids.T).argmax(dim=1)
        assert set(own.tolist()) == {0, 1}
    with pytest.raises(CoterieError, match="'law' has 12 texts, too few for 13 centroids"):
        build(tmp_path / "more", adapters, files, centroids=13)


def test_centroids_by_performance_count_a_text_for_whoever_predicts_it_best(adapters, files, tmp_path):
    built = build(tmp_path / "built", adapters, files, centroids_by="performance")
    router = built.router.router
    assert router.pool == "mean"
    rows = [built.prompts.row(example) for file in files.values() for example in load_all([str(file)])]
    nll = []
    for name in DOMAINS:
        cell = built.replace(router=name, combiner="logits")
        nll.append(cell.score_rows(rows, cell.router.route(rows), name).nll[0])
    best = torch.stack(nll).argmin(dim=0).tolist()
    features = torch.cat(list(embeddings(built, files).values())) - router.centre
    unit = torch.nn.functional.normalize(features, dim=-1)
    for place, name in enumerate(DOMAINS):
        for number, source in enumerate(DOMAINS):
            own = [i for i in range(len(rows)) if best[i] == place and (i >= 12) == bool(number)]
            if own:
                gaps = (router.centroids[name] - unit[own].mean(dim=0)).norm(dim=1)
                assert float(gaps.min()) < 1e-4, source


def test_a_null_expert_is_a_plain_adapter_that_changes_nothing(adapters, files, tmp_path, model_folder):
    built = build(tmp_path / "built", adapters, files, null_share=0.25)
    assert built.bank.names == (*DOMAINS, "null")
    own = []
    for name, rows in embeddings(built, files).items():
        plain = built.router.router
        own.append(plain.similarities(rows - plain.centre)[:, DOMAINS.index(name)])
    below = (torch.cat(own) < built.router.router.null.similarity).float().mean()
    assert float(below) == pytest.approx(0.25, abs=0.05)
    for name in ("arrow", "spectr"):
        routing = make_grid(built, [name], ExtrasSettings()).cell(name).route(QUESTIONS)
        assert routing.experts == (*DOMAINS, "null")
        assert bool((routing.weights[:, 2] > 0).all())
    alone = built.replace(router="null", combiner="layers").generate(QUESTIONS[:2], max_new_tokens=4)
    model = load_backbone(ModelSettings(model=str(model_folder), device="cpu")).model
    wrapped = PeftModel.from_pretrained(model, tmp_path / "built" / "experts" / "null").eval()
    for question, answer in zip(QUESTIONS, alone, strict=False):
        ids = list(built.tokens([question])[0].ids)
        logits = wrapped(input_ids=torch.tensor([[*ids, *answer.token_ids]])).logits[0]
        logprobs = logits[len(ids) - 1 : -1].log_softmax(dim=-1)
        found = logprobs.gather(1, torch.tensor(answer.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(answer.logprobs), found, rtol=1e-3, atol=1e-4)


def test_an_interrupted_fit_goes_on_and_ends_with_the_same_files(fitted, files, model_folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    data = {name: str(file) for name, file in files.items()}
    with monkeypatch.context() as patch:
        patch.setattr(domains, "similarity_router", stop)
        with pytest.raises(KeyboardInterrupt):
            methods.token_level(str(model_folder), data, output=tmp_path / "run", **FIT)
    assert (tmp_path / "run.partial" / "experts" / "maths").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_adapter", stop)
        methods.token_level(str(model_folder), data, output=tmp_path / "run", **FIT)
    for file in ("mixture.json", "domains.jsonl", "metrics.jsonl", "experts/law/adapter_model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (fitted / file).read_bytes()


def test_all_usual_methods_are_compared(fitted, tmp_path):
    mixture = Mixture.from_pretrained(fitted, device="cpu")
    rows = [{**row, "source": f"{DOMAINS[n % 2]}-set"} for n, row in enumerate(tiny.make_rows(6, seed=8))]
    data = write_rows(tmp_path / "test.jsonl", rows)
    flat = {"mixture": str(fitted), "data": [str(data)], "output": str(tmp_path / "eval"), "max_new_tokens": 4}
    found = run_evaluation(from_flat(EvaluationSettings, {**flat, "every": "1,2,inf", "device": "cpu"}))
    variants = [f"token-level:every={every}" for every in ("1", "2", "inf")]
    wanted = [
        variant
        for name in family_of(mixture).usual(mixture)
        for variant in (variants if name == "token-level" else [name])
    ]
    assert found.summary["methods"] == wanted
    alone = ["backbone", *(f"expert:{name}" for name in mixture.bank.names if name != "null")]
    assert found.summary["control_among"] == alone and found.summary["control"] in alone
    assert found.summary["routed"] == "token-level"
    for row in found.rows:
        assert set(row["expert_nll"]) == set(DOMAINS)
        for name, record in row["methods"].items():
            assert ("trace" in record) == (name in ("token-level:every=1", "token-level:every=2"))
        own = row["source"].removesuffix("-set")
        assert row["methods"]["per-dataset"]["nll"] == pytest.approx(row["expert_nll"][own], abs=1e-5)
        assert row["methods"][f"expert:{own}"]["nll"] == pytest.approx(row["expert_nll"][own], abs=1e-5)
        assert row["methods"]["oracle"]["nll"] == pytest.approx(min(row["expert_nll"].values()), abs=1e-5)
        assert row["methods"]["backbone"]["nll"] != pytest.approx(row["expert_nll"][own], abs=1e-5)


def test_prompt_routing_is_the_variant_that_is_never_renewed(fitted):
    mixture = Mixture.from_pretrained(fitted, device="cpu")
    grid = make_grid(mixture, ["token-level"], ExtrasSettings())
    never = grid.cell("token-level:every=inf").generate(QUESTIONS, max_new_tokens=4)
    plain = mixture.replace(router=mixture.router.router, combiner="layers").generate(QUESTIONS, max_new_tokens=4)
    same_answers(never, plain)  # the grid has one more expert, which changes nothing but rounding
    with pytest.raises(CoterieError, match="'arrow' weighs every token already"):
        grid.cell("arrow:every=2")
    with pytest.raises(CoterieError, match="no variant of token-level; write .* token-level:every=N"):
        grid.cell("token-level:every=0")


def test_unit_weights_add_every_update_up(fitted):
    grid = make_grid(Mixture.from_pretrained(fitted, device="cpu"), ["unit-weights"], ExtrasSettings())
    routing = grid.cell("unit-weights").route(QUESTIONS[:1])
    assert routing.row(0) == dict.fromkeys(DOMAINS, 1.0)
    assert grid.cell("uniform-weights").route(QUESTIONS[:1]).row(0) == dict.fromkeys(DOMAINS, 0.5)


def test_the_published_way_weighs_every_token_by_the_published_formula(fitted):
    grid = make_grid(Mixture.from_pretrained(fitted, device="cpu"), ["token-level-published"], ExtrasSettings())
    cell = grid.cell("token-level-published")
    assert (cell.router.every, cell.router.cache, cell.combiner.kind) == (1, "recompute", "weights:peft-0.4-linear")
    assert cell.router.router.weighting.temperature is None
    assert len(cell.generate(QUESTIONS[:1], max_new_tokens=3)[0].token_ids) == 3


# ------------------------------------------------------------------------------------------------------------ errors


def settings(files, model_folder, tmp_path, **changes):
    flat = {
        "model": str(model_folder),
        "data": [f"{name}={file}" for name, file in files.items()],
        "output": str(tmp_path / "run"),
        **FIT,
        **changes,
    }
    return from_flat(TokenLevelSettings, flat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ["law.jsonl"]}, "--data takes NAME=VALUE, such as maths=gsm8k.jsonl, got 'law.jsonl'"),
        ({"data": ["=law.jsonl"]}, "--data takes NAME=VALUE"),
        ({"data": ["../x=law.jsonl"]}, "'../x' cannot be an expert's name"),
        ({"data": ["null=law.jsonl"]}, "an expert cannot be called 'null'"),
        ({"data": ["backbone=law.jsonl"]}, "an expert cannot be called 'backbone'"),
        ({"data": ["law=nothing.jsonl"]}, "nothing.jsonl"),
        ({"centroids": 99}, "texts, too few for 99 centroids"),
        ({"centroids": 2, "centroids_by": "performance"}, "--centroids 2 does not act with --centroids-by performance"),
        ({"encoder": "mini"}, "no encoder, local folder or hub id is called 'mini'. Did you mean 'minilm'"),
    ],
)
def test_bad_input_of_a_fit_is_told_in_one_line_before_training(
    files, model_folder, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(fit, "train_experts", lambda *_: pytest.fail("trained already"))
    with pytest.raises(CoterieError) as caught:
        methods.fit_token_level(settings(files, model_folder, tmp_path, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("every", ["0", "-1", "two", "1.5", ""])
def test_a_rhythm_that_is_none_is_refused(files, model_folder, tmp_path, every):
    with pytest.raises(CoterieError, match=f"--every: give a number of tokens from 1 upwards, or inf, got '{every}'"):
        settings(files, model_folder, tmp_path, every=every)


def test_experts_and_texts_must_match(adapters, files, tmp_path):
    with pytest.raises(CoterieError, match="'maths' has no texts .* add --centroid-data maths=FILE"):
        build(tmp_path / "x", adapters, {"law": files["law"]})
    with pytest.raises(CoterieError, match="names the expert 'maths', but there are adapters for law only"):
        build(tmp_path / "x", {"law": adapters["law"]}, files)
    assert not list(tmp_path.iterdir())


def test_an_adapter_for_another_model_is_refused_before_anything_is_written(adapters, files, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(adapters["law"], wrong)
    tensors = {name: tensor.repeat(1, 2) for name, tensor in load_file(wrong / "adapter_model.safetensors").items()}
    save_file(tensors, wrong / "adapter_model.safetensors")
    with pytest.raises(CoterieError, match="is the adapter for another base model"):
        build(tmp_path / "x", {**adapters, "law": wrong}, files)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


def test_adapters_that_name_different_bases_need_a_choice(adapters, files, tmp_path, model_folder):
    other = tmp_path / "other"
    shutil.copytree(adapters["law"], other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "somewhere/else"}))
    with pytest.raises(CoterieError, match="name .* and somewhere/else base model; choose one with --model"):
        build(tmp_path / "x", {**adapters, "law": other}, files)
    built = build(tmp_path / "x", {**adapters, "law": other}, files, model=str(model_folder))
    assert built.bank.names == DOMAINS


def test_methods_of_another_run_are_refused(fitted, mixture):
    run = Mixture.from_pretrained(fitted, device="cpu")
    with pytest.raises(CoterieError, match="no method is called 'elrea'"):
        evaluate(run, QUESTIONS, methods=["elrea"])
    with pytest.raises(CoterieError, match="no method is called 'token-level'"):
        evaluate(mixture, QUESTIONS, methods=["token-level"])
    with pytest.raises(CoterieError, match="--every 1,2 varies token-level, which is not among the methods arrow"):
        evaluate(run, QUESTIONS, methods=["arrow"], every="1,2")
    with pytest.raises(CoterieError, match="no expert is called 'poetry'"):
        evaluate(run, QUESTIONS, methods=["expert:poetry"])


def test_routing_by_data_set_needs_sources_that_are_known(fitted):
    run = Mixture.from_pretrained(fitted, device="cpu")
    with pytest.raises(CoterieError, match="per-dataset has no adapter for the source"):
        evaluate(run, QUESTIONS, methods=["per-dataset"], generate=False)
