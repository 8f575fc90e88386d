"""The layers of a cache by row: keys and values by column, rings of a sliding window, recurrent states by slot."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from coterie.backbone.model import Backbone
from coterie.backbone.span import Span
from coterie.data.devices import on_device
from coterie.errors import CoterieError

SPARE = 16
"""Columns of a ring beyond its window: the longest piece that is read inside it, and the furthest way back."""

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
"""transformers' names of patterns of attention: all tokens before, the last ones, those of the same chunk."""


class KeysAndValues(CacheLayerMixin):
    """Keys and values by column; with a window, in a ring that holds the last tokens of each row."""

    def __init__(self, sample: DynamicLayer, kind: str, window: int | None) -> None:
        """Take the shapes of a layer that has read one token.

        Args:
            sample: the layer.
            kind: its pattern of attention.
            window: how many tokens it looks at; None for all.
        """
        CacheLayerMixin.__init__(self)
        self.kind, self.window = kind, window
        self.is_sliding = kind != FULL
        pair: Any = (sample.keys, sample.values)
        self.held: list[Tensor] = [states.new_empty(0, states.shape[1], 0, states.shape[3]) for states in pair]
        self._length = 0

    def columns(self, length: int) -> int:
        """Return how many columns so many tokens take."""
        return length if self.window is None else min(length, self.window - 1 + SPARE)

    def taken(self, length: int, written: int) -> int:
        """Return in how many columns a row's first tokens stand; in all of a ring that has turned over."""
        return length if self.columns(written) == written else self.columns(written)

    def holds(self, length: int, written: int) -> bool:
        """Tell whether a row can go on from a length, when tokens up to another were written."""
        return self.window is None or max(length - self.window + 1, 0) >= written - self.columns(written)

    def begin(self, span: Span) -> None:
        """Take in what is read next."""
        self._span, self._length = span, span.total - span.size

    @property
    def _overflows(self) -> bool:
        """Whether a piece would overwrite in the ring what its own first tokens look at."""
        return self._span.size > SPARE and self._span.total > self.held[0].shape[2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the states (row, head, position, width) at the rows' ends, and return all that they may look at."""
        span, self._length = self._span, self._span.total
        blocks = [buffer[span.slots] for buffer in self.held]
        if self._overflows:
            new = key_states, value_states
            whole = new if span.level == 0 else [torch.cat(pair, dim=2) for pair in zip(blocks, new, strict=True)]
            self._keep_last(blocks, new)
            return whole[0], whole[1]
        for block, states in zip(blocks, (key_states, value_states), strict=True):
            self._write(block, states)
        return blocks[0][:, :, : span.total], blocks[1][:, :, : span.total]

    def _write(self, block: Tensor, states: Tensor) -> None:
        span, columns = self._span, block.shape[2]
        if span.level is not None and (first := span.level % columns) + span.size <= columns:
            block[:, :, first : first + span.size] = states
            return
        places, by_column, new = span.places(columns), block.transpose(1, 2), states.transpose(1, 2)
        if span.is_token is not None:
            new = torch.where(span.is_token[..., None, None], new, by_column[places])
        by_column[places] = new

    def _keep_last(self, blocks: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Write the last tokens of a long piece into the ring."""
        places = _in_ring(self._span.ends, blocks[0].shape[2]) - self._span.starts
        fresh = (places >= 0)[:, None, :, None]
        for block, states in zip(blocks, new, strict=True):
            index = places.clamp(min=0)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            block.copy_(torch.where(fresh, states.gather(2, index), block))

    def _key_positions(self) -> Int[Tensor, "#row column"]:
        """Return where the keys that `update` will return stand in their texts; negative where there is none."""
        span, columns = self._span, self.held[0].shape[2]
        if self._overflows:
            new = span.positions
            return new if span.level == 0 else torch.cat([_in_ring(span.starts, columns), new], dim=1)
        if span.total <= columns:
            return torch.arange(span.total, device=span.positions.device)[None]
        return _in_ring(span.starts + span.size, columns)

    @property
    def is_plain(self) -> bool:
        """Whether the mask that models make by themselves is right: columns are positions, of all rows alike."""
        return self._span.level is not None and (self.window is None or self._span.total <= self.window)

    def seen(self) -> Bool[Tensor, "row 1 position column"]:
        """Return which keys each token looks at."""
        keys, tokens = self._key_positions()[:, None, :], self._span.positions[:, :, None]
        seen = (keys <= tokens) & (keys >= 0)
        if self.window is not None:
            chunked = self.kind == CHUNKED
            seen &= keys // self.window == tokens // self.window if chunked else keys > tokens - self.window
        return seen[:, None]

    def get_seq_length(self) -> int:
        """Return how many columns are in use: before the states of a read come, and behind them."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys, and the position of the first one."""
        return self._span.total, 0

    def get_max_length(self) -> int:
        """Return -1: rows may grow."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: shapes are known from the start."""


def _in_ring(ends: Int[Tensor, "row 1"], columns: int) -> Int[Tensor, "row column"]:
    """Return which positions a ring's columns hold of rows that end there; negative where none."""
    last = ends - 1
    return last - (last - torch.arange(columns, device=ends.device)) % columns


class States(LinearAttentionLayer):
    """States of a convolution or a recurrence, by slot."""

    def __init__(self, sample: LinearAttentionLayer) -> None:
        """Take the shapes of a layer that has read one token."""
        LinearAttentionLayer.__init__(self, sample.number_of_states)
        self.device, self.dtype = sample.device, sample.dtype
        self.conv_kernel_size = dict(sample.conv_kernel_size)
        self.is_conv_states_initialized = dict(sample.is_conv_states_initialized)
        self.is_recurrent_states_initialized = dict(sample.is_recurrent_states_initialized)
        pairs = (self.conv_states, sample.conv_states), (self.recurrent_states, sample.recurrent_states)
        found = [(own, number, states) for own, theirs in pairs for number, states in theirs.items()]
        self._tables = [(own, number) for own, number, states in found if states is not None]
        self.states = [states.new_zeros(0, *states.shape[1:]) for *_, states in found if states is not None]

    def begin(self, span: Span) -> None:
        """Take in what is read next: rows that have all read something before, or nothing."""
        for (table, number), buffer in zip(self._tables, self.states, strict=True):
            table[number] = buffer[span.slots]
        self.has_previous_state = dict.fromkeys(self.has_previous_state, any(span.lengths))


class KeysValuesAndStates(KeysAndValues, States):
    """A layer that has both."""

    def __init__(self, sample: Any, kind: str, window: int | None) -> None:  # noqa: ANN401 - one of two such layers
        """Take the shapes of a layer that has read one token."""
        KeysAndValues.__init__(self, sample, kind, window)
        States.__init__(self, sample)

    def begin(self, span: Span) -> None:
        """Take in what is read next."""
        KeysAndValues.begin(self, span)
        States.begin(self, span)


class RowCache(Cache):
    """The cache of a model: for every slot as many columns, in every layer."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        """Take in the layers, empty: of the kinds of this module, or dummies; and the model's type."""
        super().__init__(layers=list(layers))
        self._attention = [layer for layer in layers if isinstance(layer, KeysAndValues)]
        self._recurrent = [layer for layer in layers if isinstance(layer, States)]
        self._dtype = dtype
        self.slots, self.columns = 0, 0
        self.generation = 0
        """How often the buffers were replaced."""

    @property
    def has_states(self) -> bool:
        """Whether there are states that padding would change, and that nothing turns back."""
        return bool(self._recurrent)

    @property
    def _buffers(self) -> list[Tensor]:
        keys = [buffer for layer in self._attention for buffer in layer.held]
        return keys + [buffer for layer in self._recurrent for buffer in layer.states]

    @property
    def bytes(self) -> int:
        """What the buffers take."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def bytes_for(self, slots: int, columns: int) -> int:
        """Return what the buffers would take in another size."""
        numbers = [
            buffer.shape[1] * layer.columns(columns) * buffer.shape[3] * buffer.itemsize
            for layer in self._attention
            for buffer in layer.held
        ]
        numbers += [buffer.shape[1:].numel() * buffer.itemsize for layer in self._recurrent for buffer in layer.states]
        return slots * sum(numbers)

    def resize(self, kept: Sequence[int], slots: int, columns: int) -> None:
        """Change the buffers' size; the slots that are kept become the first ones, in this order.

        What is not written yet is 0: numbers that attention leaves out must be finite.
        """
        index = self._places(kept)
        for layer in self._attention:
            width = layer.columns(columns)
            for place, old in enumerate(layer.held):
                layer.held[place] = new = old.new_zeros(slots, old.shape[1], width, old.shape[3])
                both = min(width, old.shape[2])
                new[: len(index), :, :both] = old[index, :, :both]
        for layer in self._recurrent:
            for place, old in enumerate(layer.states):
                layer.states[place] = new = old.new_zeros(slots, *old.shape[1:])
                new[: len(index)] = old[index]
        self.slots, self.columns = slots, columns
        self.generation += 1

    def _places(self, slots: Sequence[int]) -> Int[Tensor, " slot"]:
        return on_device(slots, self._buffers[0].device, torch.long)

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int, *, moves: bool = False) -> None:
        """Copy what slots hold of so many tokens into other slots; all are read before any is written.

        Where rows move, nothing stays behind.
        """
        came, went = self._places(sources), self._places(targets)
        for layer in self._attention:
            for buffer in layer.held:
                states = buffer[came, :, : layer.columns(length)]
                if moves:
                    buffer[came, :, : layer.columns(length)] = 0
                buffer[went, :, : layer.columns(length)] = states
        for layer in self._recurrent:
            for buffer in layer.states:
                buffer[went] = buffer[came]

    def clear(self, slot: int, length: int) -> None:
        """Forget so many tokens of a slot: numbers that attention leaves out must be finite."""
        for buffer, columns in [(own, layer.columns(length)) for layer in self._attention for own in layer.held]:
            buffer[slot, :, :columns].zero_()

    def save(self, slot: int, length: int, written: int) -> list[Tensor]:
        """Return a copy of the first tokens that a slot holds, when so many were written."""
        keys = [buffer[slot, :, : layer.taken(length, written)] for layer in self._attention for buffer in layer.held]
        return [own.clone() for own in [*keys, *(buffer[slot] for layer in self._recurrent for buffer in layer.states)]]

    def load(self, slot: int, saved: Sequence[Tensor], length: int, written: int) -> None:
        """Fill a slot with the first tokens of what `save` has copied when so many were written."""
        states = iter(saved)
        for layer in self._attention:
            columns = layer.taken(length, written)
            for buffer in layer.held:
                buffer[slot, :, :columns] = next(states)[:, :columns]
        for layer in self._recurrent:
            for buffer in layer.states:
                buffer[slot] = next(states)

    def holds(self, length: int, written: int) -> bool:
        """Tell whether a row can go on from a length other than its own, when tokens up to `written` were written."""
        return length == 0 or (not self._recurrent and all(layer.holds(length, written) for layer in self._attention))

    def begin(self, span: Span) -> None:
        """Take in what is read next."""
        for layer in [*self._attention, *self._recurrent]:
            layer.begin(span)

    def masks(self) -> Tensor | dict[str, Tensor] | None:
        """Return the masks of what is read next, as models take them: by pattern where there are several.

        None where what models make of nothing is right.
        """
        by_kind = {layer.kind: layer for layer in self._attention}
        if all(layer.is_plain for layer in by_kind.values()):
            return None
        masks = {kind: self._mask(layer) for kind, layer in by_kind.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, layer: KeysAndValues) -> Float[Tensor, "row 1 position column"]:
        """Return what is added to scores; from true or false, every layer would make it anew."""
        seen = layer.seen()
        return torch.zeros_like(seen, dtype=self._dtype).masked_fill_(~seen, torch.finfo(self._dtype).min)


_SAMPLES: WeakKeyDictionary[PreTrainedModel, DynamicCache] = WeakKeyDictionary()


@torch.inference_mode()
def make_row_cache(backbone: Backbone) -> RowCache:
    """Make an empty cache for a model.

    The shapes of what its layers keep are those that reading one token shows, once a model.

    Raises:
        CoterieError: when a layer keeps something of an unknown kind.
    """
    model = backbone.model
    if model not in _SAMPLES:
        cache = DynamicCache(config=model.config)
        backbone.hidden(torch.zeros(1, 1, dtype=torch.long, device=backbone.device), cache=cache)
        _SAMPLES[model] = cache
    config = model.config.get_text_config()
    ringed = backbone.reads.ragged
    layers = [_make_layer(layer, config, whole=not ringed) for layer in _SAMPLES[model].layers]
    return RowCache(layers, model.dtype)


def _make_layer(sample: Any, config: PreTrainedConfig, *, whole: bool) -> Any:  # noqa: ANN401 - transformers' kinds
    """Make a layer of our own for one of transformers'; `whole` keeps all tokens where only the last ones are seen."""
    kind = type(sample)
    if kind is DummyLayer:
        return sample
    if kind is LinearAttentionLayer:
        return States(sample)
    window = getattr(sample, "sliding_window", None)
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ()) or (
        getattr(config, "attention_chunk_size", None) is not None
    )
    pattern = FULL if window is None else CHUNKED if chunked else SLIDING
    window = None if whole else window
    if kind in (DynamicLayer, DynamicSlidingWindowLayer):
        return KeysAndValues(sample, pattern, window)
    if kind in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        return KeysValuesAndStates(sample, pattern, window)
    raise CoterieError(f"it keeps what it has read in a way of its own ({kind.__name__})")
