"""Experts attached to the base model's linear layers, inside a `with` and by explicit choice of rows.

One copy of the base weights serves all experts: every linear layer runs once over all rows, and the low-rank updates
are added to its output in batched products.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coterie.backbone.gates import MeanWeights
from coterie.backbone.row_mix import EXACT, Gated, RequestRows, RowMix, gated_rows, grouped
from coterie.errors import CoterieError
from coterie.lora import (
    Adapter,
    LoraPair,
    StackedPair,
    apply_by_expert,
    apply_weighted,
    merge,
    put,
    squared_distance,
    squared_norm,
    stack,
)

SAME_INPUT = 0.05  # relative difference of inputs that are equal up to rounding, in bfloat16 too
MERGED_KEPT = 16  # merged adapters that stay in the stacks when no row runs them any more


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


def by_token(
    path: str, x: Float[Tensor, "... width"], rows: int, positions: int
) -> Float[Tensor, "row position width"]:
    """Return what a layer reads, or writes, with one vector for every token of the batch that the model is reading.

    Models also give a layer all tokens in one row (OPT, shared experts), or put an axis between (multi-head latent
    attention).

    Raises:
        CoterieError: when there is not one vector a token, so that nobody can tell which row a vector belongs to.
    """
    if x.shape[:-1] == (rows, positions):
        return x
    if x.dim() > 2 and x.shape[0] == rows:  # latent attention: the keys of all that was read, made anew at every token
        return x.reshape(rows, -1, x.shape[-1])
    if x.shape[:-1].numel() != rows * positions:
        raise _unchangeable(path, f"reads {x.shape[:-1].numel()} vectors where there are {rows} x {positions} tokens")
    return x.reshape(rows, positions, x.shape[-1])


def _unchangeable(path: str, reason: str) -> CoterieError:
    return CoterieError(f"experts cannot change the layer {path}, which {reason}; use adapters without it")


NEVER_RUNS = "never runs"
_UNCHANGEABLE: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def unchangeable_layers(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers that experts cannot change, by module path, with what each does that it cannot.

    Found once a model, by reading two rows, in either order: some layers never run (state space models may use the
    weight alone), read only the tokens sent to them, or return something else than one product (routers).
    """
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


@contextmanager
def updating(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    update: Callable[[str, Float[Tensor, "row position in"]], Tensor | None],
) -> Iterator[None]:
    """Context manager: add `update(path, x)` to the output of each layer, x being the layer's input.

    Args:
        model: of which they are layers.
        modules: the layers by module path.
        update: sees one vector a token, whatever shape the model gives the layer; None leaves the output as it is.
    """
    size = (0, 0)  # rows and positions of what the model is reading

    def note_size(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal size
        size = (output.shape[0], output.shape[1])

    def add_update(path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = update(path, by_token(path, inputs[0], *size))
        if change is None:
            return output
        if not isinstance(output, Tensor) or output.shape != (*inputs[0].shape[:-1], change.shape[-1]):
            raise _unchangeable(path, "returns something else than one product")
        change = change.to(output.dtype).reshape(output.shape)
        return output + change if torch.is_grad_enabled() else output.add_(change)

    handles = [module.register_forward_hook(partial(add_update, path)) for path, module in modules.items()]
    handles.append(model.get_input_embeddings().register_forward_hook(note_size))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class MergedSlot:
    """A place in the stacks that one merged adapter has, for as long as somebody holds this."""

    def __init__(self, number: int) -> None:
        """Store the place."""
        self.number = number


class ExpertLayers:
    """The stacked updates of several experts, ready to run on one base model.

    Base weights are never written to, and the hooks are gone when the `with` ends.
    """

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter], dtype: torch.dtype | None = None) -> None:
        """Take in the experts' updates; they are stacked on the devices of the layers they change when used first.

        Args:
            model: the base model.
            adapters: one per expert; an empty one stands for the base model itself.
            dtype: of the updates; the base model's by default.
        """
        modules = linear_layers(model)
        self.model = model
        self.adapters = tuple(adapters)
        self.paths = tuple(sorted({path for adapter in adapters for path in adapter}))
        """Module paths of the layers that some expert changes."""
        self._modules = {path: modules[path] for path in self.paths}
        self._dtype = dtype or next(model.parameters()).dtype
        self._slots: WeakValueDictionary[tuple[tuple[float, ...], str], MergedSlot] = WeakValueDictionary()
        self._recent: deque[MergedSlot] = deque(maxlen=MERGED_KEPT)

    @property
    def device(self) -> torch.device:
        """Where the base model takes its tokens."""
        return next(self.model.get_input_embeddings().parameters()).device

    @cached_property
    def _stacks(self) -> dict[str, StackedPair]:
        """The updates, stacked when they are used first; merged adapters come after the experts."""
        return {path: self._stacked(path, self.adapters) for path in self.paths}

    def _stacked(self, path: str, adapters: Sequence[Mapping[str, LoraPair | None]]) -> StackedPair:
        device = next(self._modules[path].parameters()).device
        pair = stack([adapter.get(path) for adapter in adapters])
        return StackedPair(*(tensor.to(device, self._dtype) for tensor in pair))

    # ------------------------------------------------------------------------------------------ what rows run

    def mix(self, requests: Sequence[RequestRows]) -> RowMix:
        """Put the rows of requests side by side, in their order.

        Raises:
            CoterieError: as `coterie.lora.merge`.
        """
        asked = [self._in_stack(own) for own in requests]
        width = max(rows.shape[1] for rows, _ in asked)
        weights = torch.cat([nn.functional.pad(rows, (0, width - rows.shape[1])) for rows, _ in asked])
        held = tuple(slot for _, slots in asked for slot in slots)
        return replace(self.weighted(weights), gated=gated_rows(requests, self.device), held=held)

    def _in_stack(self, own: RequestRows) -> tuple[Float[Tensor, "row slot"], list[MergedSlot]]:
        """Return what a request's rows run as weights over the stack, and the merged adapters that they need there."""
        if own.merge == EXACT:
            return own.weights.float(), []
        slots = [self._slot(tuple(row), own.merge) for row in own.weights.tolist()]
        return nn.functional.one_hot(torch.tensor([slot.number for slot in slots])).float(), slots

    def weighted(self, weights: Float[Tensor, "row *position expert"]) -> RowMix:
        """Mix the experts inside every layer, with weights of its own for every row (or every position of it)."""
        groups = grouped(weights, self.device) if weights.dim() == 2 else None
        shaped = weights if weights.dim() == 3 else weights[:, None]
        return RowMix(shaped.to(self.device), groups)

    def gated(self, gated: Gated, rows: int) -> RowMix:
        """Let gates weigh the experts of every row, at every token."""
        weights = torch.zeros(rows, len(self.adapters))
        return self.mix([RequestRows(weights, torch.ones(rows), gated)])

    @property
    def stacked_experts(self) -> int:
        """How many experts have room in the stacks, merged adapters among them."""
        return max((len(pair.down) for pair in self._stacks.values()), default=0)

    # ------------------------------------------------------------------------------------------------ merging

    def _slot(self, weights: tuple[float, ...], how: str) -> MergedSlot:
        """Return the place in the stacks of a merged adapter, which is put there if it is not there yet."""
        slot = self._slots.get((weights, how))
        if slot is None:
            adapter = self.merged(weights, how)
            taken = {other.number for other in self._slots.values()}
            slot = MergedSlot(next(n for n in itertools.count(len(self.adapters)) if n not in taken))
            for path in self.paths:
                self._stacks[path] = put(self._stacks[path], slot.number, adapter.get(path))
            self._slots[weights, how] = slot
        self._recent.append(slot)
        return slot

    def merged(self, weights: tuple[float, ...], how: str = EXACT) -> Adapter:
        """Return one adapter in place of all, with these weights (one an expert), merged layer by layer.

        Raises:
            CoterieError: as `coterie.lora.merge`.
        """
        used = [(adapter, weight) for adapter, weight in zip(self.adapters, weights, strict=True) if weight]
        result = {}
        for path in self.paths:
            present = [(adapter[path], weight) for adapter, weight in used if path in adapter]
            if present:
                result[path] = merge([pair for pair, _ in present], torch.tensor([w for _, w in present]), how)
        return result

    def merge_error(self, weights: tuple[float, ...], how: str) -> float:
        """Return how far a merge is from the exact mixture: |merged - exact| / |exact|, Frobenius over all layers."""
        exact, other = self.merged(weights), self.merged(weights, how)
        size = sum(map(squared_norm, exact.values()))
        distance = sum(squared_distance(other[path], pair) for path, pair in exact.items())
        return math.sqrt(distance / size) if size else 0.0

    # ------------------------------------------------------------------------------------------------ running

    def running(self, mix: RowMix, seen: MeanWeights | None = None) -> AbstractContextManager[None]:
        """Run the experts in the model's forward passes inside the `with`; `seen` averages what gates weigh."""
        return updating(self.model, self._modules, partial(self._update, mix, seen))

    def _update(self, mix: RowMix, seen: MeanWeights | None, path: str, x: Tensor) -> Tensor:
        """Return what the experts add to a layer's output."""
        x, pair = x.to(self._dtype), self._stacks[path]
        if mix.groups and not mix.gated:
            experts, counts, order, back = mix.groups
            chosen = StackedPair(pair.down[experts], pair.up[experts])
            update = apply_by_expert(x if order is None else x[order], chosen, counts)
            return update if back is None else update[back]
        weights = mix.weights
        for (experts, gates), rows in mix.gated:
            own = weights.new_zeros(*x.shape[:2], weights.shape[-1])
            if path in gates.layers:
                own[..., list(experts)] = gates.weigh(path, x).weights.to(own)
            weights = torch.where(rows[:, None, None], own, weights)
        if seen is not None:
            seen.add(weights)
        count = weights.shape[-1]
        return apply_weighted(x, StackedPair(pair.down[:count], pair.up[:count]), weights)
