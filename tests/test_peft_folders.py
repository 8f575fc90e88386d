"""Experts' folders in PEFT's own hands: they load by what they name here, and mean the same model anywhere."""

import json
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM

import tiny
from conftest import FIT
from coterie import methods
from coterie.backbone.aliases import ALIASES, ENCODER_ALIASES, hub_name, named_model
from coterie.backbone.loading import load_backbone, loaded_by
from coterie.data.examples import load_examples
from coterie.experts.cards import describe_adapter
from coterie.experts.expert_pool import init_pool
from coterie.experts.plain_adapter import write_null_adapter
from coterie.mixture import Mixture

ALIAS = "smollm2-135m"
PROMPT = "add 3 4"


@pytest.fixture(scope="module")
def alias(tmp_path_factory):
    """A tiny model in the place of an alias's, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("home") / "cache"
        patch.setenv("COTERIE_CACHE", str(cache))
        yield tiny.save_model(cache / "models" / ALIAS)


@pytest.fixture(scope="module")
def fitted(alias, train_file):
    return methods.elrea(ALIAS, str(train_file), output=alias.parent / "run", device="cpu", **FIT)


def test_an_expert_loads_by_what_its_folder_names(fitted, alias):
    folder = fitted.folder / "experts" / "cluster-1"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(alias)
    theirs = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    row = fitted.prompts.row(load_examples([{"prompt": PROMPT, "response": "\\boxed{7}"}])[0])
    with torch.inference_mode():
        each = theirs(torch.tensor([row.ids])).logits[0].log_softmax(dim=-1)
    wanted = sum(each[place - 1, row.ids[place]].item() for place in range(row.prompt_length, len(row.ids)))
    ours = fitted.replace(router="cluster-1").score(PROMPT, "\\boxed{7}").logprobs[0].item()
    assert ours == pytest.approx(wanted, abs=1e-3)


def test_a_folder_is_named_by_its_whole_path_and_a_hub_model_by_its_id(backbone, model_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(model_folder.parent)
    write_null_adapter(load_backbone(model_folder.name, device="cpu"), tmp_path / "null")
    config = json.loads((tmp_path / "null" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder)
    monkeypatch.chdir(tmp_path)
    assert AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "null")).peft_config
    assert loaded_by(replace(backbone.identity, id="org/model", revision="c0ffee")) == "org/model"
    assert loaded_by(replace(backbone.identity, id="org/absent")) == "org/absent"


def test_what_a_folder_names_is_the_alias_again_for_us(fitted, alias, tmp_path, monkeypatch):
    experts = fitted.folder / "experts"
    assert fitted.backbone.identity.id == ALIAS
    assert load_backbone(str(alias), device="cpu").identity == fitted.backbone.identity
    assert describe_adapter(experts / "base", fitted.backbone.model, name="base", source="x").base == ALIAS
    [expert] = init_pool(tmp_path / "pool", expert=f"a={experts / 'base'}").experts
    assert expert.model == ALIAS
    shelf = methods.from_adapters({"a": experts / "base", "b": experts / "cluster-0"}, output=tmp_path / "shelf")
    assert shelf.backbone.identity == fitted.backbone.identity
    assert named_model(f"/home/somebody/.cache/coterie/models/{ALIAS}") == ALIAS
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    assert named_model("own") == named_model("./own") == str(tmp_path / "own")
    for other in (ALIAS, "gpt2", f"/models/{ALIAS}", f"somebody/{ALIAS}", str(tmp_path)):
        assert named_model(other) == other


def test_a_card_names_the_model_as_the_hub_does(fitted):
    assert "\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in (fitted.folder / "README.md").read_text()
    assert Mixture.from_pretrained(fitted.folder, device="cpu").backbone.identity.id == ALIAS
    for name, wheel in {**ALIASES, **ENCODER_ALIASES}.items():
        assert len(wheel.hub_id.split("/")) == 2 and (name in ENCODER_ALIASES or hub_name(name) == wheel.hub_id)
    assert hub_name("org/model") == "org/model"
