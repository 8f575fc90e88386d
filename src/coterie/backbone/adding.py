"""Linear layers that give more than their own product, for the length of a `with`.

The `forward` of every layer is swapped for one that adds to it, and swapped back at the end: no hooks, and no weight is
written to. Whatever shape a model gives a layer's input, what is added sees one vector for every token that is read.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.backbone.linear_layers import linear_layers
from coterie.backbone.products import few_row_forwards
from coterie.errors import CoterieError

Adder = Callable[[Tensor, Tensor], Tensor]
"""What a layer gives and what it reads, (row, position, out) and (row, position, in), to what it is to give instead.

What it gives may be changed in place where no gradient is wanted.
"""

_IN_USE: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


@contextmanager
def swapped(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Context manager: call these in place of the modules' own `forward`."""
    before = {module: module.__dict__.get("forward") for module in forwards}  # others may have given it one of its own
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


class Adding:
    """Adds to what the linear layers of a model give, inside a `with`; one at a time on a model, in one thread."""

    def __init__(self, model: PreTrainedModel, adders: Mapping[str, Adder]) -> None:
        """Take in what is added to each layer, by module path."""
        self._model = model
        self._adders = adders

    @cached_property
    def _reading(self) -> "_Reading":
        return _Reading(self._model.get_input_embeddings())

    @cached_property
    def _forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """What is called in place of the modules' own; made when nobody else has swapped these."""
        layers, reading = linear_layers(self._model), self._reading
        forwards = few_row_forwards(list(layers.values()))
        for path, add in self._adders.items():
            layer = layers[path]
            forwards[layer] = _Added(path, forwards.get(layer, layer.forward), add, reading).forward
        return {self._model.get_input_embeddings(): reading.forward, **forwards}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context manager: let the layers give more.

        Raises:
            CoterieError: when others already run on this model, in this thread or in another one.
        """
        lock = _IN_USE.setdefault(self._model, threading.Lock())
        if not lock.acquire(blocking=False):
            raise in_use()
        try:
            self._reading.thread = threading.get_ident()
            with swapped(self._forwards):
                yield
        finally:
            lock.release()


class ModelInUse(CoterieError):
    """Others already run on the base model."""


def in_use() -> ModelInUse:
    """Return the error of whoever finds a base model in use."""
    return ModelInUse(
        "the base model is in use by other experts, in this thread or in another one; let them end first, or load it a "
        "second time"
    )


class _Reading:
    """Notes how many rows and positions the model reads, at its input embeddings."""

    def __init__(self, embedding: nn.Module) -> None:
        self.thread = 0
        self.size = (0, 0)
        self._base = embedding.forward

    def forward(self, ids: Tensor) -> Tensor:
        """Embed, and note."""
        if not torch.compiler.is_compiling() and threading.get_ident() != self.thread:
            raise in_use()
        states = self._base(ids)
        self.size = (states.shape[0], states.shape[1])
        return states


class _Added:
    """A linear layer with what is added to it."""

    def __init__(self, path: str, base: Callable[..., Any], add: Adder, reading: _Reading) -> None:
        self._path, self._base, self._add, self._reading = path, base, add, reading

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Return the layer's product and what is added to it."""
        product = self._base(x)
        if not isinstance(product, Tensor) or product.shape[:-1] != x.shape[:-1]:
            raise unchangeable(self._path, "returns something else than one product")
        size = self._reading.size
        if x.shape[:-1] == size:
            return self._add(product, x)
        parts = (by_token(self._path, tensor, *size) for tensor in (product, x))
        return self._add(*parts).reshape(product.shape)


def by_token(
    path: str, x: Float[Tensor, "... width"], rows: int, positions: int
) -> Float[Tensor, "row position width"]:
    """Return what a layer reads, or gives, with one vector for every token of the batch that the model is reading.

    Models also give a layer all tokens in one row (OPT, shared experts), or put an axis between (multi-head latent
    attention).

    Raises:
        CoterieError: when there is not one vector a token, so that nobody can tell which row a vector belongs to.
    """
    if x.dim() > 2 and x.shape[0] == rows:  # latent attention: the keys of all that was read, made anew at every token
        return x.reshape(rows, -1, x.shape[-1])
    if x.shape[:-1].numel() != rows * positions:
        raise unchangeable(path, f"reads {x.shape[:-1].numel()} vectors where there are {rows} x {positions} tokens")
    return x.reshape(rows, positions, x.shape[-1])


def unchangeable(path: str, reason: str) -> CoterieError:
    """Return the error of a layer that experts cannot change."""
    return CoterieError(f"experts cannot change the layer {path}, which {reason}; use adapters without it")
