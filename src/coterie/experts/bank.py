"""The bank: experts by name on one base model, each a plain PEFT folder that was checked before it was used."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.artifacts import read_json, read_tensors, write_json, write_tensors
from coterie.backbone.layers import linear_shapes
from coterie.errors import CoterieError, unknown_name
from coterie.lora import Adapter, LoraPair

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_PATTERNS = 32
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),  # others change the base weights
}
"""Fields of a PEFT config whose other values mean more than an update B A, which the mixtures here could not keep."""


@dataclass(frozen=True)
class ExpertBank:
    """Experts by name, in a fixed order."""

    names: tuple[str, ...]
    adapters: tuple[Adapter, ...]

    def __post_init__(self) -> None:
        """Refuse repeated names."""
        if len(set(self.names)) != len(self.names) or len(self.names) != len(self.adapters):
            raise CoterieError(f"experts need a name of their own each, got {', '.join(self.names)}")

    def __len__(self) -> int:
        """Count the experts."""
        return len(self.names)

    def index(self, name: str) -> int:
        """Return an expert's place.

        Raises:
            CoterieError: when no expert has this name.
        """
        if name not in self.names:
            raise unknown_name("expert", name, self.names)
        return self.names.index(name)


def load_bank(folders: Mapping[str, Path], model: nn.Module) -> ExpertBank:
    """Load experts from PEFT folders and check that they fit the base model.

    Raises:
        CoterieError: as `load_adapter`.
    """
    adapters = tuple(load_adapter(folder, model) for folder in folders.values())
    return ExpertBank(tuple(folders), adapters)


def load_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read a PEFT LoRA folder and check it against the base model: fields, tensor names, shapes and values.

    Raises:
        CoterieError: naming the file and the field or tensor that is wrong.
    """
    config = read_json(folder / CONFIG_FILE)
    for field, plain in PLAIN_VALUES.items():
        if config.get(field, plain[0]) not in plain:
            raise CoterieError(
                f"{folder / CONFIG_FILE}: {field} = {config[field]!r} is not supported; use a plain LoRA adapter"
            )
    _check_patterns(config, folder / CONFIG_FILE)
    file = folder / WEIGHTS_FILE
    factors = _factors(read_tensors(file), file)
    shapes = linear_shapes(model)
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    pairs: dict[str, LoraPair] = {}
    for path, (down, up) in sorted(factors.items()):
        _check_shapes(path, down, up, shapes, file)
        if output is not None and model.get_submodule(path) is output:  # runs apart from all others, once a prompt
            raise CoterieError(f"{file}: {path} is the output layer, which experts cannot change; train without it")
        scaling = _scaling(config, path, down.shape[0], folder / CONFIG_FILE)
        pairs[path] = LoraPair(down.float(), (up.float() * scaling).T.contiguous(), scaling)
    return pairs


def write_adapter(folder: Path, config: Mapping[str, Any], adapter: Adapter) -> None:
    """Write an adapter as a plain PEFT folder; loading it gives the same values back (see `LoraPair.bare_up`).

    Args:
        folder: made where it does not exist.
        config: the `adapter_config.json` that the adapter came with, whose ranks and scalings it still has.
        adapter: the updates of every layer that the config names.
    """
    factors = {}
    for path, pair in adapter.items():
        factors[f"{KEY_PREFIX}{path}.lora_A.weight"] = pair.down
        factors[f"{KEY_PREFIX}{path}.lora_B.weight"] = pair.bare_up.T
    write_tensors(folder / WEIGHTS_FILE, factors)
    write_json(folder / CONFIG_FILE, dict(config))


def _factors(tensors: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair A and B of every layer by module path."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, end = key.removeprefix(KEY_PREFIX).rpartition(".lora_")
        if not key.startswith(KEY_PREFIX) or end not in ("A.weight", "B.weight") or not path:
            raise CoterieError(f"{file}: tensor {key!r} is no LoRA factor; use a plain LoRA adapter")
        if tensor.dtype not in FACTOR_DTYPES:
            raise CoterieError(f"{file}: tensor {key!r} is of {tensor.dtype}, which no plain LoRA factor is")
        if not torch.isfinite(tensor).all():
            raise CoterieError(f"{file}: tensor {key!r} holds NaN or infinite values; get or train the adapter again")
        halves.setdefault(path, {})[end[0]] = tensor
    if not halves:
        raise CoterieError(f"{file} holds no tensors; get the adapter again")
    for path, both in halves.items():
        if len(both) != 2:
            raise CoterieError(f"{file}: {path} has only lora_{next(iter(both))}; get the adapter again")
    return {path: (both["A"], both["B"]) for path, both in halves.items()}


def _check_shapes(path: str, down: Tensor, up: Tensor, shapes: Mapping[str, tuple[int, int]], file: Path) -> None:
    if path not in shapes:
        raise CoterieError(
            f"{file}: the base model has no linear layer {path!r}; is the adapter for another base model?"
        )
    width_in, width_out = shapes[path]
    rank = down.shape[0] if down.dim() == 2 else 0
    if not rank or tuple(down.shape) != (rank, width_in) or tuple(up.shape) != (width_out, rank):
        raise CoterieError(
            f"{file}: {path} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}, but the base model's layer "
            f"takes (r, {width_in}) and ({width_out}, r); is the adapter for another base model?"
        )


def _check_patterns(config: Mapping[str, Any], file: Path) -> None:
    """Refuse regular expressions that could search for years: they come from a file and meet every layer's name."""
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field)
        keys = map(str, patterns) if isinstance(patterns, (dict, list)) else ()
        searches = [key for key in keys if any(sign in key for sign in "*+?{|")]
        slow = searches[MAX_PATTERNS:] or [
            key
            for key in searches
            if len(key) > 200
            or sum(map(key.count, "*+?{")) > 2
            or key.count("|") > 6
            or re.search(r"\)[*+?{]", key)  # a repeated group
        ]
        if slow:
            raise CoterieError(
                f"{file}: {field} has {slow[0][:80]!r}, which may take too long; name the layers plainly"
            )


def _scaling(config: Mapping[str, Any], path: str, rank: int, file: Path) -> float:
    """Return alpha / r (or alpha / sqrt(r) for rsLoRA) as PEFT computes it.

    A layer is looked up as PEFT does: a pattern's key is a regular expression for the end of the path.
    """
    from peft.utils.other import get_pattern_key

    found: list[Any] = []
    try:
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            pattern = config.get(field) or {}
            found.append(pattern.get(get_pattern_key(list(pattern), path), config.get(default)))
    except (AttributeError, TypeError, OverflowError, re.error) as error:
        raise CoterieError(
            f"{file}: rank_pattern or alpha_pattern is broken ({error}); get the adapter again"
        ) from error
    wanted, alpha = found
    if wanted != rank or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
        raise CoterieError(f"{file}: r = {wanted!r} and lora_alpha = {alpha!r} do not fit {path}, whose rank is {rank}")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def check_names(names: Sequence[str]) -> None:
    """Refuse names that are not plain folder names, since they come from a file and become paths.

    Raises:
        CoterieError: naming the first bad one.
    """
    for name in names:
        if not isinstance(name, str) or not name or name != Path(name).name or name.startswith("."):
            raise CoterieError(f"{name!r} cannot be an expert's name; use letters, digits, '-' and '_'")
