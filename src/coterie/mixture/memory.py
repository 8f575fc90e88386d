"""A pool's experts in the groups that they are loaded in, and how much memory each group takes."""

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from coterie.artifacts import free_memory, tensor_claims
from coterie.backbone.loading import cache_numbers, local_path
from coterie.experts.answering import ExpertGroup
from coterie.experts.bank import WEIGHTS_FILE
from coterie.experts.endpoints import Endpoint, EndpointAnswerer
from coterie.experts.expert_pool import Pool
from coterie.mixture.local_answers import LocalExpert, load_local
from coterie.settings.groups import ExpertServingSettings, PlacementSettings

PROMPT_TOKENS = 1024  # of a question, where memory is estimated before any was seen
FOUR_BITS = 0.6  # bytes a parameter: NF4, its scales, and the layers that stay as they are
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
}
SHARE_OF_FREE = 0.8  # of free memory that models may take by default


def groups_of(
    pool: Pool, placement: PlacementSettings, work: ExpertServingSettings, *, batch_size: int = 8, new_tokens: int = 64
) -> list[ExpertGroup]:
    """Put the experts of one base model into one group, and every endpoint into its own.

    Memory is estimated for batches of this size and answers of at most `new_tokens`.

    Raises:
        CoterieError: when a model does not exist.
    """
    local: dict[str, dict[str, LocalExpert]] = {}
    for expert in pool.experts:
        if expert.kind != "endpoint":
            adapter = Path(expert.source) if expert.kind == "adapter" else None
            local.setdefault(expert.model, {})[expert.name] = LocalExpert(adapter, expert.system_prompt)
    tokens = batch_size * (PROMPT_TOKENS + new_tokens)
    groups = []
    for model, experts in local.items():
        load = partial(load_local, model, experts, placement, batch_size)
        groups.append(ExpertGroup(model, tuple(experts), load, needed_bytes(model, experts, placement, tokens)))
    for expert in pool.experts:
        if expert.kind == "endpoint":
            load = partial(EndpointAnswerer, Endpoint(expert.name, expert.source, expert.model), work)
            name = f"endpoint {expert.name}"  # no model is called so
            groups.append(ExpertGroup(name, (expert.name,), load, size=0, is_remote=True))
    return groups


def needed_bytes(
    model: str, experts: Mapping[str, LocalExpert], placement: PlacementSettings, cached_tokens: int
) -> int | None:
    """Estimate the bytes of a base model with its experts and a full cache, from the heads of its files.

    The cache holds so many tokens over all rows of a batch. None: the model is not on this machine yet.

    Raises:
        CoterieError: when there is no such model.
    """
    path = local_path(model)
    counts = {} if path is None else _parameters(path)
    if path is None or not counts:
        return None
    if placement.dtype != "auto":
        size = 4 if placement.dtype == "float32" else 2
    else:
        found = torch.cuda.is_available() or torch.backends.mps.is_available()
        on_cpu = placement.device == "cpu" or (placement.device == "auto" and not found)
        size = 4 if on_cpu else DTYPE_BYTES.get(max(counts, key=lambda dtype: counts[dtype]), 4)
    weights = sum(counts.values())
    adapters = [_parameters(expert.adapter) for expert in experts.values() if expert.adapter is not None]
    updates = sum(sum(own.values()) for own in adapters)
    base = weights * (FOUR_BITS if placement.load_in_4bit else size)
    # The head of a GGUF file is not read twice; its weights outweigh the cache by far.
    cached = 0
    if not path.is_file():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        cached = cached_tokens * cache_numbers(config)
        if placement.quantize:  # embeddings and output layer stay as they are
            text = config.get_text_config()
            base = weights + min(weights, 2 * text.vocab_size * text.hidden_size) * (size - 1)
    return round(base + updates * (4 + size) + cached * size)  # updates are read in float32, then stacked


def _parameters(path: Path) -> dict[str, int]:
    """Count the numbers of every dtype in a model's or adapter's files, from their heads alone."""
    if path.is_file():
        from gguf import GGUFReader

        return {"F32": sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)}
    adapter = path / WEIGHTS_FILE
    counts: dict[str, int] = {}
    for file in [adapter] if adapter.is_file() else sorted(path.glob("*.safetensors")):
        for claim in tensor_claims(file, max_bytes=sys.maxsize).values():
            counts[claim.dtype] = counts.get(claim.dtype, 0) + math.prod(claim.shape)
    return counts


def budget_of(work: ExpertServingSettings, placement: PlacementSettings) -> int | None:
    """Return the bytes that models may take together: as asked, or most of what is free; None where nobody knows."""
    if work.memory is not None:
        return round(work.memory * 2**30)
    device = placement.device
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return round(SHARE_OF_FREE * torch.cuda.mem_get_info(None if device in ("auto", "cuda") else device)[0])
    free = free_memory() if device in ("auto", "cpu") else None
    return None if free is None else round(SHARE_OF_FREE * free)
