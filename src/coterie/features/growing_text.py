"""Embeddings of texts that grow token by token, for routing that follows them (Belofsky 2023)."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.data.batching import TokenRow
from coterie.features.embedding import Encoder, HiddenStateEncoder


@runtime_checkable
class GrowingTexts(Protocol):
    """A batch of texts with their embeddings, while answers are written below their prompts."""

    def features(self) -> Float[Tensor, "row dimension"]:
        """Embed every text as far as it is known; float32 on the CPU."""
        ...

    def write(self, tokens: Sequence[Sequence[int]]) -> None:
        """Take in the next tokens of every text, before the model reads them."""
        ...

    def observe(self, states: Float[Tensor, "row position width"]) -> None:
        """Take in the model's last hidden states at the tokens that it has just read."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all texts but these."""
        ...


class Rewritten:
    """Texts that are embedded anew, as a whole, whenever they are asked for: what a bidirectional encoder needs."""

    def __init__(self, describe: Callable[[Sequence[TokenRow]], Tensor], prompts: Sequence[TokenRow]) -> None:
        """Start with prompts; `describe` turns rows into features."""
        self._describe = describe
        self._rows = list(prompts)

    def features(self) -> Float[Tensor, "row dimension"]:
        """Embed every text so far, the whole batch at once."""
        return self._describe(self._rows).float().cpu()

    def write(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append the tokens."""
        self._rows = [row.extended(own) for row, own in zip(self._rows, tokens, strict=True)]

    def observe(self, states: Float[Tensor, "row position width"]) -> None:
        """Do nothing: the text is all that counts."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all texts but these."""
        self._rows = [self._rows[row] for row in rows]


class Averaged:
    """Texts whose embedding is the mean of hidden states that the running model computes anyway.

    A prompt's states come from the base model alone, those of the answer from the model as it runs, experts included:
    no forward pass is spent on them. A token counts once the model has read it, which is one step after it was chosen.
    """

    def __init__(self, encoder: HiddenStateEncoder, prompts: Sequence[TokenRow]) -> None:
        """Start with prompts, in one forward pass of the base model."""
        self._encoder = encoder
        self._states = encoder.states(prompts)

    def features(self) -> Float[Tensor, "row dimension"]:
        """Average the states of the last tokens of every text, as many as the encoder's window has."""
        return torch.stack([self._encoder.mean(states) for states in self._states])

    def write(self, tokens: Sequence[Sequence[int]]) -> None:
        """Do nothing: a token counts by its state."""

    def observe(self, states: Float[Tensor, "row position width"]) -> None:
        """Append the states, and forget those that the window has left behind."""
        pairs = zip(self._states, states, strict=True)
        self._states = [torch.cat([held.to(new), new])[-self._encoder.window :] for held, new in pairs]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all texts but these."""
        self._states = [self._states[row] for row in rows]


def follow(encoder: Encoder, prompts: Sequence[TokenRow]) -> GrowingTexts:
    """Follow prompts with an encoder, by the cheapest way that it has."""
    if isinstance(encoder, HiddenStateEncoder):
        return Averaged(encoder, prompts)
    return Rewritten(encoder.rows, prompts)
