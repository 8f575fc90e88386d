"""The linear layers of a model: which there are, how wide, and which of them experts cannot change."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SAME_INPUT = 0.05  # relative difference of inputs that are equal up to rounding, in bfloat16 too


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer by its module path: quantised ones too, and GPT-2's, whose weight is transposed."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Conv1D) or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    }


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the input and output width of every linear layer by its module path."""
    layers: dict[str, Any] = dict(linear_layers(model))
    return {
        path: (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (int(layer.in_features), int(layer.out_features))
        for path, layer in layers.items()
    }


NEVER_RUNS = "never runs"
_UNCHANGEABLE: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def unchangeable_layers(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers that experts cannot change, by module path, with what each does that it cannot.

    Found once a model, by reading two rows, in either order: some layers never run (state space models may use the
    weight alone), read only the tokens sent to them, or return something else than one product (routers).
    """
    if model.device.type == "meta":  # without numbers nothing shows
        return {}
    if model not in _UNCHANGEABLE:
        rows = torch.arange(14, device=model.device).view(2, 7) % model.config.get_text_config().vocab_size
        once, swapped = _calls(model, rows), _calls(model, rows.flip(0))
        widths = {path: width_out for path, (_, width_out) in linear_shapes(model).items()}
        found = {path: _what_it_does(once[path], swapped[path], rows, width) for path, width in widths.items()}
        _UNCHANGEABLE[model] = {path: reason for path, reason in found.items() if reason}
    return _UNCHANGEABLE[model]


Call = tuple[Tensor, tuple[int, ...]]
"""What a layer read, and the shape of what it returned; () for something else than a tensor."""


@torch.inference_mode()
def _calls(model: PreTrainedModel, ids: Int[Tensor, "row position"]) -> dict[str, list[Call]]:
    """Read rows, and return the calls of every linear layer."""
    layers = linear_layers(model)
    calls: dict[str, list[Call]] = {path: [] for path in layers}

    def note(path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        calls[path].append((inputs[0], tuple(output.shape) if isinstance(output, Tensor) else ()))

    with ExitStack() as hooks:
        for path, module in layers.items():
            hooks.callback(module.register_forward_hook(partial(note, path)).remove)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return calls


def _what_it_does(once: Sequence[Call], swapped: Sequence[Call], rows: Tensor, width_out: int) -> str | None:
    """Return what a layer's calls show that experts cannot follow, if anything; the rows were swapped in the others."""
    if not once and not swapped:
        return NEVER_RUNS
    if len(once) != len(swapped) or any(x.shape[:-1].numel() != rows.numel() for x, _ in (*once, *swapped)):
        return "does not read every token"
    for (x, shape), (other, _) in zip(once, swapped, strict=True):
        if shape != (*x.shape[:-1], width_out):
            return "returns something else than one product"
        own, same = x.float().reshape(2, -1), other.float().reshape(2, -1).flip(0)
        if (own - same).norm() > SAME_INPUT * own.norm():
            return "does not read tokens in the order of rows"
    return None
