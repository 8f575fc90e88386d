"""The bank: experts by name on one base model, each a plain PEFT folder that was checked before it was used."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.artifacts import Claim, read_floats, read_json, tensor_claims, write_json, write_tensors
from coterie.artifacts.tensors import FLOATS
from coterie.backbone.linear_layers import NEVER_RUNS, linear_shapes, unchangeable_layers
from coterie.errors import CoterieError, check_known, shortened
from coterie.lora import Adapter, LoraPair
from coterie.records.adapter import AdapterConfig
from coterie.records.schema import is_folder_name, parse

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
MAX_TEXT_FILE = 2**20  # bytes; an adapter_config.json that names every layer of a 70B model has about 100 KiB
MAX_PATTERNS = 32
HELD_BYTES = 2**30
"""Of a bank's adapters that stay in memory."""
MAX_RANK = 1024  # of layers that are narrower than this
LARGEST_UPDATE = 1e6  # what training gives is below 1e3
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
    """Experts by name, in a fixed order.

    Attributes:
        names: of the experts.
        adapters: their updates, in memory or read from disk one by one (see `StoredAdapters`).
    """

    names: tuple[str, ...]
    adapters: Sequence[Adapter]

    def __post_init__(self) -> None:
        """Refuse repeated names."""
        if len(set(self.names)) != len(self.names) or len(self.names) != len(self.adapters):
            raise CoterieError(f"experts need a name of their own each, got {', '.join(self.names)}")

    def __len__(self) -> int:
        """Count the experts."""
        return len(self.names)

    def __repr__(self) -> str:
        """Return the experts by name; their tensors would fill screens."""
        return f"ExpertBank({len(self)} experts: {shortened(', '.join(self.names), 300)})"

    def index(self, name: str) -> int:
        """Return an expert's place.

        Raises:
            CoterieError: when no expert has this name.
        """
        check_known("expert", name, self.names)
        return self.names.index(name)


class StoredAdapters(Sequence[Adapter]):
    """Adapters that were all read and checked; beyond `HELD_BYTES` they are read again whenever they are asked for.

    So a bank of hundreds is listed, chosen from and routed to with the memory of a few.
    """

    def __init__(self, folders: Sequence[Path], model: nn.Module) -> None:
        """Read every adapter once.

        Raises:
            CoterieError: as `load_adapter`.
        """
        self._folders, self._model = tuple(folders), model
        self._held: list[Adapter] = []
        left = HELD_BYTES
        for folder in self._folders:
            adapter = load_adapter(folder, model)
            left -= sum(half.nbytes for pair in adapter.values() for half in pair[:2])
            if left >= 0:  # and never again when it was not once: sizes are not negative
                self._held.append(adapter)

    def __len__(self) -> int:
        """Return the number of adapters."""
        return len(self._folders)

    def __getitem__(self, place: Any) -> Any:  # an adapter for a number, a tuple of them for a slice
        """Return an adapter, or the adapters of a slice."""
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        number = range(len(self))[place]
        return self._held[number] if number < len(self._held) else load_adapter(self._folders[number], self._model)


def load_bank(folders: Mapping[str, Path], model: nn.Module) -> ExpertBank:
    """Load experts from PEFT folders and check that they fit the base model.

    Raises:
        CoterieError: as `load_adapter`.
    """
    return ExpertBank(tuple(folders), StoredAdapters(list(folders.values()), model))


def load_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read a PEFT LoRA folder and check it against the base model: fields, tensor names, shapes and values.

    Raises:
        CoterieError: naming the file and the field or tensor that is wrong.
    """
    config, file = read_config(folder), folder / WEIGHTS_FILE
    dtype = next(model.parameters()).dtype
    scalings: dict[str, float] = {}
    wanted: dict[str, tuple[int, int]] = {}
    for path, (rank, width_in, width_out) in sorted(claimed_layers(tensor_claims(file), model, file).items()):
        scalings[path] = _scaling(config, path, rank, folder / CONFIG_FILE)
        wanted |= dict(zip(factor_names(path), [(rank, width_in), (width_out, rank)], strict=True))
    factors = read_floats(file, wanted, "get or train the adapter again")
    pairs: dict[str, LoraPair] = {}
    for path, scaling in scalings.items():
        down, up = (factors.pop(name) for name in factor_names(path))
        pairs[path] = LoraPair(down, (up * scaling).T.contiguous(), scaling)
        _check_size(path, pairs[path], dtype, file)
    return pairs


def read_config(folder: Path) -> AdapterConfig:
    """Read what an adapter's `adapter_config.json` says, and refuse what mixtures here could not keep.

    Raises:
        CoterieError: naming the file and the field.
    """
    file = folder / CONFIG_FILE
    fields = read_json(file, MAX_TEXT_FILE)
    for field, plain in PLAIN_VALUES.items():
        if fields.get(field, plain[0]) not in plain:
            raise CoterieError(f"{file}: {field} = {fields[field]!r} is not supported; use a plain LoRA adapter")
    config = parse(AdapterConfig, fields, str(file), "get the adapter again")
    _check_patterns(config, file)
    return config


def write_adapter(folder: Path, config: Mapping[str, Any], adapter: Adapter) -> None:
    """Write an adapter as a plain PEFT folder; loading it gives the same values back (see `LoraPair.bare_up`).

    Args:
        folder: made where it does not exist.
        config: the `adapter_config.json` that the adapter came with, whose ranks and scalings it still has.
        adapter: the updates of every layer that the config names.
    """
    factors: dict[str, Tensor] = {}
    for path, pair in adapter.items():
        factors |= dict(zip(factor_names(path), (pair.down, pair.bare_up.T), strict=True))
    write_tensors(folder / WEIGHTS_FILE, factors)
    write_json(folder / CONFIG_FILE, dict(config))


def factor_names(path: str) -> tuple[str, str]:
    """Return what PEFT calls a layer's two factors in its files."""
    return f"{KEY_PREFIX}{path}.lora_A.weight", f"{KEY_PREFIX}{path}.lora_B.weight"


def claimed_layers(claims: Mapping[str, Claim], model: nn.Module, file: Path) -> dict[str, tuple[int, int, int]]:
    """Return rank, input and output width of every layer that an adapter's file claims to change.

    Args:
        claims: what the header of the file says; the file need not be here.
        model: the base model, which may have no numbers.
        file: what errors name.

    Raises:
        CoterieError: naming the first tensor that is no LoRA factor, or the first layer that the model lacks, has in
            another shape, or does not let experts change.
    """
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, (dtype, shape) in claims.items():
        path, _, end = key.removeprefix(KEY_PREFIX).rpartition(".lora_")
        if not key.startswith(KEY_PREFIX) or end not in ("A.weight", "B.weight") or not path:
            raise CoterieError(f"{file}: tensor {key!r} is no LoRA factor; use plain LoRA on linear layers alone")
        if dtype not in FLOATS:
            raise CoterieError(f"{file}: tensor {key!r} is of {dtype}, which no plain LoRA factor is")
        halves.setdefault(path, {})[end[0]] = shape
    if not halves:
        raise CoterieError(f"{file} holds no tensors; get the adapter again")
    widths = linear_shapes(model)
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    unchangeable = unchangeable_layers(model) if isinstance(model, PreTrainedModel) else {}
    for path, both in halves.items():
        if len(both) != 2:
            raise CoterieError(f"{file}: {path} has only lora_{next(iter(both))}; get the adapter again")
        _check_shapes(path, both["A"], both["B"], widths, file)
        if output is not None and model.get_submodule(path) is output:  # runs apart from all others, once a prompt
            raise CoterieError(f"{file}: {path} is the output layer, which experts cannot change; train without it")
        if (reason := unchangeable.get(path, NEVER_RUNS)) != NEVER_RUNS:  # one that never runs changes nothing
            raise CoterieError(f"{file}: {path} {reason}, so experts cannot change it; train without it")
    return {path: (both["A"][0], *widths[path]) for path, both in halves.items()}


def _check_shapes(
    path: str, down: tuple[int, ...], up: tuple[int, ...], widths: Mapping[str, tuple[int, int]], file: Path
) -> None:
    if path not in widths:
        raise CoterieError(
            f"{file}: the base model has no linear layer {path!r}; is the adapter for another base model?"
        )
    width_in, width_out = widths[path]
    rank = down[0] if len(down) == 2 else 0
    if not rank or down != (rank, width_in) or up != (width_out, rank):
        raise CoterieError(
            f"{file}: {path} has lora_A {down} and lora_B {up}, but the base model's layer "
            f"takes (r, {width_in}) and ({width_out}, r); is the adapter for another base model?"
        )
    if rank > max(MAX_RANK, width_in, width_out):
        raise CoterieError(f"{file}: {path} has rank {rank}, more than its {width_out} x {width_in} weights can need")


def _check_size(path: str, pair: LoraPair, dtype: torch.dtype, file: Path) -> None:
    """Refuse an update that overflows where it is used, or that drowns whatever the base model computes.

    The product of the factors' norms bounds the update's own.
    """
    bound = float(pair.down.double().norm() * pair.up.double().norm())
    largest = max(float(pair.down.abs().max()), float(pair.up.abs().max()))
    if not (bound <= LARGEST_UPDATE and largest <= torch.finfo(dtype).max):
        raise CoterieError(
            f"{file}: the update of {path} has a norm of up to {bound:.2g} after scaling by {pair.scaling:.2g}, which "
            "no training gives; get or train the adapter again"
        )


def _check_patterns(config: AdapterConfig, file: Path) -> None:
    """Refuse regular expressions that could search for years: they come from a file and meet every layer's name."""
    for field in ("rank_pattern", "alpha_pattern"):
        searches = [key for key in getattr(config, field) if any(sign in key for sign in "*+?{|")]
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


def rank_and_alpha(config: AdapterConfig, path: str, file: Path) -> tuple[int, int | float]:
    """Look up a layer's rank and alpha as PEFT does.

    Raises:
        CoterieError: when a pattern is no regular expression.
    """
    if not config.rank_pattern and not config.alpha_pattern:  # which nearly all have, and PEFT takes seconds to load
        return config.r, config.lora_alpha
    from peft.utils.other import get_pattern_key

    try:
        rank = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), path), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), path), config.lora_alpha)
        return rank, alpha
    except (OverflowError, re.error) as error:
        raise CoterieError(
            f"{file}: rank_pattern or alpha_pattern is broken ({error}); get the adapter again"
        ) from error


def _scaling(config: AdapterConfig, path: str, rank: int, file: Path) -> float:
    """Return alpha / r (or alpha / sqrt(r) for rsLoRA) as PEFT computes it."""
    wanted, alpha = rank_and_alpha(config, path, file)
    if wanted != rank:
        raise CoterieError(f"{file}: r = {wanted} and lora_alpha = {alpha:g} do not fit {path}, whose rank is {rank}")
    return alpha / rank**0.5 if config.use_rslora else alpha / rank


def check_names(names: Sequence[str]) -> None:
    """Refuse names that are not plain folder names, since they come from a file and become paths.

    Raises:
        CoterieError: naming the first bad one.
    """
    for name in names:
        if not is_folder_name(name):
            raise CoterieError(f"{name!r} cannot be an expert's name; use letters, digits, '-' and '_'")
