"""Experts stacked for one base model, and run on its linear layers inside a `with`, by explicit choice of rows.

One copy of the base weights serves all experts: every linear layer runs once over all rows, and the low-rank updates
are added to its output in batched products.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie import lora
from coterie.backbone.adding import Adding
from coterie.backbone.gates import MeanWeights
from coterie.backbone.linear_layers import linear_layers
from coterie.backbone.row_mix import EXACT, Gated, RequestRows, RowMix, alone, chosen, gated_rows, unused
from coterie.data.devices import on_device
from coterie.lora import Adapter, StackedPair

MERGED_KEPT = 16  # merged adapters that stay in the stacks when no row runs them any more

Watcher = Callable[[str, Tensor, Tensor], None]
"""Is told a layer's path, what it reads and what it gives without the experts, one vector a token."""


class ExpertLinear:
    """The experts of one linear layer: adds what each row's experts make of the layer's input to what the layer gives.

    Attributes:
        stack: the experts' updates; merged adapters come after the experts.
    """

    def __init__(self, path: str, stack: StackedPair, run: "Run") -> None:
        """Take in the updates; `run` says what rows run at the time."""
        self.stack = stack
        self._path = path
        self._run = run

    def __call__(self, out: Float[Tensor, "row position out"], x: Float[Tensor, "row position in"]) -> Tensor:
        """Return the layer's output with the experts."""
        if self._run.watch is not None:
            self._run.watch(self._path, x, out)
        mix, inputs = self._run.mix, x.to(self.stack.down.dtype)
        return self._gated(out, inputs, mix) if mix.gated else self._mixed(out, inputs, mix)

    def _mixed(self, out: Tensor, x: Tensor, mix: RowMix) -> Tensor:
        """Add the experts by each row's weights."""
        (rows, positions), rank, experts = x.shape[:2], self.stack.down.shape[1], mix.weights.shape[-1]
        if mix.alone and mix.alone.places is None:
            return lora.add_in_order(out, x, self.stack.part(mix.alone.first, mix.alone.end))
        if mix.alone and mix.alone.places and positions < rank:  # copying vectors costs less than copying factors
            return lora.add_padded(out, x, self.stack.part(mix.alone.first, mix.alone.end), *mix.alone.places)
        if mix.chosen and lora.copying_pays(rows, positions, mix.chosen.experts.shape[1], experts):
            return lora.add_by_row(out, x, self.stack, *mix.chosen)
        return lora.add_weighted(out, x, self.stack.part(0, experts), mix.weights, mix.unused)

    def _gated(self, out: Tensor, x: Tensor, mix: RowMix) -> Tensor:
        """Add the experts as gates weigh them at every token."""
        weights, experts = mix.weights, mix.weights.shape[-1]
        for gates, rows, places in mix.gated:
            own = weights.new_zeros(*x.shape[:2], experts)
            if self._path in gates.layers:
                own.index_copy_(2, places, gates.weigh(self._path, x).weights.to(own))
            weights = torch.where(rows[:, None, None], own, weights)
        if self._run.seen is not None:
            self._run.seen.add(weights)
        tokens, most, stack = x.shape[0] * x.shape[1], mix.most_weighed, self.stack.part(0, experts)
        if lora.copying_pays(tokens, 1, most, experts):
            shares, places = weights.flatten(0, 1).topk(most)
            flat, vectors = (tensor.reshape(tokens, 1, -1) for tensor in (out, x))
            return lora.add_by_row(flat, vectors, stack, places, shares, shares == 0).reshape(out.shape)
        if x.device.type == "cpu" and lora.grouping_pays(tokens, most, experts, stack.down.shape[1]):
            return lora.add_chosen(out, x, stack, weights)
        return lora.add_weighted(out, x, stack, weights, weights == 0)


class Run:
    """What the rows of a batch run at the time, for all layers."""

    mix: RowMix
    seen: MeanWeights | None = None
    watch: Watcher | None = None


class MergedSlot:
    """A place in the stacks that one merged adapter has, for as long as somebody holds this."""

    def __init__(self, number: int) -> None:
        """Store the place."""
        self.number = number


class ExpertLayers:
    """The stacked updates of several experts, ready to run on one base model.

    Base weights are never written to, and the layers are as they were when the `with` of `running` ends.
    """

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter], dtype: torch.dtype | None = None) -> None:
        """Take in the experts' updates; they are stacked on the devices of the layers they change when used first.

        Args:
            model: the base model.
            adapters: one per expert; an empty one stands for the base model itself.
            dtype: of the updates; the base model's by default.
        """
        self.model = model
        self.adapters = adapters
        self._dtype = dtype or next(model.parameters()).dtype
        self._run = Run()
        self._slots: WeakValueDictionary[tuple[tuple[float, ...], str], MergedSlot] = WeakValueDictionary()
        self._recent: deque[MergedSlot] = deque(maxlen=MERGED_KEPT)
        self.generation = 0
        """How often stacks were replaced, since merged adapters have found no room in them."""

    @property
    def device(self) -> torch.device:
        """Where the base model takes its tokens."""
        return next(self.model.get_input_embeddings().parameters()).device

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Module paths of the layers that some expert changes."""
        return tuple(sorted({path for adapter in self.adapters for path in adapter}))

    @cached_property
    def _layers(self) -> dict[str, ExpertLinear]:
        """The updates, stacked when they are used first: from then on all of them are in memory."""
        modules, adapters = linear_layers(self.model), tuple(self.adapters)
        stacked = {}
        for path in self.paths:
            pair = lora.stack([adapter.get(path) for adapter in adapters])
            own = lora.contained(StackedPair(*(half.to(self._dtype) for half in pair)))
            device = next(modules[path].parameters()).device
            stacked[path] = ExpertLinear(path, StackedPair(*(on_device(half, device) for half in own)), self._run)
        return stacked

    @cached_property
    def _adding(self) -> Adding:
        return Adding(self.model, self._layers)

    def load(self) -> None:
        """Stack the updates now, in place of when they are used first."""
        _ = self._layers

    def stack(self, path: str) -> StackedPair:
        """Return a layer's updates, stacked over the experts."""
        return self._layers[path].stack

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
        device = self.device
        if weights.dim() == 3:
            return RowMix(on_device(weights, device), unused(weights, device))
        by_row = weights[:, None]
        forms = unused(by_row, device), alone(weights, device), chosen(weights, device)
        return RowMix(on_device(by_row, device), *forms)

    def gated(self, gated: Gated, rows: int) -> RowMix:
        """Let gates weigh the experts of every row, at every token."""
        weights = torch.zeros(rows, len(self.adapters))
        return self.mix([RequestRows(weights, torch.ones(rows), gated)])

    @property
    def stacked_experts(self) -> int:
        """How many experts have room in the stacks, merged adapters among them."""
        return max((len(layer.stack.down) for layer in self._layers.values()), default=0)

    # ------------------------------------------------------------------------------------------------ merging

    def _slot(self, weights: tuple[float, ...], how: str) -> MergedSlot:
        """Return the place in the stacks of a merged adapter, which is put there if it is not there yet."""
        slot = self._slots.get((weights, how))
        if slot is None:
            adapter = self.merged(weights, how, self.device)
            taken = {other.number for other in self._slots.values()}
            slot = MergedSlot(next(n for n in itertools.count(len(self.adapters)) if n not in taken))
            for path, layer in self._layers.items():
                before, layer.stack = layer.stack, lora.put(layer.stack, slot.number, adapter.get(path))
                self.generation += layer.stack is not before
            self._slots[weights, how] = slot
        self._recent.append(slot)
        return slot

    def merged(self, weights: tuple[float, ...], how: str = EXACT, device: torch.device | None = None) -> Adapter:
        """Return one adapter in place of all, with these weights (one an expert), merged layer by layer.

        Args:
            weights: of the experts.
            how: see `coterie.lora.merge`.
            device: where it is computed, and then is; by default where the experts' adapters are.

        Raises:
            CoterieError: as `coterie.lora.merge`.
        """
        used = [(adapter, weight) for adapter, weight in zip(self.adapters, weights, strict=True) if weight]
        result = {}
        for path in self.paths:
            present = [(adapter[path].to(device), weight) for adapter, weight in used if path in adapter]
            if present:
                result[path] = lora.merge([pair for pair, _ in present], torch.tensor([w for _, w in present]), how)
        return result

    def merge_error(self, weights: tuple[float, ...], how: str) -> float:
        """Return how far a merge is from the exact mixture: |merged - exact| / |exact|, Frobenius over all layers."""
        exact, other = self.merged(weights), self.merged(weights, how)
        size = sum(map(lora.squared_norm, exact.values()))
        distance = sum(lora.squared_distance(other[path], pair) for path, pair in exact.items())
        return math.sqrt(distance / size) if size else 0.0

    # ------------------------------------------------------------------------------------------------ running

    @contextmanager
    def running(self, mix: RowMix, seen: MeanWeights | None = None, watch: Watcher | None = None) -> Iterator[None]:
        """Context manager: run experts in the model's forward passes.

        Args:
            mix: what the rows of these passes run.
            seen: averages what gates weigh.
            watch: sees every changed layer.

        Raises:
            CoterieError: when the base model is in use by other experts, in this thread or in another one.
        """
        with self._adding():
            self._run.mix, self._run.seen, self._run.watch = mix, seen, watch
            try:
                yield
            finally:
                self._run.seen = self._run.watch = None
