"""A KV cache that grows in place instead of copying itself at every token, and whose rows can be selected."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

HEADROOM = 64  # positions added beyond what is needed, and a quarter of the length on top


class RoomyLayer(DynamicLayer):
    """Keys and values as views into buffers with room to spare; `DynamicLayer` concatenates, copying all of it.

    Whatever else replaces the keys (selecting or reordering rows, cropping) leaves the buffers behind: they are made
    anew when the next states come.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start empty, with the shapes and type of the first states."""
        super().lazy_initialization(key_states, value_states)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._view: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the states (row, head, position, width) and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        if self._buffers is None or self.keys is not self._view or total > self._buffers[0].shape[-2]:
            self._buffers = (self._grown(self.keys, key_states, total), self._grown(self.values, value_states, total))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., length:total, :] = states
        self.keys, self.values = (buffer[..., :total, :] for buffer in self._buffers)
        self._view = self.keys
        return self.keys, self.values

    @staticmethod
    def _grown(held: Tensor | None, new: Tensor, total: int) -> Tensor:
        rows, heads, _, width = new.shape
        buffer = new.new_empty(rows, heads, total + HEADROOM + total // 4, width)
        if held is not None and held.numel():
            buffer[..., : held.shape[-2], :] = held
        return buffer


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """Make an empty cache for a model; layers with a sliding window or a state of their own stay as the model wants."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: Cache, rows: Sequence[int], device: torch.device) -> None:
    """Keep these rows of all that a cache holds, in this order; states of convolutions and recurrences too.

    This is beam search's reordering, which every kind of layer knows; `batch_select_indices` forgets such states.
    """
    index: Any = torch.tensor(rows, device=device)  # declared as a LongTensor, which no tensor is to a type checker
    cache.reorder_cache(index)
