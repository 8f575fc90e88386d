"""llama.cpp computes what the combiner `layers` computes, and what it cannot compute is refused."""

import copy
import dataclasses
import json
import math
import re
import sys

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import tiny
from coterie.backbone import gguf_files
from coterie.backbone.gguf_files import write_gguf_model
from coterie.backbone.loading import load_backbone
from coterie.combiners.table import make_combiner
from coterie.data.batching import PromptFormat
from coterie.errors import CoterieError
from coterie.experts.bank import load_bank
from coterie.mixture import Mixture
from coterie.mixture.export import export_mixture
from coterie.mixture.llama_cpp import SAMPLING, LlamaCpp, threads_that_pay
from coterie.mixture.told_logprobs import aligned_logprobs
from coterie.routers.fixed import FixedRouter, uniform
from coterie.settings.commands import ExportSettings
from coterie.settings.groups import ModelSettings
from coterie.settings.reading import from_flat
from coterie.settings.sampling import SamplingSettings
from helpers import refused, save_adapter, table

pytest.importorskip("xllamacpp", reason="needs the extra 'llamacpp'")

PROMPTS = ["add 3 4", "SPELL ABCD NOW", "a longer prompt, which takes another way?"]
ASCII_ALONE = [f"{token}=-100" for token in range(94, 256)]
"""A bias without which a random model writes hardly a whole character."""


@pytest.fixture(scope="module")
def base(backbone, tmp_path_factory):
    """The base model as GGUF in float32, so that only the order of sums differs."""
    file = tmp_path_factory.mktemp("gguf") / "base.gguf"
    write_gguf_model(file, backbone, "f32")
    return file


@pytest.fixture(scope="module")
def layers(mixture):
    return mixture.replace(combiner="layers")


@pytest.fixture(scope="module")
def engine(layers, base):
    with LlamaCpp(layers, base) as found:
        yield found


@pytest.fixture
def answering(engine, layers):
    """llama.cpp, started once for all tests, under the mixture's own router."""
    return of(engine, layers.router)


def of(engine, router):
    engine.mixture = engine.mixture.replace(router=router)
    return engine


def same_as_ours(found, wanted):
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert [one.text for one in found] == [one.text for one in wanted]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in wanted]
    told = 0
    for one, other in zip(found, wanted, strict=True):
        assert one.weights == pytest.approx(dict(other.weights))
        for ours, theirs in zip(other.logprobs, one.logprobs, strict=True):
            assert math.isnan(theirs) or theirs == pytest.approx(ours, abs=2e-4)
            told += not math.isnan(theirs)
    assert told


def test_the_routed_mixture_of_every_prompt_is_the_one_of_the_layers(answering, layers):
    found = answering.generate(PROMPTS, max_new_tokens=24)
    same_as_ours(found, layers.generate(PROMPTS, max_new_tokens=24))
    assert len({tuple(one.weights.values()) for one in found}) == len(PROMPTS)


@pytest.mark.parametrize("router", ["cluster-0", "uniform"])
def test_one_expert_and_a_static_mixture_are_those_of_the_layers(answering, layers, router):
    found = of(answering, router).generate(PROMPTS[:2], max_new_tokens=12)
    same_as_ours(found, layers.replace(router=router).generate(PROMPTS[:2], max_new_tokens=12))


def test_weights_act_as_they_are_also_above_1_and_only_the_largest_where_asked(answering, layers):
    weights = FixedRouter(dict(zip(layers.bank.names, (0.3, 1.7, 0.0, 0.4), strict=True)))
    found = of(answering, weights).generate(PROMPTS[0], max_new_tokens=12, top_k_experts=2)
    same_as_ours(found, layers.replace(router=weights).generate(PROMPTS[0], max_new_tokens=12, top_k_experts=2))
    assert found[0].weights[layers.bank.names[0]] == 0


@pytest.mark.parametrize(
    "settings",
    table(
        ("repetition penalty", {"repetition_penalty": 1.7}),
        ("bias", {"logit_bias": ["70=4", "71=4.5"]}),
        ("all but the likeliest cut off", {"temperature": 3.0, "top_k": 1}),
        ("by min-p", {"temperature": 3.0, "min_p": 1.0}),
        ("stop string", {"stop": ["e"]}),
    ),
)
def test_settings_act_as_they_do_here(answering, layers, settings):
    found = answering.generate(PROMPTS, max_new_tokens=16, **settings)
    wanted = layers.generate(PROMPTS, max_new_tokens=16, **settings)
    same_as_ours(found, wanted)
    plain = layers.generate(PROMPTS, max_new_tokens=16)
    assert [one.token_ids for one in wanted] != [one.token_ids for one in plain] or "temperature" in settings


def test_a_seed_draws_the_same_again_and_each_of_several_answers_has_its_own(answering):
    settings = {"temperature": 1.5, "max_new_tokens": 12, "n": 3, "seed": 5}
    one, other = (answering.generate(PROMPTS[0], **settings) for _ in range(2))
    assert [answer.token_ids for answer in one] == [answer.token_ids for answer in other]
    assert len({answer.token_ids for answer in one}) == 3
    assert answering.generate(PROMPTS[0], **{**settings, "n": 1})[0].token_ids == one[0].token_ids


def test_a_stream_gives_the_whole_answer_in_pieces(answering):
    settings = {"max_new_tokens": 20, "logit_bias": ASCII_ALONE}
    pieces = [piece.text for piece in answering.stream(PROMPTS[0], **settings)]
    assert "".join(pieces) == answering.generate(PROMPTS[0], **settings)[0].text and len(pieces) > 5


def test_nothing_read_under_other_adapters_is_taken_again(answering, layers, base):
    prompt = "once " * 80
    cells = [layers.bank.names[0], layers.bank.names[1], "uniform", layers.bank.names[0]]
    for router in cells:
        found = of(answering, router).generate(prompt, max_new_tokens=6, logit_bias=ASCII_ALONE)
        with LlamaCpp(layers.replace(router=router), base) as cold:
            wanted = cold.generate(prompt, max_new_tokens=6, logit_bias=ASCII_ALONE)
        same_as_ours(found, wanted)
    same_as_ours(found, layers.replace(router=router).generate(prompt, max_new_tokens=6, logit_bias=ASCII_ALONE))


@pytest.mark.parametrize(("kind", "off"), [("f16", 0.005), ("q8_0", 0.03), ("q4_1", 0.1)])
def test_a_quantised_base_is_the_one_whose_numbers_stand_in_the_file(layers, backbone, tmp_path, kind, off):
    """Against our own engine on the dequantised numbers: llama.cpp also rounds what meets them to 8 bits, or 16."""
    file = tmp_path / "base.gguf"
    write_gguf_model(file, backbone, kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32).eval()
    other = dataclasses.replace(backbone, model=model)
    ours = Mixture(other, layers.bank, layers.router, layers.combiner, layers.prompts, layers.method)
    with LlamaCpp(layers, file) as answering:
        (found,) = of(answering, "uniform").generate(PROMPTS[0], max_new_tokens=12)
    row = ours.tokens(PROMPTS[0])[0]
    ids = torch.tensor([[*row.ids, *found.token_ids]])
    rows = ours.combiner.plan(uniform(ours.bank.names).route([row]))
    with ours.layers.running(ours.layers.mix(rows)), torch.inference_mode():
        logprobs = model(ids).logits[0, len(row.ids) - 1 : -1].log_softmax(dim=-1)
    wanted = logprobs.gather(1, torch.tensor(found.token_ids)[:, None]).flatten().tolist()
    gaps = [abs(one - other) for one, other in zip(found.logprobs, wanted, strict=True) if not math.isnan(one)]
    assert len(gaps) > 4 and max(gaps) < off


MODELS = {
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "llama, wide heads, apart, with biases": (
        LlamaConfig,
        {"head_dim": 16, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_type_of_model_that_is_written_computes_the_same_there(tmp_path, name):
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer) + 5, "max_position_embeddings": 256}
    model = AutoModelForCausalLM.from_config(kind(**sizes, **settings, bos_token_id=256, eos_token_id=257))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ends = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for number in range(2):
        save_adapter(model, tmp_path / f"e{number}", {"r": 2 + number, "target_modules": ends}, seed=number)
    adapters = {f"e{number}": tmp_path / f"e{number}" for number in range(2)}
    backbone = load_backbone(ModelSettings(model=str(tmp_path / "base"), device="cpu"))
    write_gguf_model(tmp_path / "base.gguf", backbone, "f32")
    bank = load_bank(adapters, backbone.model)
    router = FixedRouter({"e0": 0.4, "e1": 0.9})
    layers = Mixture(backbone, bank, router, make_combiner("layers"), PromptFormat(backbone.tokenizer), "none")
    with LlamaCpp(layers, tmp_path / "base.gguf") as answering:
        same_as_ours(answering.generate(PROMPTS[0], max_new_tokens=8), layers.generate(PROMPTS[0], max_new_tokens=8))


@pytest.mark.parametrize(
    ("cell", "told"),
    table(
        ("logits", {"combiner": "logits"}, "the combiner is 'logits'; add --combiner layers, or take --engine coterie"),
        ("texts", {"combiner": "texts"}, "the combiner is 'texts'; add --combiner layers"),
        ("another merge", {"combiner": "weights:factors"}, "the combiner is 'weights:factors'"),
        ("gates", {"router": "arrow"}, "router 'arrow' weighs experts anew at every layer's input"),
    ),
)
def test_what_scaled_adapters_do_not_compute_is_refused(layers, base, cell, told):
    with pytest.raises(CoterieError, match=re.escape(told)):
        LlamaCpp(layers.replace(**cell), base)


def test_weights_that_change_while_it_answers_are_refused(layers, base):
    with pytest.raises(CoterieError, match="re-routes while it answers, which llama.cpp does not; add --every inf"):
        LlamaCpp(layers.rerouted(2), base)
    with LlamaCpp(layers.rerouted(None), base):
        pass


@pytest.mark.parametrize(
    ("settings", "told"),
    table(
        ("presence", {"presence_penalty": 0.5}, "llama.cpp does not follow --presence-penalty"),
        ("frequency", {"frequency_penalty": 0.5}, "llama.cpp does not follow --frequency-penalty"),
        ("top logprobs", {"top_logprobs": 2}, "llama.cpp does not follow --top-logprobs"),
        ("seed", {"seed": 2**32 - 1, "temperature": 1.0}, "takes seeds up to 4294967294, got --seed 4294967295"),
        ("batch", {"batch_size": 4}, "one prompt after the other here, so leave --batch-size out"),
        ("several greedy", {"n": 2}, "at temperature 0 all 2 answers to a prompt are equal"),
        ("too long", {"max_new_tokens": 600}, "was made for texts of up to 512 tokens"),
        ("unknown", {"heat": 1}, "no setting is called 'heat'"),
    ),
)
def test_settings_that_it_does_not_follow_are_refused(answering, settings, told):
    with pytest.raises(CoterieError, match=re.escape(told)):
        answering.generate(PROMPTS[0], **settings)


def test_all_settings_of_sampling_are_passed_on_or_refused(answering):
    assert set(SamplingSettings.model_fields) == {
        *SAMPLING,
        *("logit_bias", "max_new_tokens"),
        *("presence_penalty", "frequency_penalty", "top_logprobs", "speculate"),
    }


def test_a_longer_text_gets_more_room(layers, base):
    with LlamaCpp(layers, base) as answering:
        short = answering.generate(PROMPTS[0], max_new_tokens=4)
        long = answering.generate("x" * 300, max_new_tokens=4)
        again = answering.generate(PROMPTS[0], max_new_tokens=4)
    same_as_ours(short, again)
    same_as_ours(long, layers.generate("x" * 300, max_new_tokens=4))


@pytest.mark.parametrize(
    ("weights", "blocks", "experts", "most", "threads"),
    [
        (98_362_432, 30, 6, 2, 1),  # SmolLM2-135M with six experts: 63 ms on two threads, 16 on one
        (98_362_432, 30, 0, 2, 1),  # the same alone: 14.7 and 8.9
        (4_900_000_000, 32, 6, 8, 8),  # 8B: 390 ms fewer for 69 of waiting
        (98_362_432, 30, 6, 1, 1),
    ],
)
def test_threads_are_one_or_all_by_what_waiting_for_each_other_costs(weights, blocks, experts, most, threads):
    assert threads_that_pay(weights, blocks, experts, most) == threads


def test_a_small_model_is_written_on_one_thread_and_prompts_are_read_on_all(engine, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    parameters = engine._parameters("key")
    assert (parameters.cpuparams.n_threads, parameters.cpuparams_batch.n_threads) == (1, 3)


def test_the_server_answers_nobody_else_and_is_gone_afterwards(layers, base):
    with LlamaCpp(layers, base) as answering:
        answering.generate(PROMPTS[0], max_new_tokens=1)
        address, files = answering._server.listening_address, list(answering._adapters)
        assert address.startswith("http://127.0.0.1:") and all(file.is_file() for file in files)
        assert httpx2.post(f"{address}/completion", json={"prompt": [1]}, trust_env=False).status_code == 401
    assert not any(file.exists() for file in files)
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{address}/health", trust_env=False)


@pytest.mark.parametrize(
    ("change", "told"),
    table(
        ("one block less", {"num_hidden_layers": 1}, "llama.block_count 1, not 2"),
        ("another width", {"hidden_size": 64}, "llama.embedding_length 64, not 32"),
        ("other weights", {}, "another blk.0.attn_norm.weight"),
    ),
)
def test_the_file_of_another_base_model_is_refused(layers, backbone, tmp_path, change, told):
    config = copy.deepcopy(backbone.model.config)
    config.update({**change, "head_dim": 8})
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.model.layers[0].input_layernorm.weight)
    write_gguf_model(tmp_path / "other.gguf", dataclasses.replace(backbone, model=model), "f32")
    with pytest.raises(CoterieError, match=re.escape(f"is not of {backbone.identity.id}: it has {told}")):
        LlamaCpp(layers, tmp_path / "other.gguf")


def test_a_file_that_is_none_is_refused(layers, backbone, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(CoterieError, match="x.gguf cannot be read as GGUF"):
        LlamaCpp(layers, tmp_path / "x.gguf")
    with pytest.raises(CoterieError, match="there is no file .*y.gguf; give the base model as a GGUF file"):
        LlamaCpp(layers, tmp_path / "y.gguf")
    with pytest.raises(CoterieError, match="is no GGUF file; give one as --gguf, which this writes: coterie export"):
        LlamaCpp(layers)


def test_every_character_s_last_token_has_its_log_probability(backbone):
    text = "aé\u20ac\U0001f600b"
    tokens = backbone.tokenizer(text, add_special_tokens=False).input_ids + [257]
    told = [{"logprob": -float(number)} for number in range(6)]
    found = aligned_logprobs(backbone.tokenizer, tokens, told)
    nan = math.nan
    assert str(found) == str([-0.0, nan, -1.0, nan, nan, -2.0, nan, nan, nan, -3.0, -4.0, -5.0])
    assert str(aligned_logprobs(backbone.tokenizer, tokens[:2], told[:1])) == str([-0.0, nan])


def test_the_command_line_answers_as_python_does(run, run_folder, base, answering, tmp_path):
    words = ["generate", str(run_folder), *PROMPTS[:2], "--combiner", "layers", "--engine", "llama.cpp"]
    words += ["--gguf", str(base), "--max-new-tokens", "8", "--device", "cpu"]
    code, out, _ = run(*words, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    wanted = answering.generate(PROMPTS[:2], max_new_tokens=8)
    assert code == 0 and [tuple(one["token_ids"]) for one in found] == [one.token_ids for one in wanted]
    assert [one["text"] for one in found] == [one.text for one in wanted]
    code, out, _ = run(*words, "--stream")
    assert code == 0 and len(out) > 3
    refused(run(*words[:-4], "--n", "2"), "at temperature 0")
    refused(run("generate", str(run_folder), "x", "--gguf", str(base)), "--gguf .* does not act with --engine coterie")
    refused(run("generate", str(run_folder), "x", "--engine", "llama.cpp"), "add --combiner layers")


def test_what_is_exported_computes_there_what_is_routed_here(layers, run_folder, tmp_path):
    settings = {"mixture": str(run_folder), "target": "llama.cpp", "prompt": PROMPTS[0], "device": "cpu"}
    found = export_mixture(
        from_flat(ExportSettings, {**settings, "output": str(tmp_path / "all"), "base_type": "f32", "top_k_experts": 3})
    )
    weights = layers.route(PROMPTS[0], 3).row(0)
    names = list(layers.bank.names)
    assert list(found.ranks) == [f"experts/{name}.gguf" for name in names]
    assert found.scales == [
        {"id": number, "scale": weights[name]} for number, name in enumerate(names) if weights[name]
    ]
    assert f'"lora": {json.dumps(found.scales)}' in str(found)
    readme = (found.folder / "README.md").read_text()
    assert "llama-server -m base.gguf --lora-init-without-apply --lora experts/base.gguf" in readme
    merged = export_mixture(
        from_flat(ExportSettings, {**settings, "output": str(tmp_path / "one"), "merge": "exact", "top_k_experts": 3})
    )
    assert list(merged.ranks) == ["mixture.gguf"] and merged.scales is None
    wanted = layers.generate(PROMPTS[0], max_new_tokens=12, top_k_experts=3)
    with LlamaCpp(layers, found.folder / "base.gguf") as answering:
        answering._adapters = [found.folder / place for place in found.ranks]
        same_as_ours(answering.generate(PROMPTS[0], max_new_tokens=12, top_k_experts=3), wanted)
    with LlamaCpp(layers.replace(router=names[0]), found.folder / "base.gguf") as answering:
        answering._adapters = [merged.folder / "mixture.gguf"]
        (answer,) = answering.generate(PROMPTS[0], max_new_tokens=12)
        same_as_ours([dataclasses.replace(answer, weights=wanted[0].weights)], wanted)


def test_a_base_model_that_is_not_written_leaves_no_folder(run_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(gguf_files.FORMS, "llama", gguf_files.FORMS["llama"]._replace(written=False))
    given = {"mixture": str(run_folder), "target": "llama.cpp", "output": str(tmp_path / "out"), "base_type": "f16"}
    with pytest.raises(CoterieError, match="models of type 'llama' are not written as GGUF here; convert it with"):
        export_mixture(from_flat(ExportSettings, given))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "told"),
    table(
        (
            "scaled rotation",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type",
        ),
        ("activation", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("window", {"sliding_window": 64}, "sliding_window 64"),
    ),
)
def test_settings_of_a_base_model_that_would_be_lost_are_refused(backbone, tmp_path, change, told):
    config = copy.deepcopy(backbone.model.config)
    config.update(change)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(CoterieError, match=f"a base model with {told}.* is not written as GGUF here; convert it"):
        write_gguf_model(tmp_path / "x.gguf", dataclasses.replace(backbone, model=model), "f32")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_told_before_anything_is_loaded(run, run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setattr(Mixture, "from_pretrained", None)
    told = r"needs the package 'xllamacpp', which is not installed; type: pip install 'coterie\[llamacpp\]'"
    refused(run("generate", str(run_folder), "x", "--combiner", "layers", "--engine", "llama.cpp"), told)


def test_recruited_experts_have_no_such_engine(run, tmp_path):
    told = "--engine acts on a mixture of adapters, not on recruited experts"
    refused(run("plan", str(tmp_path), "x", "--engine", "llama.cpp"), told)
