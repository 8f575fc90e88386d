"""Experts loaded from PEFT folders compute what PEFT computes, and folders that cannot are refused by name."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from coterie.artifacts import MAX_TENSOR_FILE
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.loading import Backbone
from coterie.errors import CoterieError
from coterie.experts import bank
from coterie.experts.bank import ExpertBank, check_names, load_adapter, load_bank
from coterie.experts.fresh_adapter import plain_config
from helpers import rewrite_config, save_adapter

SAMPLES = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "another rank": {"r": 7, "lora_alpha": 3, "target_modules": "all-linear"},
    "rank-stabilised": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 40, r".*\.v_proj": 1},
    },
    "some layers": {"r": 3, "lora_alpha": 6, "target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [1]},
    "gaussian start": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": "gaussian"},
}
"""Adapters that differ in everything that changes an update's rank, scaling or place."""

TOKENS = torch.tensor([[7, 60, 3, 250, 99, 12, 12, 8, 41]])
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def samples(backbone, tmp_path_factory) -> tuple[dict[str, Path], torch.Tensor]:
    """Folders of all samples, and what PEFT computes with each alone."""
    root = tmp_path_factory.mktemp("adapters")
    folders, logits = {}, []
    for seed, (name, config) in enumerate(SAMPLES.items()):
        folders[name] = root / name
        model = save_adapter(backbone.model, folders[name], config, seed)
        with torch.inference_mode():
            logits.append(model(input_ids=TOKENS).logits[0])
    return folders, torch.stack(logits)


@pytest.fixture(scope="module")
def experts(backbone, samples) -> ExpertBank:
    return load_bank(samples[0], backbone.model)


@pytest.fixture
def plain(samples, tmp_path) -> Path:
    """A copy of the plain adapter, to be spoilt."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (bank.CONFIG_FILE, bank.WEIGHTS_FILE):
        (folder / name).write_bytes((samples[0]["plain"] / name).read_bytes())
    return folder


@torch.inference_mode()
def run(backbone: Backbone, adapters, weights: torch.Tensor) -> torch.Tensor:
    layers = ExpertLayers(backbone.model, adapters)
    with layers.running(layers.weighted(weights)):
        return backbone.head(backbone.hidden(TOKENS.expand(len(weights), -1)))


@torch.inference_mode()
def base_logits(backbone: Backbone) -> torch.Tensor:
    return backbone.model(input_ids=TOKENS).logits


def rewrite_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / bank.WEIGHTS_FILE)
    save_file(change(tensors), folder / bank.WEIGHTS_FILE)


def key(half: str, layer: str = LAYER) -> str:
    return f"base_model.model.{layer}.lora_{half}.weight"


# ------------------------------------------------------------------------------------------------------ right ones


def test_every_expert_in_one_batch_equals_peft_with_that_adapter_alone(backbone, samples, experts):
    found = run(backbone, experts.adapters, torch.eye(len(SAMPLES)))
    assert (samples[1] - base_logits(backbone)).abs().amax(dim=(1, 2)).min() > 0.05  # every adapter changes something
    torch.testing.assert_close(found, samples[1], rtol=1e-4, atol=1e-4)


def test_one_hot_weights_equal_every_expert_alone(backbone, samples, experts):
    count = len(SAMPLES)
    found = run(backbone, experts.adapters, torch.eye(count)[:, None, :])
    torch.testing.assert_close(found, run(backbone, experts.adapters, torch.eye(count)), rtol=1e-4, atol=1e-5)


def test_only_some_of_the_experts_and_unequal_counts_give_the_same_rows(backbone, samples, experts):
    for owners in ([1, 1, 4], [4, 1, 1], [1, 4, 1], [4, 1]):
        found = run(backbone, experts.adapters, torch.eye(len(SAMPLES))[owners])
        torch.testing.assert_close(found, samples[1][owners], rtol=1e-4, atol=1e-4)


def test_scalings_are_alpha_over_rank_with_patterns_and_over_its_root_when_stabilised(backbone, samples):
    scalings = {
        name: {path: pair.scaling for path, pair in load_adapter(folder, backbone.model).items()}
        for name, folder in samples[0].items()
    }
    assert set(scalings["plain"].values()) == {16 / 4}
    assert set(scalings["rank-stabilised"].values()) == {16 / 2}
    patterned = scalings["patterns"]
    assert patterned["model.layers.0.self_attn.q_proj"] == 16 / 2
    assert patterned["model.layers.1.self_attn.q_proj"] == 16 / 4
    assert patterned["model.layers.1.mlp.down_proj"] == 16 / 6
    assert patterned["model.layers.1.mlp.up_proj"] == 40 / 4
    assert patterned["model.layers.0.mlp.up_proj"] == 16 / 4
    assert patterned["model.layers.0.self_attn.v_proj"] == 1 / 4
    assert set(scalings["some layers"]) == {"model.layers.1.self_attn.v_proj", "model.layers.1.mlp.gate_proj"}


def test_the_loaded_factors_are_pefts_with_the_scaling_in_the_second(backbone, samples):
    loaded = load_adapter(samples[0]["plain"], backbone.model)
    tensors = load_file(samples[0]["plain"] / bank.WEIGHTS_FILE)
    assert torch.equal(loaded[LAYER].down, tensors[key("A")])
    torch.testing.assert_close(loaded[LAYER].up, 4 * tensors[key("B")].T)
    assert len(loaded) * 2 == len(tensors)


def test_factors_in_half_precision_are_read_as_float32(backbone, plain):
    rewrite_tensors(plain, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    pair = load_adapter(plain, backbone.model)[LAYER]
    assert pair.down.dtype == pair.up.dtype == torch.float32


def test_base_weights_are_bit_identical_and_every_layer_is_itself_again(backbone, experts):
    before = {name: parameter.clone() for name, parameter in backbone.model.named_parameters()}
    run(backbone, experts.adapters, torch.eye(len(SAMPLES)))
    assert all(torch.equal(before[name], parameter) for name, parameter in backbone.model.named_parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in backbone.model.modules()
    )


def test_updates_of_zero_are_the_base_model_to_the_last_bit(backbone, experts):
    zeros = {path: type(pair)(pair.down, torch.zeros_like(pair.up)) for path, pair in experts.adapters[0].items()}
    with torch.inference_mode():
        expected = backbone.head(backbone.hidden(TOKENS.expand(3, -1)))
    assert torch.equal(run(backbone, [zeros, experts.adapters[0]], torch.eye(2)[[0, 0, 0]]), expected)
    weights = torch.zeros(3, 1, 2)
    assert torch.equal(run(backbone, [zeros, experts.adapters[0]], weights), expected)


def test_an_expert_without_layers_is_the_base_model(backbone, experts):
    both = ExpertBank((*experts.names, "backbone"), (*experts.adapters, {}))
    assert (len(both), both.index("backbone")) == (len(experts) + 1, len(experts))
    found = run(backbone, both.adapters, torch.eye(len(both))[[0, len(experts)]])
    torch.testing.assert_close(found[1:], base_logits(backbone), rtol=1e-5, atol=1e-5)


def test_copies_of_one_expert_are_that_expert_whatever_their_shares(backbone, experts):
    copies = [experts.adapters[3]] * 4
    weights = torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[0.0, 1.0, 0.0, 0.0]]])
    alone = run(backbone, [experts.adapters[3]], torch.ones(1, 1))
    torch.testing.assert_close(run(backbone, copies, weights), alone.expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(backbone, copies, torch.eye(4)), alone.expand(4, -1, -1), rtol=1e-4, atol=1e-4)


def test_the_order_of_experts_does_not_matter(backbone, experts):
    weights = torch.rand(2, 1, len(SAMPLES), generator=torch.Generator().manual_seed(0))
    order = [3, 0, 5, 1, 4, 2]
    found = run(backbone, [experts.adapters[i] for i in order], weights[..., order])
    torch.testing.assert_close(found, run(backbone, experts.adapters, weights), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ wrong ones

BAD_FIELDS = {
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "biases of the update": {"lora_bias": True},
    "full modules": {"modules_to_save": ["lm_head"]},
    "another kind": {"peft_type": "IA3"},
    "repeated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "parameters": {"target_parameters": ["mlp.experts"]},
    "a start that changes the base": {"init_lora_weights": "pissa_niter_4"},
    "another such start": {"init_lora_weights": "olora"},
    "pooled inputs": {"use_qalora": True},
    "blocks": {"use_bdlora": {"nblocks": 2}},
    "tokens that switch it on": {"alora_invocation_tokens": [1, 2]},
}


@pytest.mark.parametrize("change", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_an_adapter_that_means_more_than_its_factors_is_refused_by_file_and_field(backbone, plain, change):
    rewrite_config(plain, **change)
    [(field, value)] = change.items()
    said = f"adapter/adapter_config.json: {field} = {value!r} is not supported; use a plain LoRA adapter"
    with pytest.raises(CoterieError, match=re.escape(said)):
        load_adapter(plain, backbone.model)


def test_a_saved_dora_adapter_is_refused(backbone, tmp_path):
    save_adapter(backbone.model, tmp_path / "dora", SAMPLES["plain"] | {"use_dora": True})
    with pytest.raises(CoterieError, match="use_dora = True is not supported"):
        load_adapter(tmp_path / "dora", backbone.model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_adapter_of_the_output_layer_is_refused(backbone, tmp_path):
    """The output layer runs apart from the layers that experts are attached to, so its update would be lost."""
    save_adapter(backbone.model, tmp_path, {"r": 2, "target_modules": ["v_proj", "lm_head"]})
    with pytest.raises(CoterieError, match="lm_head is the output layer, which experts cannot change"):
        load_adapter(tmp_path, backbone.model)


def test_an_old_config_without_the_newer_fields_is_taken(backbone, plain):
    config = json.loads((plain / bank.CONFIG_FILE).read_text())
    (plain / bank.CONFIG_FILE).write_text(json.dumps({name: config[name] for name in ("peft_type", "r", "lora_alpha")}))
    assert load_adapter(plain, backbone.model)[LAYER].scaling == 4


BAD_SCALINGS = {
    "another rank": (
        {"r": 5},
        r"r = 5 and lora_alpha = 16 do not fit model\.layers\.0\..*, whose rank is 4",
    ),
    "another rank for one layer": (
        {"rank_pattern": {"q_proj": 8}},
        f"r = 8 and .* do not fit {LAYER}, whose rank is 4",
    ),
    "no alpha": ({"lora_alpha": None}, "'lora_alpha': should be a valid number, got null; get the adapter again"),
    "an alpha beyond numbers": ({"lora_alpha": 10**400}, "holds a number that is too large"),
    "a repeat beyond numbers": (
        {"rank_pattern": {"a{9999999999999}": 4}},
        "rank_pattern or alpha_pattern is broken .*; get the adapter again",
    ),
    "infinite alpha": ({"lora_alpha": float("inf")}, "Infinity is no number that JSON has"),
    "an absurd alpha": ({"lora_alpha": 1e300}, "'lora_alpha': should be less than or equal to 1000000, got 1e.300"),
    "a list as pattern": ({"alpha_pattern": ["q_proj"]}, "'alpha_pattern': should be a valid dictionary, got"),
    "a rank that is a text": ({"r": "4"}, "'r': should be a valid integer, got \"4\"; get the adapter again"),
    "a broken pattern": (
        {"rank_pattern": {"(": 4}},
        "rank_pattern or alpha_pattern is broken .*; get the adapter again",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_SCALINGS.values(), ids=BAD_SCALINGS)
def test_a_rank_or_scaling_that_does_not_fit_the_tensors_is_refused(backbone, plain, change, message):
    rewrite_config(plain, **change)
    with pytest.raises(CoterieError, match=message) as caught:
        load_adapter(plain, backbone.model)
    assert "adapter/adapter_config.json" in str(caught.value)


SLOW_PATTERNS = {
    "a repeated group": ["([a-z._0-9]+)+!"],
    "three repeats": [".*.*.*!"],
    "many alternatives": ["(la|la)" * 7],
    "a long one": ["x" * 200 + "*"],
    "many": [f".*layer{number}" for number in range(33)],
}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("patterns", SLOW_PATTERNS.values(), ids=SLOW_PATTERNS)
def test_patterns_that_could_search_for_years_are_refused(backbone, plain, patterns, field):
    said = f"adapter_config.json: {field} has {patterns[-1][:80]!r}, which may take too long; name the layers plainly"
    rewrite_config(plain, **{field: dict.fromkeys(patterns, 4)})
    with pytest.raises(CoterieError, match=re.escape(said)):
        load_adapter(plain, backbone.model)


def test_patterns_as_people_write_them_are_taken(backbone, plain):
    rewrite_config(plain, r=9, rank_pattern={r"model\.layers\.\d+\..*_proj": 4}, alpha_pattern={"(q|k|v)_proj": 8})
    loaded = load_adapter(plain, backbone.model)
    assert loaded[LAYER].scaling == 8 / 4 and loaded["model.layers.0.mlp.up_proj"].scaling == 16 / 4


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


def with_nan(tensors, name):
    tensors[name][1, 1] = float("nan")
    return tensors


def renamed(tensors, name, new):
    return {new if other == name else other: tensor for other, tensor in tensors.items()}


BAD_TENSORS = {
    "missing half": (lambda t: without(t, key("B")), f"{LAYER} has only lora_A; get the adapter again"),
    "missing other half": (lambda t: without(t, key("A")), f"{LAYER} has only lora_B"),
    "NaN": (lambda t: with_nan(t, key("B")), f"tensor '{key('B')}' holds NaN or infinite values"),
    "infinity": (lambda t: t | {key("A"): t[key("A")] / 0}, f"tensor '{key('A')}' holds NaN or infinite values"),
    "eight bits": (
        lambda t: t | {key("A"): t[key("A")].to(torch.float8_e4m3fn)},
        f"tensor '{key('A')}' is of F8_E4M3, which no plain LoRA factor is",
    ),
    "whole numbers": (lambda t: t | {key("A"): t[key("A")].int()}, "is of I32, which no plain LoRA factor is"),
    "another width": (
        lambda t: t | {key("A"): torch.ones(4, 33)},
        rf"{LAYER} has lora_A \(4, 33\) and lora_B \(32, 4\), but the base model's layer takes \(r, 32\) and \(32, r\)",
    ),
    "another height": (lambda t: t | {key("B"): torch.ones(31, 4)}, rf"{LAYER} has .* lora_B \(31, 4\), but the base"),
    "halves of different rank": (lambda t: t | {key("A"): torch.ones(3, 32)}, rf"{LAYER} has lora_A \(3, 32\)"),
    "a scalar": (lambda t: t | {key("A"): torch.ones(())}, rf"{LAYER} has lora_A \(\) and"),
    "rank 0": (
        lambda t: t | {key("A"): torch.ones(0, 32), key("B"): torch.ones(32, 0)},
        rf"{LAYER} has lora_A \(0, 32\)",
    ),
    "a convolution": (lambda t: t | {key("A"): torch.ones(4, 32, 1, 1)}, rf"{LAYER} has lora_A \(4, 32, 1, 1\)"),
    "another layer": (
        lambda t: {name.replace("layers.1", "layers.9"): tensor for name, tensor in t.items()},
        "the base model has no linear layer 'model.layers.9.",
    ),
    "no linear layer": (
        lambda t: {name.replace("self_attn.q_proj", "input_layernorm"): tensor for name, tensor in t.items()},
        "the base model has no linear layer 'model.layers.0.input_layernorm'",
    ),
    "a foreign tensor": (lambda t: renamed(t, key("A"), "lm_head.weight"), "tensor 'lm_head.weight' is no LoRA factor"),
    "a magnitude": (
        lambda t: renamed(t, key("A"), f"base_model.model.{LAYER}.lora_magnitude_vector"),
        "lora_magnitude_vector' is no LoRA factor; use plain LoRA on linear layers alone",
    ),
    "values beyond float32": (
        lambda t: t | {key("A"): torch.full((4, 32), 1e300, dtype=torch.float64)},
        f"tensor '{key('A')}' holds NaN or infinite values",
    ),
    "values whose products overflow": (
        lambda t: t | {key("A"): torch.full((4, 32), 1e20)},
        f"tensor '{key('A')}' holds values of up to 1e.20; get or train the adapter again",
    ),
    "an update that drowns the model": (
        lambda t: t | {key("A"): torch.full((4, 32), 1e6), key("B"): torch.full((32, 4), 1e6)},
        f"the update of {LAYER} has a norm of up to 5.1e.14 after scaling by 4, which no training gives",
    ),
    "a rank beyond need": (
        lambda t: t | {key("A"): torch.ones(1025, 32), key("B"): torch.ones(32, 1025)},
        f"{LAYER} has rank 1025, more than its 32 x 32 weights can need",
    ),
    "no tensors": (lambda t: {}, "adapter_model.safetensors holds no tensors; get the adapter again"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_file_and_name(backbone, plain, change, message):
    rewrite_tensors(plain, change)
    with pytest.raises(CoterieError, match=message) as caught:
        load_adapter(plain, backbone.model)
    assert "adapter/adapter_model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "is truncated or not a safetensors file"),
        (lambda file: file.write_bytes(b"\xff" * 8 + b"x" * 100), "is truncated or not a safetensors file"),
        (lambda file: file.write_bytes(b""), "is truncated or not a safetensors file"),
        (lambda file: file.write_text("PK not a tensor at all"), "is truncated or not a safetensors file"),
        (lambda file: file.unlink(), "does not exist"),
    ],
    ids=["truncated", "a huge header", "empty", "something else", "missing"],
)
def test_a_weights_file_that_cannot_be_read_is_refused_by_name(backbone, plain, spoil, message):
    spoil(plain / bank.WEIGHTS_FILE)
    with pytest.raises(CoterieError, match=rf"adapter/adapter_model\.safetensors {message}"):
        load_adapter(plain, backbone.model)


def test_a_weights_file_that_is_too_large_is_refused_before_it_is_read(backbone, plain):
    with (plain / bank.WEIGHTS_FILE).open("r+b") as file:
        file.truncate(MAX_TENSOR_FILE + 1)  # a hole: it takes no room on the disk
    with pytest.raises(
        CoterieError, match="adapter_model.safetensors has 8,589,934,593 bytes, more than the 8,589,934,592"
    ):
        load_adapter(plain, backbone.model)


def sparse(file: Path, header: dict[str, Any]) -> None:
    """A safetensors file whose tensors are a hole: it claims much and takes nothing on the disk."""
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))


def test_a_gigabyte_that_is_only_claimed_is_refused_before_any_of_it_is_read(backbone, plain, monkeypatch):
    monkeypatch.setattr(bank, "read_floats", None)
    half = 2**29
    header = {
        key("A"): {"dtype": "F32", "shape": [half // 4 // 32, 32], "data_offsets": [0, half]},
        key("B"): {"dtype": "F32", "shape": [32, half // 4 // 32], "data_offsets": [half, 2 * half]},
    }
    sparse(plain / bank.WEIGHTS_FILE, header)
    with pytest.raises(CoterieError, match="has rank 4194304, more than its 32 x 32 weights can need"):
        load_adapter(plain, backbone.model)


def test_an_update_must_be_finite_in_the_numbers_that_the_model_computes_with(backbone, plain):
    tensors = load_file(plain / bank.WEIGHTS_FILE)
    tensors[key("B")][0, 0] = 20_000.0  # times the scaling of 4 it is beyond the 65,504 of float16
    save_file(tensors, plain / bank.WEIGHTS_FILE)
    for dtype in (torch.float32, torch.bfloat16):
        assert load_adapter(plain, copy.deepcopy(backbone.model).to(dtype))[LAYER].up[0, 0] == 80_000
    with pytest.raises(CoterieError, match=f"the update of {LAYER} has a norm of up to .* after scaling by 4"):
        load_adapter(plain, copy.deepcopy(backbone.model).half())


@pytest.mark.parametrize("name", SAMPLES)
def test_what_peft_is_told_of_a_strangers_adapter_is_what_its_own_config_says(backbone, samples, name, tmp_path):
    """Continued from, it computes the same; nothing but its factors and checked numbers reaches PEFT."""
    folders, logits = samples
    folder = shutil.copytree(folders[name], tmp_path / "adapter")
    rewrite_config(folder, exclude_modules="(a+)+$", layers_pattern=["(.*)*"], target_modules="(.*)*q_proj(.*)*!")
    model = copy.deepcopy(backbone.model)
    told = PeftModel.from_pretrained(model, folder, config=plain_config(folder, model)).eval()
    with torch.inference_mode():
        found = told(input_ids=TOKENS).logits[0]
    assert torch.equal(found, logits[list(SAMPLES).index(name)])


@pytest.mark.parametrize("change", [{"lora_dropout": "much"}, {"lora_dropout": 1.0}, {"use_rslora": 2}])
def test_odd_values_do_not_reach_peft(backbone, plain, change):
    rewrite_config(plain, **change)
    with pytest.raises(CoterieError, match=f"adapter_config.json, '{next(iter(change))}': should be"):
        plain_config(plain, backbone.model)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("{", "is not readable JSON"), ("[]", "must hold")]
)
def test_a_config_that_cannot_be_read_is_refused_by_name(backbone, plain, content, message):
    (plain / bank.CONFIG_FILE).unlink()
    if content is not None:
        (plain / bank.CONFIG_FILE).write_text(content)
    with pytest.raises(CoterieError, match=f"adapter/adapter_config.json {message}"):
        load_adapter(plain, backbone.model)


@pytest.mark.parametrize(
    "name", ["../evil", "a/b", "/etc", "..", ".", "", ".hidden", "a/", "a\x1b[2J", "a\nb", "a\0b", "x" * 201]
)
def test_names_that_are_paths_are_refused(name):
    with pytest.raises(CoterieError, match=re.escape(f"{name!r} cannot be an expert's name")):
        check_names(["fine", name])


def test_plain_names_are_taken():
    check_names(["base", "cluster-0", "law_v1.2", "Übung"])


def test_experts_need_names_of_their_own(experts):
    with pytest.raises(CoterieError, match="a name of their own each, got a, a"):
        ExpertBank(("a", "a"), experts.adapters[:2])
    with pytest.raises(CoterieError, match="a name of their own each, got a"):
        ExpertBank(("a",), experts.adapters[:2])
    with pytest.raises(CoterieError, match="a name of their own each"):
        ExpertBank((*experts.names, "plain"), (*experts.adapters, {}))


def test_an_unknown_expert_is_told_with_the_nearest_name(experts):
    with pytest.raises(
        CoterieError, match="no expert is called 'patern'. Did you mean 'patterns'\\? There are: another"
    ):
        experts.index("patern")
    assert experts.index("patterns") == 3


def test_the_linear_layers_of_the_model_are_found_with_their_widths(backbone):
    shapes = linear_shapes(backbone.model)
    assert shapes[LAYER] == (32, 32)
    assert shapes["model.layers.1.self_attn.k_proj"] == (32, 16)
    assert shapes["model.layers.1.mlp.down_proj"] == (48, 32)
    assert len(shapes) == 2 * 7 + 1  # and the output layer
