"""Which linear layers of a base model a fresh adapter changes."""

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coterie.backbone.linear_layers import linear_layers, unchangeable_layers
from coterie.errors import CoterieError, unknown_name
from coterie.experts.bank import factor_names

ALL_LINEAR = "all-linear"
WITHOUT_OUT_PROJ = ("falcon_h1", "nemotron_h")
"""Model types whose `out_proj` PEFT refuses: faster kernels read its weight alone."""


def is_transposed(model: PreTrainedModel, layers: Iterable[str]) -> bool:
    """Whether all these layers keep their weight as GPT-2 does, which PEFT's configs call `fan_in_fan_out`."""
    return all(isinstance(model.get_submodule(path), Conv1D) for path in layers)


def layers_to_change(model: PreTrainedModel, target_modules: str) -> list[str]:
    """Return the linear layers that a fresh adapter changes, in the model's order: of those asked for all that can be.

    Raises:
        CoterieError: for a name of no linear layer, or names of layers none of which can be changed.
    """
    asked, left_out = asked_layers(model, target_modules), unchangeable(model)
    layers = [path for path in asked if path not in left_out]
    if not layers:
        raise CoterieError(
            f"adapters cannot change {target_modules} of this model ({left_out[asked[0]]}); "
            f"type --target-modules {ALL_LINEAR}"
        )
    return layers


def asked_layers(model: PreTrainedModel, target_modules: str) -> list[str]:
    """Return the linear layers that are asked for by name (as PEFT compares: the end of the path), or all.

    Raises:
        CoterieError: for a name of no linear layer.
    """
    linear = list(linear_layers(model))
    if target_modules == ALL_LINEAR:
        return linear
    by_name = {}
    for name in (name.strip() for name in target_modules.split(",")):
        by_name[name] = {path for path in linear if f".{path}".endswith(f".{name}")}
        if not by_name[name]:
            raise unknown_name("linear layer", name, [ALL_LINEAR, *{path.rpartition(".")[2] for path in linear}])
    return [path for path in linear if any(path in found for found in by_name.values())]


def unchangeable(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers that a fresh adapter must leave as they are, with the reason."""
    reasons = dict(unchangeable_layers(model))
    paths = [path for path in linear_layers(model) if path not in reasons]
    renamed = _renamed_by_peft(model, paths)
    for path in paths:
        if model.get_submodule(path) is model.get_output_embeddings():  # runs apart from all others, once a prompt
            reasons[path] = "is the output layer"
        elif model.config.model_type in WITHOUT_OUT_PROJ and path.endswith(".out_proj"):
            reasons[path] = "is refused by PEFT"
        elif path in renamed:
            reasons[path] = "is taken by PEFT for a part of the fused experts"
    return reasons


def _renamed_by_peft(model: PreTrainedModel, paths: Sequence[str]) -> set[str]:
    """Return the layers that PEFT takes for what had such a name in transformers 4, in a config or in a file."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
        convert_peft_config_for_transformers,
    )

    named = {}
    for path in paths:
        config = LoraConfig(target_modules=[path])
        with suppress(ValueError):  # which PEFT raises for a part of what is one parameter now
            convert_peft_config_for_transformers(config, model, None)
            if config.target_modules == {path}:
                named[factor_names(path)[0]] = path
    file: dict[str, Tensor] = dict.fromkeys(named, torch.zeros(1, 1))
    kept = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), file)
    return set(paths) - {path for name, path in named.items() if name in kept}
