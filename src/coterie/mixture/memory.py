"""A pool's experts in the groups that they are loaded in, and how much memory each group takes."""

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from coterie.artifacts import free_memory, tensor_claims
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.loading import local_path
from coterie.backbone.memory import held_bytes, twin
from coterie.backbone.slots import Slots
from coterie.cluster import Elsewhere
from coterie.experts.answering import ExpertGroup
from coterie.experts.bank import KEY_PREFIX, WEIGHTS_FILE
from coterie.experts.endpoints import Endpoint, EndpointAnswerer
from coterie.experts.expert_pool import Pool
from coterie.lora import Adapter, LoraPair
from coterie.mixture.local_answers import LocalExpert, WorkerAnswerer, load_local
from coterie.mixture.scheduler import GIB
from coterie.settings.groups import ExpertServingSettings, PlacementSettings

PROMPT_TOKENS = 1024  # of a question, where memory is counted before any was seen
FOUR_BITS = 0.6  # bytes a parameter: NF4, its scales, and the layers that stay as they are
STORED = {"BF16": torch.bfloat16, "F16": torch.float16}
"""Types in which models are loaded on a GPU as files hold them; all others become float32."""
SHARE_OF_FREE = 0.8  # of free memory that models may take by default


def groups_of(
    pool: Pool, placement: PlacementSettings, work: ExpertServingSettings, *, batch_size: int = 8, new_tokens: int = 64
) -> list[ExpertGroup]:
    """Put the experts of one base model into one group, and every endpoint into its own.

    Memory is counted for batches of this size and answers of at most `new_tokens`.

    Raises:
        CoterieError: when a model does not exist.
    """
    local: dict[str, dict[str, LocalExpert]] = {}
    for expert in pool.experts:
        if expert.kind != "endpoint":
            adapter = Path(expert.source) if expert.kind == "adapter" else None
            local.setdefault(expert.model, {})[expert.name] = LocalExpert(adapter, expert.system_prompt)
    length = PROMPT_TOKENS + new_tokens
    groups = []
    for model, experts in local.items():
        load = partial(load_local, model, experts, placement, batch_size)
        if work.ray:
            opened = Elsewhere(work.workers, placement.device, load_local, (model, experts, placement, batch_size))
            groups.append(ExpertGroup(model, tuple(experts), partial(WorkerAnswerer, opened), size=0, is_remote=True))
            continue
        size = needed_bytes(model, experts, placement, batch_size, length)
        groups.append(ExpertGroup(model, tuple(experts), load, size))
    for expert in pool.experts:
        if expert.kind == "endpoint":
            load = partial(EndpointAnswerer, Endpoint(expert.name, expert.source, expert.model), work)
            name = f"endpoint {expert.name}"  # no model is called so
            groups.append(ExpertGroup(name, (expert.name,), load, size=0, is_remote=True))
    return groups


def needed_bytes(
    model: str, experts: Mapping[str, LocalExpert], placement: PlacementSettings, rows: int, length: int
) -> int | None:
    """Count the bytes of a base model with its experts and a full cache, from the heads of its files.

    The cache holds so many rows of up to so many tokens. None: the model is not on this machine yet, or is not known.

    Raises:
        CoterieError: when there is no such model, or a file is none.
    """
    path = local_path(model)
    counts = {} if path is None else _parameters(path)
    if path is None or not counts:
        return None
    dtype = getattr(torch, placement.dtype) if placement.dtype != "auto" else torch.float32
    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if placement.dtype == "auto" and placement.device != "cpu" and (placement.device != "auto" or on_gpu):
        dtype = STORED.get(max(counts, key=lambda name: counts[name]), torch.float32)
    adapters = [{} if expert.adapter is None else claimed_adapter(expert.adapter) for expert in experts.values()]
    try:
        backbone = twin(path, dtype, in_int8=bool(placement.quantize))
    except (OSError, ValueError, KeyError):  # whoever loads it tells
        return None
    shapes = linear_shapes(backbone.model)
    fitting = [
        {path: pair for path, pair in own.items() if shapes.get(path) == (pair.down.shape[1], pair.up.shape[1])}
        for own in adapters
    ]
    layers = ExpertLayers(backbone.model, fitting)
    layers.load()
    held = held_bytes(layers) + Slots(backbone).bytes_for(rows, length)
    if placement.load_in_4bit:
        held += round(FOUR_BITS * sum(counts.values())) - held_bytes(backbone.model)
    return held


def claimed_adapter(folder: Path) -> Adapter:
    """Return the updates that an adapter's file claims to hold, without numbers."""
    claims = tensor_claims(folder / WEIGHTS_FILE)
    adapter = {}
    for key, (_, shape) in claims.items():
        _, other = claims.get(key.replace(".lora_A.", ".lora_B."), ("", ()))
        if key.endswith(".lora_A.weight") and len(shape) == len(other) == 2:
            sides = torch.empty(shape, device="meta"), torch.empty(other[::-1], device="meta")
            adapter[key.removeprefix(KEY_PREFIX).removesuffix(".lora_A.weight")] = LoraPair(*sides)
    return adapter


def _parameters(path: Path) -> dict[str, int]:
    """Count the numbers of every dtype in a model's files, from their heads alone."""
    if path.is_file():
        from gguf import GGUFReader

        return {"F32": sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)}
    counts: dict[str, int] = {}
    for file in sorted(path.glob("*.safetensors")):
        for claim in tensor_claims(file, max_bytes=sys.maxsize).values():
            counts[claim.dtype] = counts.get(claim.dtype, 0) + math.prod(claim.shape)
    return counts


def budget_of(work: ExpertServingSettings, placement: PlacementSettings) -> int | None:
    """Return the bytes that models may take together: as asked, or most of what is free; None where nobody knows."""
    if work.memory is not None:
        return round(work.memory * GIB)
    device = placement.device
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return round(SHARE_OF_FREE * torch.cuda.mem_get_info(None if device in ("auto", "cuda") else device)[0])
    free = free_memory() if device in ("auto", "cpu") else None
    return None if free is None else round(SHARE_OF_FREE * free)
