"""Mixtures and banks to the model hub and back, and adapters found there, by the hub's real client."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

import coterie
import tiny
from coterie.artifacts import read_json
from coterie.errors import CoterieError
from coterie.methods import load_grid
from coterie.mixture import Mixture
from coterie.settings.commands import EvaluationSettings
from coterie.settings.groups import PlacementSettings
from helpers import refused, save_adapter
from stub_hub import Hub, serving_hub

# huggingface_hub's own upload hands httpx a file in the way of old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

PROMPTS = ["add 3 4", "SPELL ABCD NOW"]
BASE = "someone/tiny-base"


@pytest.fixture
def hub(tmp_path, monkeypatch, model_folder):
    """A hub that has the base model, with a working folder in which no path looks like a hub id."""
    monkeypatch.chdir(tmp_path)
    with serving_hub(tmp_path / "hub-cache", monkeypatch) as served:
        served.add(BASE, model_folder)
        yield served


@pytest.fixture
def pushed(hub, run_folder) -> Hub:
    coterie.push(run_folder, repository="me/elrea", base_model=BASE, licence="apache-2.0")
    return hub


def card(hub: Hub, name: str) -> tuple[dict, str]:
    text = hub.repositories[name].files["README.md"].decode()
    return yaml.safe_load(text.split("\n---\n")[0]), text


# ------------------------------------------------------------------------------------------------------- mixtures


def test_what_was_pushed_answers_as_the_run_itself(pushed, mixture):
    loaded = Mixture.from_pretrained("me/elrea", device="cpu")
    assert (loaded.bank.names, loaded.method) == (mixture.bank.names, "elrea")
    assert loaded.generate(PROMPTS, max_new_tokens=6) == mixture.generate(PROMPTS, max_new_tokens=6)
    torch.testing.assert_close(loaded.route(PROMPTS).weights, mixture.route(PROMPTS).weights)
    assert loaded.backbone.identity.id == BASE and pushed.repositories["me/elrea"].private


def test_the_client_may_upload_in_commits_that_overlap(hub, mixture, monkeypatch):
    """With hf_xet, the usual case; the store of that protocol is left out, so all files are in the commits."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.apart = ()
    assert mixture.push_to_hub("me/elrea", base_model=BASE) == f"{hub.url}/me/elrea"
    loaded = Mixture.from_pretrained("me/elrea", device="cpu")
    assert loaded.generate(PROMPTS, max_new_tokens=4) == mixture.generate(PROMPTS, max_new_tokens=4)


def test_all_that_was_trained_beside_a_mixture_goes_along(hub, grid_folder, grid):
    coterie.push(grid_folder, repository="me/grid", base_model=BASE)
    names = ["mole", "loss-routing", "instruction-embedding", "random-cluster"]
    loaded = load_grid(Mixture.from_pretrained("me/grid", device="cpu"), names)
    for name in names:
        one, other = loaded.cell(name), grid.cell(name)
        assert one.generate(PROMPTS[:1], max_new_tokens=4) == other.generate(PROMPTS[:1], max_new_tokens=4), name


def test_an_expert_of_the_hub_is_loaded_by_peft_alone_as_its_card_says(pushed, mixture, model_folder):
    _, text = card(pushed, "me/elrea")
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    assert f'from_pretrained("{BASE}")' in code and 'PeftModel.from_pretrained(base, "me/elrea", subfolder=' in code
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    found = PeftModel.from_pretrained(base, "me/elrea", subfolder="experts/cluster-0").eval()
    assert found.peft_config["default"].base_model_name_or_path == BASE
    again = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(again, mixture.folder / "experts" / "cluster-0").eval()
    ids = torch.tensor([mixture.tokens(PROMPTS[0])[0].ids])
    with torch.inference_mode():
        torch.testing.assert_close(found(ids).logits, wanted(ids).logits)


def test_no_file_on_the_hub_names_a_place_of_this_machine_or_holds_rows(hub, grid_folder, tmp_path):
    coterie.push(grid_folder, repository="me/grid", base_model=BASE)
    files = hub.repositories["me/grid"].files
    places = [str(grid_folder.parents[1]).encode(), str(tmp_path).encode(), str(Path.home()).encode() + b"/"]
    assert [name for name, data in files.items() if any(place in data for place in places)] == []
    assert [name for name in files if name.endswith((".jsonl", ".yaml")) or name.startswith("features")] == []
    assert str(grid_folder.parents[1]) in (grid_folder / "experts" / "base" / "adapter_config.json").read_text()


def test_a_card_tells_licence_base_data_method_and_measurements(hub, run_folder, train_file, tmp_path):
    given = {"mixture": str(run_folder), "data": [str(train_file)], "output": str(tmp_path / "eval"), "limit": 6}
    placement = PlacementSettings(device="cpu")
    coterie.evaluate_folder(EvaluationSettings(**given, methods="base,elrea", generate=False, placement=placement))
    coterie.push(run_folder, repository="me/elrea", base_model=BASE, licence="mit", evaluation=str(tmp_path / "eval"))
    facts, text = card(hub, "me/elrea")
    assert (facts["license"], facts["base_model"], facts["library_name"]) == ("mit", BASE, "coterie")
    assert facts["base_model_relation"] == "adapter" and {"lora", "elrea"} <= set(facts["tags"])
    record = read_json(tmp_path / "eval" / "evaluation.json")
    (own,) = (row for row in record["table"] if row["method"] == "elrea" and row["source"] == "all")
    (result,) = facts["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "nll", "value": own["nll"]}]
    assert f"| elrea | 6 | - | {own['nll']:.4f} |" in text and "the control is base" in text
    assert "| `base` | 8 | pick 12, spell 12, sum 12 |" in text and "Method: elrea." in text
    assert 'Mixture.from_pretrained("me/elrea")' in text


def test_an_evaluation_of_other_experts_and_one_of_a_bank_are_refused(hub, run, run_folder, tmp_path):
    words = ("push", run_folder, "me/elrea", "--base-model", BASE, "--evaluation", tmp_path / "nothing")
    refused(run(*words), "holds no evaluation.json; make one with: coterie eval")
    assert "me/elrea" not in hub.repositories


def test_a_base_model_that_only_this_machine_has_needs_a_name(hub, run, run_folder, model_folder):
    told = f"the base model is {model_folder} on this machine, which nobody else has; say .*--base-model OWNER/NAME"
    refused(run("push", run_folder, "me/elrea"), told)
    assert "me/elrea" not in hub.repositories


def test_a_wrong_name_of_the_base_model_is_noticed_by_who_loads_it(hub, run_folder, tmp_path):
    hub.add("someone/other", tiny.save_model(tmp_path / "other", seed=7))
    coterie.push(run_folder, repository="me/elrea", base_model="someone/other")
    with pytest.raises(CoterieError, match="me/elrea was trained on someone/other .* but the base model loaded is"):
        Mixture.from_pretrained("me/elrea", device="cpu")


def test_what_a_later_upload_lacks_is_gone_and_other_files_stay(pushed, run_folder, tmp_path):
    repository = pushed.repositories["me/elrea"]
    repository.files |= {"experts/old/adapter_config.json": b"{}", "LICENSE": b"terms", "picture.png": b"mine"}
    coterie.push(run_folder, repository="me/elrea", base_model=BASE)
    assert "experts/old/adapter_config.json" not in repository.files
    assert repository.files["picture.png"] == b"mine" and repository.files["LICENSE"] == b"terms"


def test_a_repository_of_something_else_is_left_alone(hub, run, run_folder):
    held = hub.add("me/model", run_folder / "router")
    before = dict(held.files)
    told = "me/model holds centroids.safetensors and no mixture.json, so it is left alone; give another name"
    refused(run("push", run_folder, "me/model", "--base-model", BASE), told)
    assert held.files == before


@pytest.mark.parametrize("name", ["elrea", "a/b/c", "me/"])
def test_what_is_no_name_of_a_repository_is_told(hub, run, run_folder, name):
    refused(run("push", run_folder, name, "--base-model", BASE), "is no repository of the hub; write OWNER/NAME")
    assert [path for method, path in hub.asked if method == "POST"] == []


def test_whoever_is_not_logged_in_is_told_how(hub, run, run_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    told = "me/elrea cannot be written on the hub .*401.*; log in with: hf auth login, or set HF_TOKEN"
    refused(run("push", run_folder, "me/elrea", "--base-model", BASE), told)


def test_what_is_neither_a_mixture_nor_a_bank_is_told(hub, run, run_folder, tmp_path):
    refused(
        run("push", run_folder / "experts" / "base", "me/x"), "is an adapter, not a mixture; type: coterie bank add"
    )
    (tmp_path / "sym").mkdir()
    (tmp_path / "sym" / "mixture.json").write_text('{"format": 1, "pool": []}')
    refused(run("push", tmp_path / "sym", "me/x"), "recruits experts that lie elsewhere, so it is not published")
    refused(run("push", tmp_path / "none", "me/x"), "none/mixture.json does not exist")
    assert "me/x" not in hub.repositories


def test_a_link_in_the_folder_is_not_followed_to_the_hub(hub, run, run_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    (copy / "experts" / "base" / "notes.json").symlink_to("/etc/hostname")
    refused(run("push", copy, "me/elrea", "--base-model", BASE), "holds a link, .*notes.json")
    assert "me/elrea" not in hub.repositories


def test_the_command_prints_the_address_and_the_mixture_is_asked_by_its_id(hub, run, run_folder):
    code, out, err = run("push", run_folder, "me/elrea", "--base-model", BASE, "--public")
    assert (code, out) == (0, f"{hub.url}/me/elrea\n") and not hub.repositories["me/elrea"].private
    assert err.splitlines()[-1] == "next: python3 -m webbrowser https://huggingface.co/me/elrea"
    code, out, _ = run("generate", "me/elrea", PROMPTS[0], "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0 and out


def test_of_a_strangers_repository_only_a_mixtures_files_are_had(pushed):
    files = pushed.repositories["me/elrea"].files
    files |= {"experts/base/model.bin": b"x", "weights.safetensors": b"x", "code.py": b"x"}
    Mixture.from_pretrained("me/elrea", device="cpu")
    assert not {"model.bin", "weights.safetensors", "code.py"} & {Path(name).name for name in pushed.downloaded()}


def test_a_revision_is_that_of_then(pushed, run_folder):
    repository = pushed.repositories["me/elrea"]
    with pytest.raises(CoterieError, match="me/elrea is no folder and cannot be had from the hub"):
        Mixture.from_pretrained("me/elrea", revision="0" * 40, device="cpu")
    assert Mixture.from_pretrained("me/elrea", revision=repository.sha, device="cpu").method == "elrea"


# ---------------------------------------------------------------------------------------------------------- banks


@pytest.fixture
def bank(backbone, model_folder, train_file, tmp_path) -> Path:
    for seed, name in enumerate(("law", "maths")):
        config = {"r": 2 + seed, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
        save_adapter(backbone.model, tmp_path / "adapters" / name, config, seed)
    (tmp_path / "adapters" / "law" / "README.md").write_text("---\nlicense: mit\ndatasets: [someone/laws]\n---\n")
    named = [str(tmp_path / "adapters" / name) for name in ("law", "maths")]
    given = {"model": str(model_folder), "trained_on": [f"maths={train_file}"], "device": "cpu"}
    coterie.bank_add(tmp_path / "bank", named, **given)
    return tmp_path / "bank"


def test_a_bank_comes_back_from_the_hub_with_cards_that_hold(hub, bank, tmp_path, train_file):
    address = coterie.push(bank, repository="me/bank", base_model=BASE)
    assert address == f"{hub.url}/me/bank"
    found, own = coterie.open_bank("me/bank"), coterie.open_bank(bank)
    assert found.names == own.names and found.base_model["id"] == BASE
    assert found.card("maths").trained_on == (train_file.name,) and found.card("law").source == "law"
    assert found.trained_on("maths") == own.trained_on("maths")
    one, other = Mixture.from_bank("me/bank", device="cpu"), Mixture.from_bank(bank, device="cpu")
    assert one.generate(PROMPTS, max_new_tokens=4) == other.generate(PROMPTS, max_new_tokens=4)
    files = hub.repositories["me/bank"].files
    assert [name for name, data in files.items() if str(tmp_path.parent).encode() in data] == []
    _, text = card(hub, "me/bank")
    assert "| `law` | 2 |" in text and "| mit | someone/laws |" in text and "each adapter has its own" in text


def test_a_bank_of_the_hub_is_fitted_like_one_on_disk(hub, bank, run, tmp_path):
    coterie.push(bank, repository="me/bank", base_model=BASE)
    words = ("fit", "from-adapters", "--bank", "me/bank", "--output", tmp_path / "shelf", "--device", "cpu")
    code, out, _ = run(*words)
    assert (code, out) == (0, f"{tmp_path / 'shelf'}: 2 experts (law, maths)\n")


# --------------------------------------------------------------------------------------------------------- finding


@pytest.fixture
def shop(hub, backbone, tmp_path):
    """A hub with adapters of the base model: good ones, and one for every reason to leave one out."""
    wide = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    for number, (name, licence, rank) in enumerate([("good", "mit", 2), ("own", "other", 2), ("large", "mit", 8)]):
        folder = tmp_path / "made" / name
        save_adapter(backbone.model, folder, wide | {"r": rank}, number)
        (folder / "README.md").write_text(
            f"---\nlicense: {licence}\nbase_model: {BASE}\ndatasets: someone/sums\n---\n# {name}\n"
        )
        hub.add(f"people/{name}", folder, downloads=100 - number)
    unlike = hub.add("people/unlike", tmp_path / "made" / "good", downloads=50)
    other = tiny.LlamaForCausalLM(tiny.LlamaConfig(**{**backbone.model.config.to_dict(), "hidden_size": 16}))
    save_adapter(other, tmp_path / "made" / "other", wide)
    unlike.files["adapter_model.safetensors"] = (tmp_path / "made" / "other/adapter_model.safetensors").read_bytes()
    dora = hub.add("people/dora", tmp_path / "made" / "good", downloads=40)
    config = json.loads(dora.files["adapter_config.json"])
    dora.files["adapter_config.json"] = json.dumps(config | {"use_dora": True}).encode()
    pickled = hub.add("people/pickled", tmp_path / "made" / "good", downloads=30)
    pickled.files["adapter_model.bin"] = pickled.files.pop("adapter_model.safetensors")
    lying = hub.add("people/lying", tmp_path / "made" / "good", downloads=20)
    lying.files["adapter_config.json"] = json.dumps(config | {"r": 5}).encode()
    return hub


def test_adapters_that_fit_are_found_and_the_others_left_out_with_their_reason(shop):
    found = {one.name.removeprefix("people/"): one for one in coterie.find_adapters(BASE)}
    assert list(found) == ["good", "own", "large", "unlike", "dora", "pickled", "lying"]
    good = found["good"]
    assert (good.rank, good.layers, good.parameters) == (2, 4, 2 * 2 * (32 + 32 + 32 + 16))
    assert (good.licence, good.datasets, good.downloads, good.refusal) == ("mit", ("someone/sums",), 100, None)
    assert good.revision == shop.repositories["people/good"].sha and found["own"].refusal is None
    told = {name: one.refusal for name, one in found.items() if one.refusal}
    assert set(told) == {"unlike", "dora", "pickled", "lying"}
    assert "but the base model's layer takes (r, 32)" in told["unlike"] and "use_dora = True" in told["dora"]
    assert told["pickled"].startswith("it holds no adapter_model.safetensors")
    assert "another rank than the 2 of its weights" in told["lying"]


def test_nothing_but_cards_configurations_and_heads_is_had(shop):
    list(coterie.find_adapters(BASE))
    files = [path for method, path in shop.asked if method == "GET" and path.endswith("adapter_model.safetensors")]
    assert len(files) == 5  # one head each; not of the pickled one, and not of dora, whose configuration was enough
    assert not list(Path("hub-cache").rglob("adapter_model.safetensors"))
    assert not any(path.endswith("/model.safetensors") for _, path in shop.asked)


def test_licence_and_rank_are_asked_for(shop, run):
    code, out, err = run("bank", "find", "--base", BASE, "--licence", "MIT, apache-2.0", "--max-rank", 4)
    assert code == 0 and re.fullmatch(r"people/good: rank 2, 4 layers, 448 parameters; licence mit, .*\n", out)
    assert "left out people/own: its licence is other, which is not among mit, apache-2.0" in err
    assert "left out people/large: it has rank 8, more than 4" in err
    assert err.splitlines()[-1] == f"next: coterie bank add bank/ OWNER/NAME --model {BASE}"
    code, out, _ = run("bank", "find", "--base", BASE, "--search", "own", "--json")
    assert code == 0 and json.loads(out)["name"] == "people/own"


def test_an_adapter_that_was_found_is_added_by_its_name(shop, run, tmp_path):
    code, out, _ = run("bank", "add", tmp_path / "shelf", "people/good", "--model", BASE, "--device", "cpu")
    assert code == 0 and "added good: rank 2, 4 layers" in out
    assert coterie.open_bank(tmp_path / "shelf").card("good").licence == "mit"


def test_where_none_will_do_the_command_says_so(shop, run, tmp_path):
    refused(run("bank", "find", "--base", BASE, "--licence", "gpl"), "none of 7 adapters that name someone/tiny-base")
    refused(run("bank", "find", "--base", "someone/nothing"), "someone/nothing cannot be had from the hub")
    refused(run("bank", "find", "--base", tmp_path), "is no name of the hub, by which adapters name their base model")
