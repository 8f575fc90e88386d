"""A bank of adapters becomes a mixture by one command, without any data; what the bank is asked instead says so."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import coterie
import tiny
from conftest import write_rows
from coterie import methods
from coterie.artifacts import read_json
from coterie.errors import CoterieError
from coterie.mixture import Mixture
from helpers import refused, same_answers, save_adapter

NAMES = ("law", "maths", "twin")
ON_CPU = {"device": "cpu"}
QUESTIONS = ["add 3 4", "SPELL KIWI NOW"]


@pytest.fixture(scope="module")
def adapters(backbone, tmp_path_factory) -> dict[str, Path]:
    """Two adapters of unequal ranks and targets, and a copy of one of them."""
    root = tmp_path_factory.mktemp("adapters")
    save_adapter(backbone.model, root / "maths", {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}, seed=1)
    save_adapter(backbone.model, root / "law", {"r": 3, "lora_alpha": 9, "target_modules": ["v_proj"]}, seed=2)
    shutil.copytree(root / "maths", root / "twin")
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("texts") / "maths.jsonl", tiny.make_rows(6, seed=3))


@pytest.fixture
def bank(adapters, model_folder, tmp_path) -> Path:
    coterie.bank_add(tmp_path / "bank", list(adapters.values()), model=str(model_folder), **ON_CPU)
    return tmp_path / "bank"


@pytest.fixture
def known(adapters, texts, model_folder, tmp_path) -> Path:
    """A bank that knows what one of its adapters was trained on."""
    named = [f"{name}={adapters[name]}" for name in ("maths", "law")]
    given = {"trained_on": [f"maths={texts}"], "model": str(model_folder)}
    coterie.bank_add(tmp_path / "known", named, **given, **ON_CPU)
    return tmp_path / "known"


def weights(mixture: Mixture) -> dict[str, torch.Tensor]:
    routing = mixture.route(QUESTIONS)
    return dict(zip(routing.experts, routing.weights.T, strict=True))


# ------------------------------------------------------------------------------------------------------- one command


def test_a_bank_without_any_data_becomes_a_mixture_that_answers(run, bank, tmp_path):
    shelf = tmp_path / "shelf"
    code, out, err = run("fit", "from-adapters", "--bank", bank, "--output", shelf, "--device", "cpu")
    assert (code, out) == (0, f"{shelf}: 3 experts (law, maths, twin)\n")
    assert err.splitlines()[-1] == f"next: coterie generate {shelf} 'What do 5 pens cost?'"
    assert read_json(shelf / "mixture.json")["router"]["kind"] == "arrow" and not (shelf / "domains.jsonl").exists()
    mixture = Mixture.from_pretrained(shelf, **ON_CPU)
    code, out, _ = run("route", shelf, QUESTIONS[0], "--json", "--device", "cpu")
    assert code == 0 and json.loads(out)["weights"] == pytest.approx(mixture.route(QUESTIONS[:1]).row(0))
    code, out, _ = run("generate", shelf, QUESTIONS[0], "--json", "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0 and json.loads(out) == mixture.generate(QUESTIONS[:1], max_new_tokens=4)[0].record()


def test_route_tells_what_the_weights_of_gates_are_and_why_they_are_nearly_even(run, bank, tmp_path, monkeypatch):
    assert run("fit", "from-adapters", "--bank", bank, "--output", tmp_path / "shelf", "--device", "cpu")[0] == 0
    words = ["route", tmp_path / "shelf", QUESTIONS[0], "--device", "cpu"]
    monkeypatch.setattr("coterie.cli.commands.NEARLY_EVEN", 1.0)
    assert re.search("averages over all tokens and layers.*; arrow often weighs experts nearly alike", run(*words)[2])
    monkeypatch.setattr("coterie.cli.commands.NEARLY_EVEN", 0.0)
    told = run(*words)[2]
    assert "averages over all tokens and layers" in told and "alike" not in told
    assert "averages" not in run(*words, "--router", "uniform")[2]


@pytest.mark.parametrize("router", ["arrow", "spectr"])
def test_equal_adapters_get_equal_weights(bank, router):
    found = weights(Mixture.from_bank(bank, router=router, **ON_CPU))
    torch.testing.assert_close(found["maths"], found["twin"])
    assert not torch.allclose(found["maths"], found["law"])


@pytest.mark.parametrize("router", ["arrow", "spectr"])
def test_a_bank_in_memory_its_folder_and_its_adapters_by_hand_are_one_mixture(bank, adapters, tmp_path, router):
    shelf = methods.from_adapters(bank, output=tmp_path / "shelf", router=router, **ON_CPU)
    by_hand = methods.from_adapters(adapters, output=tmp_path / "hand", router=router, **ON_CPU)
    wanted = by_hand.generate(QUESTIONS, max_new_tokens=6)
    loaded = Mixture.from_pretrained(tmp_path / "shelf", **ON_CPU)
    for one in (shelf, loaded, Mixture.from_bank(bank, router=router, **ON_CPU)):
        assert one.method == by_hand.method == router and one.generate(QUESTIONS, max_new_tokens=6) == wanted


def test_neither_the_order_of_adapters_nor_that_of_folders_matters(bank, adapters, model_folder, tmp_path):
    turned = dict(reversed(adapters.items()))
    coterie.bank_add(tmp_path / "turned", list(turned.values()), model=str(model_folder), **ON_CPU)
    one, same = (Mixture.from_bank(folder, **ON_CPU) for folder in (bank, tmp_path / "turned"))
    other = methods.from_adapters(turned, output=tmp_path / "hand", **ON_CPU)
    assert one.bank.names == same.bank.names == tuple(sorted(other.bank.names))
    answers = [mixture.generate(QUESTIONS, max_new_tokens=6) for mixture in (one, same, other)]
    assert answers[0] == answers[1]
    same_answers(answers[2], answers[0])
    for name, found in weights(other).items():
        torch.testing.assert_close(found, weights(one)[name])


def test_names_choose_some_of_the_adapters(run, bank, tmp_path):
    words = ("fit", "from-adapters", "--bank", bank, "--output", tmp_path / "some", "--device", "cpu")
    code, out, _ = run(*words, "--names", "twin, law")
    assert (code, out) == (0, f"{tmp_path / 'some'}: 2 experts (law, twin)\n")
    found, wanted = Mixture.from_pretrained(tmp_path / "some", **ON_CPU), Mixture.from_bank(bank, names=["law", "twin"])
    assert found.generate(QUESTIONS, max_new_tokens=4) == wanted.generate(QUESTIONS, max_new_tokens=4)
    refused(run(*words[:4], "--output", tmp_path / "x", "--names", "mats"), "no adapter is called 'mats'.*'maths'")
    refused(run("fit", "from-adapters", "--output", tmp_path / "x", "--names", "law"), "--names law does not act")


def test_adapters_of_a_bank_and_others_come_together(known, adapters, tmp_path):
    mixture = methods.from_adapters(
        known, adapter=[f"twin={adapters['twin']}"], output=tmp_path / "both", encoder="hidden", **ON_CPU
    )
    assert mixture.bank.names == ("law", "maths", "twin") and mixture.router.kind == "arrow"
    with pytest.raises(CoterieError, match="the adapter law is given 2 times"):
        methods.from_adapters(known, adapter=[f"law={adapters['law']}"], output=tmp_path / "x", **ON_CPU)


# ----------------------------------------------------------------------------------------------- what cards know


def test_centroids_of_those_whose_cards_have_data_lie_beside_arrow(run, known, tmp_path, caplog):
    caplog.set_level("INFO", logger="coterie")
    shelf = tmp_path / "shelf"
    words = ("fit", "from-adapters", "--bank", known, "--encoder", "hidden", "--device", "cpu")
    assert run(*words, "--output", shelf)[0] == 0
    assert (
        "1 of 2 adapters have no texts (--centroid-data NAME=FILE), so all are routed by their updates" in caplog.text
    )
    mixture = Mixture.from_pretrained(shelf, **ON_CPU)
    assert mixture.router.kind == "arrow" and mixture.bank.names == ("law", "maths")
    assert mixture.replace(router="similarity").router.centroids.keys() == {"maths"}
    assert mixture.replace(router="token-level").router.every == 1
    code, out, _ = run("route", shelf, QUESTIONS[0], "--router", "similarity", "--json", "--device", "cpu")
    assert code == 0 and json.loads(out)["weights"] == {"maths": 1.0}
    refused(run(*words, "--output", tmp_path / "x", "--router", "similarity"), "'law' has no texts", "--router arrow")


def test_all_known_texts_route_by_similarity_and_arrow_is_there_by_name(known, texts, tmp_path):
    shelf = methods.from_adapters(known, {"law": str(texts)}, output=tmp_path / "s", encoder="hidden", **ON_CPU)
    assert (shelf.method, shelf.router.kind) == ("token-level", "token-level")
    assert shelf.replace(router="arrow").generate(QUESTIONS, max_new_tokens=4) == Mixture.from_bank(
        known, **ON_CPU
    ).generate(QUESTIONS, max_new_tokens=4)


def test_texts_that_a_card_names_and_that_are_gone_are_told(known, adapters, tmp_path, caplog):
    card = known / "experts" / "maths" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"trained_on": ["gone.jsonl"]}))
    shelf = methods.from_adapters(known, output=tmp_path / "shelf", **ON_CPU)
    assert shelf.router.kind == "arrow" and "maths has no texts: its card names what cannot be read (" in caplog.text


def test_texts_given_for_some_only_are_taken_for_forgotten_ones(known, texts, tmp_path):
    with pytest.raises(CoterieError, match="'law' has no texts .* add --centroid-data law=FILE, or route by .* arrow"):
        methods.from_adapters(known, {"maths": str(texts)}, output=tmp_path / "shelf", encoder="hidden", **ON_CPU)
    assert not (tmp_path / "shelf").exists()


def test_settings_of_centroids_are_refused_where_there_are_none(run, bank, tmp_path):
    words = ("fit", "from-adapters", "--bank", bank, "--output", tmp_path / "x", "--device", "cpu")
    refused(run(*words, "--centroids", 2), "--centroids acts on routing by centroids, but no adapter has texts")
    refused(run(*words, "--every", 4), "--every acts on routing by centroids, but no adapter has texts")


# ------------------------------------------------------------------------------------------------------------ broken


def test_broken_adapters_are_told_all_at_once_and_how_to_go_on(run, bank, tmp_path):
    for name in ("law", "twin"):
        file = bank / "experts" / name / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    words = ("fit", "from-adapters", "--bank", bank, "--device", "cpu")
    told = "law: its files are not the ones that were added; twin: its files .* take out with: coterie bank remove"
    refused(run(*words, "--output", tmp_path / "x"), told, "bank law twin; or choose others by name")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank"]
    assert run(*words, "--output", tmp_path / "x", "--names", "maths")[0] == 0
    with pytest.raises(CoterieError, match="law: its files are not the ones"):
        Mixture.from_bank(bank, **ON_CPU)


def test_another_base_model_than_the_banks_is_refused(run, bank, tmp_path):
    other = tiny.save_model(tmp_path / "other", seed=1)
    words = ("fit", "from-adapters", "--bank", bank, "--output", tmp_path / "x", "--device", "cpu", "--model", other)
    refused(run(*words), "is a bank for .* but the base model loaded is")


def test_an_empty_bank_and_an_unknown_router_are_told(bank):
    with pytest.raises(CoterieError, match="no router that a bank alone gives is called 'arow'. Did you mean 'arrow'"):
        Mixture.from_bank(bank, router="arow", **ON_CPU)
    shutil.rmtree(bank / "experts")
    with pytest.raises(CoterieError, match="holds no adapters; add some with: coterie bank add"):
        Mixture.from_bank(bank, **ON_CPU)


# ------------------------------------------------------------------------------------------- compared, and reported


@pytest.mark.parametrize("has_texts", [False, True])
def test_a_shelf_is_evaluated_with_all_that_it_can_have(run, known, texts, tmp_path, has_texts):
    given = ["--centroid-data", f"law={texts}", "--encoder", "hidden"] if has_texts else ["--router", "spectr"]
    if not has_texts:
        card = known / "experts" / "maths" / "card.json"
        card.write_text(json.dumps(json.loads(card.read_text()) | {"trained_on": []}))
    shelf = tmp_path / "shelf"
    assert run("fit", "from-adapters", "--bank", known, "--output", shelf, "--device", "cpu", *given)[0] == 0
    data = write_rows(tmp_path / "test.jsonl", tiny.make_rows(3, seed=9))
    words = ("--data", data, "--max-new-tokens", 3, "--device", "cpu", "--router", "uniform,law")
    code, out, _ = run("eval", shelf, "--output", tmp_path / "eval", *words, "--methods", "all", "--json")
    found = json.loads(out)
    assert code == 0 and found["routed"] == ("token-level" if has_texts else "spectr")
    wanted = {"backbone", "uniform-weights", "unit-weights", "arrow", "spectr", "logo", "oracle"}
    wanted |= {"router:uniform", "router:law"}
    texts_only = {"token-level"} if has_texts else set()  # the published way adds up factors, which take one rank
    assert set(found["methods"]) - {"per-dataset"} == wanted | texts_only
    assert run("report", tmp_path / "eval")[0] == 0
    usual = coterie.evaluate(Mixture.from_pretrained(shelf, **ON_CPU), [*coterie.load_examples(data)], generate=False)
    assert {"arrow", "spectr", "expert:law"} <= set(usual.summary["methods"])


def test_a_shelf_in_memory_is_compared_too(bank, texts):
    found = coterie.evaluate(
        Mixture.from_bank(bank, **ON_CPU), coterie.load_examples(str(texts)), methods="arrow,expert:law,router:spectr",
        generate=False,
    )  # fmt: skip
    assert found.summary["methods"] == ["arrow", "expert:law", "router:spectr"]


# ---------------------------------------------------------------------------------------------- what is no mixture


@pytest.mark.parametrize("command", ["route", "generate", "eval", "from_pretrained", "plan", "train-extras"])
def test_a_bank_says_that_it_is_no_mixture_and_how_to_make_one(run, bank, tmp_path, texts, command):
    told = f"{bank} is a bank, not a mixture; type: coterie fit from-adapters --bank {bank} --output runs/shelf"
    if command == "from_pretrained":
        with pytest.raises(CoterieError, match=told):
            Mixture.from_pretrained(bank)
        return
    rest = {"eval": ("--data", texts, "--output", tmp_path / "x"), "train-extras": ()}.get(command, ("--input", texts))
    refused(run(command, bank, *rest), told)
