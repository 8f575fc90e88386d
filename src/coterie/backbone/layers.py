"""Experts attached to the base model's linear layers, inside a `with` and by explicit choice of rows.

One copy of the base weights serves all experts: every linear layer runs once over all rows, and the low-rank updates
are added to its output in batched products.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coterie.backbone.gates import Gates, MeanWeights
from coterie.errors import CoterieError
from coterie.lora import (
    Adapter,
    LoraPair,
    StackedPair,
    apply_by_expert,
    apply_weighted,
    merge,
    squared_distance,
    squared_norm,
    stack,
)

SAME_INPUT = 0.05  # relative difference of inputs that are equal up to rounding, in bfloat16 too
MERGED_KEPT = 8  # merged adapters, each as large as all experts together


@dataclass(frozen=True)
class ByExpert:
    """Each row runs one expert: rows are ordered by expert, `counts[i]` of them for `experts[i]`."""

    experts: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Weighted:
    """Each row runs a mixture of `experts` inside every layer, with weights of its own."""

    experts: tuple[int, ...]
    weights: Float[Tensor, "row #position expert"]  # noqa: F821


@dataclass(frozen=True)
class Merged:
    """Each row runs one merged adapter: `counts[i]` rows in turn for the i-th row of weights over all experts."""

    weights: tuple[tuple[float, ...], ...]
    counts: tuple[int, ...]
    how: str


@dataclass(frozen=True)
class Gated:
    """Each token of each row runs a mixture of `experts`, weighed by every layer's own gate on the layer's input.

    `experts[i]` is the place of `gates.experts[i]` among the attached ones.
    """

    experts: tuple[int, ...]
    gates: Gates


Choice = ByExpert | Weighted | Merged | Gated


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


class ExpertLayers:
    """The stacked updates of several experts, ready to be attached to one base model.

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
        self._subset = lru_cache(maxsize=8)(self._select)
        self._merged = lru_cache(maxsize=2)(self._merge)
        self.merged = lru_cache(maxsize=MERGED_KEPT)(self._merge_row)
        self._choice: Choice | None = None
        self._seen: MeanWeights | None = None

    @cached_property
    def _stacks(self) -> dict[str, StackedPair]:
        """The updates, stacked when they are used first."""
        return {path: self._stacked(path, self.adapters) for path in self.paths}

    def _stacked(self, path: str, adapters: Sequence[Mapping[str, LoraPair | None]]) -> StackedPair:
        device = next(self._modules[path].parameters()).device
        pair = stack([adapter.get(path) for adapter in adapters])
        return StackedPair(*(tensor.to(device, self._dtype) for tensor in pair))

    def _select(self, experts: tuple[int, ...]) -> dict[str, StackedPair]:
        if experts == tuple(range(len(self.adapters))):
            return self._stacks
        index = list(experts)
        return {path: StackedPair(pair.down[index], pair.up[index]) for path, pair in self._stacks.items()}

    def _merge(self, weights: tuple[tuple[float, ...], ...], how: str) -> dict[str, StackedPair]:
        """Merge all experts once for every row of weights, in float32."""
        merged = [self.merged(row, how) for row in weights]
        paths = {path for adapter in merged for path in adapter}
        return {path: self._stacked(path, merged) for path in self.paths if path in paths}

    def _merge_row(self, weights: tuple[float, ...], how: str = "exact") -> Adapter:
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

    def attached(self) -> AbstractContextManager[None]:
        """Attach the experts to the base model until the `with` ends."""
        return updating(self.model, self._modules, self._update)

    @contextmanager
    def choosing(self, choice: Choice, seen: MeanWeights | None = None) -> Iterator[None]:
        """Say which rows run which experts in the forward passes inside the `with`; `seen` averages gates' weights."""
        before, self._choice, self._seen = self._choice, choice, seen
        try:
            yield
        finally:
            self._choice, self._seen = before, None

    def _update(self, path: str, x: Tensor) -> Tensor | None:
        """Return what the chosen experts add to a layer's output; None where they all leave the layer as it is."""
        x = x.to(self._dtype)
        match self._choice:
            case ByExpert(experts, counts):
                return apply_by_expert(x, self._subset(experts)[path], counts)
            case Weighted(experts, weights):
                return apply_weighted(x, self._subset(experts)[path], weights.to(x.device))
            case Merged(weights, counts, how):
                pair = self._merged(weights, how).get(path)
                return None if pair is None else apply_by_expert(x, pair, counts)
            case Gated(experts, gates):
                return gates.apply(path, x, self._subset(experts)[path], self._seen) if path in gates.layers else None
            case None:
                raise RuntimeError("experts are attached, but no rows were chosen; use `with layers.choosing(...)`")
