"""What is exported computes in the other program what it computes here, and what that program lacks is refused."""

import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from coterie.data.examples import Example
from coterie.data.forms import Message
from coterie.errors import CoterieError
from coterie.experts.bank import load_adapter
from coterie.experts.plain_adapter import VLLM_RANKS, evened, rank_of, vllm_rank, write_plain_adapter
from coterie.lora import LoraPair
from coterie.mixture.export import export_mixture
from coterie.routers.fixed import FixedRouter
from coterie.settings.commands import ExportSettings
from coterie.settings.reading import from_flat
from helpers import close, normal, save_adapter, table
from tiny import delta

PROMPT, ANSWER = "add 3 4", "\\boxed{7}"


@pytest.fixture
def exported(run_folder, tmp_path):
    def export(**settings):
        values = {"mixture": str(run_folder), "output": str(tmp_path / "out"), "device": "cpu", **settings}
        return export_mixture(from_flat(ExportSettings, values))

    return export


def by_peft(folder, mixture) -> float:
    """The log-probability of the answer under PEFT's own model of an exported adapter."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = (Message("user", PROMPT), Message("assistant", ANSWER))
    row = mixture.prompts.row(Example("x", messages))
    answer = torch.tensor(row.ids[row.prompt_length :])
    with torch.inference_mode():
        logprobs = model(torch.tensor([row.ids])).logits[0].log_softmax(dim=-1)
    return float(logprobs[row.prompt_length - 1 : -1].gather(1, answer[:, None]).sum())


def by_us(mixture, router) -> float:
    return float(mixture.replace(router=router, combiner="layers").score(PROMPT, ANSWER).logprobs[0])


def test_an_exported_expert_gives_in_peft_what_it_gives_here(exported, mixture):
    found = exported(target="peft")
    assert list(found.ranks) == [f"experts/{name}" for name in mixture.bank.names]
    values = {name: by_us(mixture, name) for name in mixture.bank.names}
    assert len({round(value, 2) for value in values.values()}) == len(values)  # the experts differ
    for name, value in values.items():
        close(by_peft(found.folder / "experts" / name, mixture), value)


def test_a_static_mixture_is_exact_at_the_sum_of_the_ranks(exported, mixture):
    weights = dict(zip(mixture.bank.names, (0.7, 0.0, 0.45), strict=False))
    found = exported(target="peft", weights=",".join(f"{name}={weight}" for name, weight in weights.items()))
    used = [
        adapter for name, adapter in zip(mixture.bank.names, mixture.bank.adapters, strict=True) if weights.get(name)
    ]
    assert found.ranks == {"mixture": sum(map(rank_of, used))} and found.error == 0
    assert found.weights == {name: weight for name, weight in weights.items() if weight}
    close(by_peft(found.folder / "mixture", mixture), by_us(mixture, FixedRouter(weights)))


def test_a_mixture_weighed_as_a_prompt_answers_that_prompt_as_the_layers_do(exported, mixture):
    found = exported(target="peft", prompt=PROMPT, top_k_experts=2)
    routing = mixture.route(PROMPT, 2)
    assert found.weights == {name: weight for name, weight in routing.row(0).items() if weight}
    close(by_peft(found.folder / "mixture", mixture), by_us(mixture, FixedRouter(routing.row(0))))


def test_a_shortened_mixture_tells_how_far_it_is_off(exported, mixture, backbone):
    weights = ",".join(f"{name}=0.5" for name in mixture.bank.names)
    found = exported(target="vllm", weights=weights, merge="svd:3")
    assert found.ranks == {"mixture": 3}
    short = load_adapter(found.folder / "mixture", backbone.model)
    parts = [{path: delta(pair) for path, pair in adapter.items()} for adapter in mixture.bank.adapters]
    exact = {path: 0.5 * sum(part[path] for part in parts if path in part) for path in short}
    off = sum(float((delta(short[path]) - exact[path]).square().sum()) for path in exact)
    assert found.error == pytest.approx(
        (off / sum(float(one.square().sum()) for one in exact.values())) ** 0.5, rel=1e-3
    )
    assert 0.01 < found.error < 1 and f"relative error {found.error:.2g}" in str(found)
    record = json.loads((found.folder / "export.json").read_text())
    assert record["relative_error"] == found.error and record["merge"] == "svd:3"


PATTERNS = {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}, "lora_alpha": 8}


@pytest.mark.parametrize("rslora", [False, True])
def test_what_a_reader_makes_of_r_and_alpha_alone_is_the_update(backbone, tmp_path, rslora):
    config = {**PATTERNS, "target_modules": ["q_proj", "down_proj", "v_proj"], "use_rslora": rslora}
    save_adapter(backbone.model, tmp_path / "own", config)
    adapter = load_adapter(tmp_path / "own", backbone.model)
    write_plain_adapter(tmp_path / "plain", adapter, backbone.model, "base")
    written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert not written.keys() & {"rank_pattern", "alpha_pattern", "use_rslora"}
    assert written["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    for path, pair in adapter.items():
        down, up = (tensors[f"base_model.model.{path}.lora_{half}.weight"] for half in "AB")
        assert down.shape[0] == up.shape[1] == written["r"] == 4
        assert torch.equal((up @ down) * (written["lora_alpha"] / written["r"]), up @ down)
        close(up @ down, delta(pair))


def test_layers_that_share_an_end_with_others_are_named_in_full(backbone, tmp_path):
    path = "model.layers.1.self_attn.q_proj"
    write_plain_adapter(tmp_path, {path: LoraPair(normal(2, 32), normal(2, 32))}, backbone.model, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [path]
    assert list(load_adapter(tmp_path, backbone.model)) == [path]


def test_padding_ranks_changes_no_update():
    adapter = {"a": LoraPair(normal(2, 5), normal(2, 7), 0.5), "b": LoraPair(normal(3, 5), normal(3, 4), 2.0)}
    found = evened(adapter)
    assert rank_of(adapter) == 3 and {len(pair.down) for pair in found.values()} == {3}
    assert all(torch.equal(delta(found[path]), delta(adapter[path])) and found[path].scaling == 1 for path in adapter)


@pytest.mark.parametrize(("rank", "most"), [(1, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_vllm_is_told_the_smallest_rank_that_it_takes(rank, most):
    assert vllm_rank(rank, "llama") == most and most in VLLM_RANKS


def test_vllm_gets_no_adapter_that_it_refuses():
    with pytest.raises(CoterieError, match="up to rank 512, and this one has 513; add --merge svd:64"):
        vllm_rank(513, "llama")
    with pytest.raises(CoterieError, match="runs models of type 'bloom' without adapters; take --for peft"):
        vllm_rank(8, "bloom")


def test_the_command_for_vllm_names_every_adapter_and_the_base_model(exported, mixture, model_folder):
    found = exported(target="vllm")
    text = (found.folder / "README.md").read_text()
    assert f"vllm serve {model_folder} --enable-lora --max-lora-rank 8 --max-loras {len(mixture.bank)}" in text
    for name in mixture.bank.names:
        assert f"{name}=experts/{name}" in text and (found.folder / "experts" / name / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("given", "told"),
    table(
        ("unknown", {"weights": "cluster-9=1"}, "no expert is called 'cluster-9'"),
        ("no number", {"weights": "base=x"}, "--weights: 'base=x' is no NAME=W"),
        ("negative", {"weights": "base=-1"}, "--weights: 'base=-1' is no NAME=W"),
        ("infinite", {"weights": "base=inf"}, "--weights: 'base=inf' is no NAME=W"),
        ("twice", {"weights": "base=1,base=2"}, "each name once"),
        ("nobody", {"weights": "base=0"}, "all of them are 0"),
        ("both", {"weights": "base=1", "prompt": "x"}, "give one of them"),
        ("merge of nothing", {"merge": "exact"}, "--merge makes one adapter of several"),
        ("no way to merge", {"merge": "average", "weights": "base=1"}, "no way to merge is called 'average'"),
        ("router alone", {"router": "uniform"}, "--router uniform does not act without --prompt"),
        ("k alone", {"top_k_experts": 2}, "--top-k-experts 2 does not act without --prompt"),
        ("too many", {"prompt": "x", "top_k_experts": 99}, "--top-k-experts must be between 1 and"),
        ("gates", {"prompt": "x", "router": "arrow"}, "router 'arrow' weighs experts anew at every layer's input"),
        ("base for peft", {"base_type": "f16"}, "--base-type f16 does not act with --for peft"),
        ("target", {"target": "ollama"}, "--for: input should be 'vllm', 'peft' or 'llama.cpp'"),
    ),
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(exported, tmp_path, given, told):
    with pytest.raises(CoterieError, match=re.escape(told)):
        exported(**{"target": "peft", **given})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_over_unasked(exported, tmp_path):
    found = exported(target="peft")
    with pytest.raises(CoterieError, match="exists; choose another --output"):
        exported(target="peft")
    again = exported(target="vllm", overwrite=True)
    assert again.folder == found.folder and "vllm serve" in (again.folder / "README.md").read_text()
