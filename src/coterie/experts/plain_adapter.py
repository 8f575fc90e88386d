"""Adapters in the plainest form of a PEFT folder, which PEFT and vLLM read alike, and what vLLM does not take.

Ranks and scalings that differ between layers are in the factors themselves: vLLM scales all layers by `r` and
`lora_alpha` alone, and passes `alpha_pattern` over without a word.
"""

from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coterie.backbone.linear_layers import linear_layers, linear_shapes
from coterie.backbone.loading import Backbone, loaded_by
from coterie.errors import CoterieError
from coterie.experts.bank import write_adapter
from coterie.experts.target_layers import ALL_LINEAR, is_transposed, layers_to_change
from coterie.lora import Adapter, LoraPair

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
VLLM_WITHOUT_LORA = frozenset(
    "bloom dbrx falcon falcon_mamba gemma3n_text gpt2 gptj gpt_neox mamba mamba2 mpt olmoe stablelm zamba2".split()
)
"""Types of models that vLLM runs without adapters, by its list of supported models."""


def rank_of(adapter: Adapter) -> int:
    """Return the largest rank of an adapter's layers."""
    return max(len(pair.down) for pair in adapter.values())


def evened(adapter: Adapter) -> Adapter:
    """Return the same updates with one rank in all layers, by zeros, and with alpha = r: the scaling is in B."""
    rank = rank_of(adapter)
    lacking = {path: (0, 0, 0, rank - len(pair.down)) for path, pair in adapter.items()}
    return {
        path: LoraPair(pad(pair.down, lacking[path]), pad(pair.up, lacking[path])) for path, pair in adapter.items()
    }


def write_plain_adapter(folder: Path, adapter: Adapter, model: PreTrainedModel, base: str) -> None:
    """Write an adapter as a PEFT folder without any pattern: loading it gives the same updates, bit for bit.

    Args:
        folder: made where it does not exist.
        adapter: the updates.
        model: the base model, whose layers they change.
        base: what PEFT loads the base model by.
    """
    layers = linear_layers(model)
    ends = {path.rpartition(".")[2] for path in adapter}
    named = {path for path in layers if path.rpartition(".")[2] in ends}
    rank = rank_of(adapter)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(ends if named == set(adapter) else adapter),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layers[path], Conv1D) for path in adapter),
        "inference_mode": True,
    }
    write_adapter(folder, config, evened(adapter))


def vllm_rank(rank: int, model_type: str) -> int:
    """Return the --max-lora-rank with which vLLM takes an adapter of this rank.

    Raises:
        CoterieError: when none is large enough, or vLLM runs the base model without adapters.
    """
    if model_type in VLLM_WITHOUT_LORA:
        raise CoterieError(f"vLLM runs models of type {model_type!r} without adapters; take --for peft")
    if rank > VLLM_RANKS[-1]:
        raise CoterieError(
            f"vLLM takes adapters up to rank {VLLM_RANKS[-1]}, and this one has {rank}; add --merge svd:64, or leave "
            "experts out of the mixture"
        )
    return next(limit for limit in VLLM_RANKS if limit >= rank)


def write_null_adapter(backbone: Backbone, folder: Path) -> None:
    """Write an adapter that changes nothing, in the form of any other: rank 1, zeros, on one layer."""
    path = layers_to_change(backbone.model, ALL_LINEAR)[0]
    width_in, width_out = linear_shapes(backbone.model)[path]
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loaded_by(backbone.identity),
        "r": 1,
        "lora_alpha": 1,
        "target_modules": [path],
        "fan_in_fan_out": is_transposed(backbone.model, [path]),
    }
    write_adapter(folder, record, {path: LoraPair(torch.zeros(1, width_in), torch.zeros(1, width_out))})
