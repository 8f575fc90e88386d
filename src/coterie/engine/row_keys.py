"""Names for what model rows run, equal for rows that cache the same of the same tokens."""

import hashlib
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import Tensor, uint8

from coterie.artifacts import hash_text
from coterie.backbone.gates import Gates
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.row_mix import RequestRows
from coterie.lora import Adapter

_CONTENTS: WeakKeyDictionary[ExpertLayers, list[str]] = WeakKeyDictionary()
_GATES: WeakKeyDictionary[Gates, str] = WeakKeyDictionary()


def row_keys(layers: ExpertLayers, plan: RequestRows) -> list[str]:
    """Return a key for every row of a request: of all that decides what it caches, but for its tokens and the base.

    That is each expert's content with its exact weight, in the bank's order, how they are merged, and the gates.
    """
    if layers not in _CONTENTS:
        _CONTENTS[layers] = [_hash_adapter(adapter) for adapter in layers.adapters]
    contents, gates = _CONTENTS[layers], []
    if plan.gates is not None:
        gates = [*(contents[expert] for expert in plan.gates.experts), _hash_gates(plan.gates.gates)]
    rows = [
        [f"{content} {weight.hex()}" for content, weight in zip(contents, weights, strict=True) if weight]
        for weights in plan.weights.double().tolist()
    ]
    return [hash_text(plan.merge, *gates, *row) for row in rows]


def _hash_adapter(adapter: Adapter) -> str:
    """Hash an expert's updates; merges look at the scaling by itself."""
    tensors = {}
    for path, pair in adapter.items():
        tensors |= {f"{path} {float(pair.scaling).hex()} A": pair.down, f"{path} B": pair.up}
    return _hash_tensors(tensors)


def _hash_gates(gates: Gates) -> str:
    if gates not in _GATES:
        tensors = [_hash_tensors(side) for side in (gates.layers, gates.floors)]
        _GATES[gates] = hash_text(gates.score, str(gates.top_k), gates.temperature.hex(), *tensors)
    return _GATES[gates]


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors with their names, types and shapes, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(uint8).numpy().data)
    return digest.hexdigest()
