"""A tiny random model of every architecture that Coterie is tested on, and what becomes of it when it is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tiny

WINDOW = 8  # shorter than the texts of the tests

SIZES = {
    "vocab_size": 259,  # of tiny's tokenizer
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
"""Sizes under the names that most configurations know; those that do not know one keep it as a bystander."""

_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
_EXPERTS, _LOCAL_EXPERTS = {**_MOE, "num_experts": 4}, {**_MOE, "num_local_experts": 4}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
_DELTA_NET |= {"linear_value_head_dim": 8, "num_hidden_layers": 4}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_MLA |= {"num_key_value_heads": 4, "head_dim": None}
_DEEPSEEK = {**_MLA, **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}


@dataclass(frozen=True)
class Architecture:
    """One entry of the table.

    Attributes:
        config: what its configuration needs beyond the common sizes.
        model_type: as transformers calls it, where the entry's name is another.
        refusal: what the refusal at loading says, beside the model type; None where the model works.
    """

    config: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    refusal: str | None = None


ARCHITECTURES: dict[str, Architecture] = {
    # attention and dense layers
    "apertus": Architecture(),
    "arcee": Architecture(),
    "cohere": Architecture(),
    "cohere2": Architecture({"sliding_window": WINDOW, "num_hidden_layers": 4}),
    "ernie4_5": Architecture(),
    "exaone4": Architecture({"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "gemma": Architecture(),
    "gemma2": Architecture({"sliding_window": WINDOW, "final_logit_softcapping": 3.0}),
    "gemma3_text": Architecture({"sliding_window": WINDOW, "num_hidden_layers": 6}),
    "glm": Architecture(),
    "glm4": Architecture(),
    "granite": Architecture({"logits_scaling": 4.0}),
    "helium": Architecture(),
    "hunyuan_v1_dense": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture({"sliding_window": WINDOW}),
    "ministral3": Architecture(),
    "nemotron": Architecture(),
    "olmo": Architecture(),
    "olmo2": Architecture(),
    "olmo3": Architecture({"sliding_window": WINDOW}),
    "persimmon": Architecture(),
    "phi": Architecture(),
    "phi3": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "seed_oss": Architecture(),
    "smollm3": Architecture(),
    "stablelm": Architecture(),
    "starcoder2": Architecture(),
    # older ones: learned positions or alibi, fused or transposed (Conv1D) projections, flattened inputs
    "bloom": Architecture({"n_head": 4, "n_layer": 2}),
    "codegen": Architecture({**_GPT, "rotary_dim": 4}),
    "falcon": Architecture({"alibi": False, "multi_query": True, "head_dim": None}),
    "falcon-alibi": Architecture({"alibi": True, "multi_query": True, "head_dim": None}, "falcon"),
    "gpt2": Architecture(_GPT),
    "gpt_bigcode": Architecture(_GPT),
    "gpt_neo": Architecture(
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
    ),
    "gpt_neox": Architecture(),
    "gptj": Architecture({**_GPT, "rotary_dim": 4}),
    "mpt": Architecture({"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2}),
    "opt": Architecture({"ffn_dim": 48, "word_embed_proj_dim": 32}),
    # mixtures of feed-forward layers
    "gpt_oss": Architecture({**_LOCAL_EXPERTS, "sliding_window": WINDOW}),
    "granitemoe": Architecture(_LOCAL_EXPERTS),
    "llama4_text": Architecture(
        {**_LOCAL_EXPERTS, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": WINDOW}
    ),
    "mixtral": Architecture(_LOCAL_EXPERTS),
    "olmoe": Architecture(_EXPERTS),
    "phimoe": Architecture(_LOCAL_EXPERTS),
    "qwen2_moe": Architecture(_EXPERTS),
    "qwen3_moe": Architecture(_EXPERTS),
    # latent attention
    "deepseek_v2": Architecture({**_DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": Architecture({**_DEEPSEEK, "n_group": 1, "topk_group": 1}),
    "minicpm3": Architecture(_MLA),
    # states beside keys and values
    "bamba": Architecture({**_MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": Architecture({**_MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "granitemoehybrid": Architecture(
        {**_MAMBA, **_LOCAL_EXPERTS, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]}
    ),
    "jamba": Architecture(
        {
            **_EXPERTS,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        }
    ),
    "lfm2": Architecture({"block_auto_adjust_ff_dim": False, "full_attn_idxs": [1]}),
    "nemotron_h": Architecture(
        {
            "hybrid_override_pattern": "M*-M",
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        }
    ),
    "qwen3_5_text": Architecture(_DELTA_NET),
    "qwen3_next": Architecture({**_DELTA_NET, **_EXPERTS}),
    "falcon_mamba": Architecture({"state_size": 8}, refusal="past_key_values"),
    "mamba": Architecture({"state_size": 8}, refusal="past_key_values"),
    "mamba2": Architecture(
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}, refusal="past_key_values"
    ),
    "minimax": Architecture(
        {**_LOCAL_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": WINDOW},
        refusal="cache of its own",
    ),
    "recurrent_gemma": Architecture(
        {"lru_width": 32, "attention_window_size": WINDOW, "num_hidden_layers": 3}, refusal="past_key_values"
    ),
    "rwkv": Architecture({"attention_hidden_size": 32, "context_length": 512}, refusal="past_key_values"),
    "xlstm": Architecture({"num_heads": 2, "chunk_size": 8, "qk_dim_factor": 0.5}, refusal="past_key_values"),
}
"""By name, in families."""

WORKING = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.refusal is None)
REFUSED = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.refusal is not None)


def make_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Make a random model, with weights wide enough that tokens and layers differ visibly."""
    architecture = ARCHITECTURES[name]
    sizes = {key: size for key, size in {**SIZES, **architecture.config}.items() if size is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture.model_type or name, **sizes))
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1 and not path.endswith("A_log"):  # the decay of a state space keeps its own scale
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def save_model(folder: Path, name: str, seed: int = 0) -> Path:
    """Save a random model with tiny's tokenizer to a folder, and return the folder."""
    make_model(name, seed).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder
