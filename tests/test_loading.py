"""Loading a base model: what it computes with is identified, and what would go wrong later is refused at once."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import architectures
import tiny
from coterie.artifacts import sha256_of
from coterie.backbone import model as backbone_model
from coterie.backbone import probe
from coterie.backbone.loading import check_identity, load_backbone
from coterie.backbone.model import Backbone, BaseModelIdentity, Reads, float32_product
from coterie.data.batching import pad
from coterie.errors import CoterieError
from coterie.mixture import Mixture
from coterie.settings.groups import ModelSettings
from helpers import close, normal, table


def load(folder, **settings):
    return load_backbone(ModelSettings(model=str(folder), device="cpu", **settings))


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def rewrite(file, **changes):
    record = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


# --- what is not a base model


@pytest.mark.parametrize("with_model", [False, True], ids=["alone", "beside a model"])
def test_an_adapter_is_refused_and_its_base_model_named(run, folder, run_folder, train_file, tmp_path, with_model):
    adapter = run_folder / "experts" / "cluster-0"
    place = shutil.copytree(adapter, folder, dirs_exist_ok=True) if with_model else adapter
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    before = sorted(tmp_path.iterdir())
    status, out, err = run("fit", "elrea", "--model", place, "--data", train_file, "--output", tmp_path / "run")
    assert (status, out, sorted(tmp_path.iterdir())) == (2, "", before)
    told = "holds an adapter (adapter_config.json), not a base model; give the one that it was trained on"
    assert err.endswith(f"{place} {told}: --model {base}\n")


@pytest.mark.parametrize(
    ("file", "entry"),
    table(
        ("model", "config.json", {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}),
        (
            "tokenizer",
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "O"},
        ),
    ),
)
def test_a_stranger_s_code_is_neither_run_nor_asked_about(folder, monkeypatch, tmp_path, file, entry):
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    rewrite(folder / file, **entry, **({"model_type": "own"} if file == "config.json" else {}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked"))
    with pytest.raises(CoterieError, match="needs Python code of its own, .* use a checkpoint of an architecture"):
        load(folder)
    assert not ran.exists()


def test_a_model_whose_files_lack_weights_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertForMaskedLM(config)
    model.bert.save_pretrained(tmp_path)  # an encoder: transformers would draw the rest at random
    tiny.make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CoterieError, match=r"cannot be loaded: its files lack the weight 'cls\."):
        load(tmp_path)


# --- which base model it is


def test_a_model_is_the_weights_that_are_loaded_and_what_its_configuration_says_of_them(folder, backbone):
    (folder / "consolidated.safetensors").write_bytes(b"the same in another form")
    rewrite(folder / "config.json", transformers_version="9", torch_dtype="float16", dtype=None)
    found = load(folder).identity
    assert (found.sha256, found.config_sha256) == (backbone.identity.sha256, backbone.identity.config_sha256)
    assert found.sha256 == sha256_of(folder / "model.safetensors")
    rewrite(folder / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(CoterieError, match="has the same weights, but its config.json says something else"):
        check_identity(backbone.identity, load(folder).identity, "runs/x was trained on")


def test_identities_that_were_written_before_still_fit(folder, backbone):
    before = {key: value for key, value in asdict(backbone.identity).items() if key != "config_sha256"}
    rewrite(folder / "config.json", rms_norm_eps=1e-3)
    check_identity(BaseModelIdentity(**before), load(folder).identity, "runs/x was trained on")
    other = folder / "consolidated.safetensors"  # was hashed too, though nothing of it is loaded
    shutil.copy(folder / "model.safetensors", other)
    before["sha256"] = sha256_of(other, folder / "model.safetensors")
    check_identity(BaseModelIdentity(**before), load(folder).identity, "runs/x was trained on")
    with pytest.raises(CoterieError, match="but the base model loaded is"):
        check_identity(replace(backbone.identity, sha256="0" * 64), load(folder).identity, "runs/x was trained on")


def test_a_mixture_keeps_all_of_the_identity(run_folder, backbone, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    base = json.loads((folder / "mixture.json").read_text())["base_model"]
    assert base == asdict(backbone.identity)
    rewrite(folder / "mixture.json", base_model={**base, "config_sha256": "0" * 64})
    with pytest.raises(CoterieError, match="its config.json says something else"):
        Mixture.from_pretrained(folder, device="cpu")


# --- padding


def test_any_token_pads_where_the_tokenizer_has_none_for_it(folder, backbone):
    rewrite(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    found = load(folder)
    assert (found.tokenizer.pad_token_id, found.tokenizer.eos_token_id, found.pad_id) == (None, None, 0)
    texts = [[10, 11], [12, 13, 14, 15]]
    states = [b.hidden(*pad(texts, b.pad_id, side="left"))[:, -1] for b in (found, backbone)]
    close(*states)


def test_a_padding_token_without_an_embedding_is_not_used(folder):
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    assert load(folder).pad_id == tokenizer.eos_token_id


# --- the probe


def tampered(name: str = "llama") -> Backbone:
    return Backbone(architectures.make_model(name), tiny.make_tokenizer(), BaseModelIdentity("some/model", None, "0"))


def capped(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return torch.tanh(output / 1000) * 1000


def scaled(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    return output * 1.001


@pytest.mark.parametrize("change", [capped, scaled])
def test_an_unknown_change_of_logits_is_found_however_small(monkeypatch, change):
    backbone = tampered()
    forward = backbone.model.forward

    def changed(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits = change(backbone.model, args, found.logits)
        return found

    probe.checked(backbone)
    monkeypatch.setattr(backbone.model, "forward", changed)
    with pytest.raises(CoterieError, match=r"'some/model' \(llama\) .* changes its logits in an unknown way"):
        probe.checked(backbone)


def leaking(hidden: torch.Tensor) -> torch.Tensor:
    """Every state takes something over from the one before, if that is read at the same time."""
    return hidden + torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1] * 4


def mingling(hidden: torch.Tensor) -> torch.Tensor:
    """Rows take something over from each other."""
    return hidden + hidden.mean(dim=0, keepdim=True)


@pytest.mark.parametrize(
    ("change", "layer", "fault"),
    table(
        ("other rows", mingling, 1, probe.BATCH),
        ("the step before", leaking, 1, probe.CACHE),
    ),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_that_hangs_on_something_else_is_found_and_the_cause_named(change, layer, fault, dtype):
    backbone = tampered()
    backbone.model.to(dtype).model.layers[layer].register_forward_hook(lambda module, inputs, output: change(output))
    with pytest.raises(CoterieError, match=fault):
        probe.checked(backbone)


def test_states_that_overflow_and_blocks_that_stand_in_no_list_are_told(monkeypatch):
    backbone = tampered()
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "blocks", nn.ModuleList())
        with pytest.raises(CoterieError, match=probe.BLOCKS):
            probe.checked(backbone)
    backbone.model.model.norm.weight.data.fill_(6e4)
    backbone.model.half()
    with pytest.raises(CoterieError, match=probe.FINITE):
        probe.checked(backbone)


def test_rows_of_a_cache_that_cannot_change_places_are_found(monkeypatch):
    monkeypatch.setattr("coterie.backbone.row_cache.RowCache.copy", lambda *_: None)
    with pytest.raises(CoterieError, match=probe.ORDER):
        probe.checked(tampered("falcon_h1"))


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("llama", Reads()),
        ("gpt_neo", Reads(ragged=False)),
        ("bloom", Reads(ragged=False)),
        ("jamba", Reads(in_pieces=False)),
    ],
)
def test_the_fastest_way_is_found_in_which_a_model_reads_on_from_a_cache(name, reads):
    assert probe.checked(tampered(name)).reads == reads


def test_a_crash_is_told_in_one_line_and_a_full_device_is_no_fault_of_the_model(monkeypatch):
    backbone = tampered()

    def crash(error: Exception) -> None:
        def forward(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(backbone.model.model.layers[1], "forward", forward)

    crash(IndexError("odd\nshape"))
    with pytest.raises(CoterieError, match=r"fails where a batch is read with experts and a cache \(odd\)"):
        probe.checked(backbone)
    crash(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        probe.checked(backbone)


# --- logits and cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_products_in_float32_whatever_the_weights_type(dtype, monkeypatch):
    monkeypatch.setattr(backbone_model, "ROWS_AT_ONCE", 7)
    x, weight = normal(3, 64), normal(50, 64, seed=1).to(dtype)
    wanted = x.double() @ weight.double().T
    torch.testing.assert_close(float32_product(x, weight).double(), wanted, rtol=1e-6, atol=1e-5)
    layer = nn.Linear(64, 50).to(dtype)
    backbone = tampered()
    backbone.model.lm_head = layer
    found = backbone.head(x.reshape(1, 3, 64))
    torch.testing.assert_close(
        found[0].double(), x.double() @ layer.weight.double().T + layer.bias.double(), rtol=1e-5, atol=1e-6
    )


def test_a_trained_state_still_gets_its_gradient_through_the_head():
    backbone = tampered()
    backbone.model.to(torch.bfloat16)
    hidden = normal(2, 32).requires_grad_()
    backbone.head(hidden).sum().backward()
    wanted = backbone.output_layer.weight.float().sum(dim=0).expand(2, -1)
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-2, atol=5e-2)
