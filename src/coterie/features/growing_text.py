"""Features of texts, and of texts that grow token by token, for routing that follows them (Belofsky 2023)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.data.batching import TokenRow
from coterie.features.embedding import HiddenStateEncoder


@runtime_checkable
class GrowingFeatures(Protocol):
    """A batch of texts and what is read off them, while answers are written below their prompts."""

    def features(self) -> Any:
        """Read every text as far as it is known."""
        ...

    def append(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append tokens to every text (called before the model's forward pass over them)."""
        ...

    def append_states(self, states: Float[Tensor, "row position width"]) -> None:
        """Append the model's last hidden states at the tokens of its last forward pass."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all texts but these."""
        ...


class WholeTexts:
    """Texts that are read anew, as a whole, whenever they are asked for: what a bidirectional encoder needs."""

    def __init__(self, read: Callable[[Sequence[TokenRow]], Any], prompts: Sequence[TokenRow]) -> None:
        """Start with prompts; `read` turns rows into features."""
        self._read = read
        self._rows = list(prompts)

    def features(self) -> Any:
        """Read every text so far, the whole batch at once."""
        return self._read(self._rows)

    def append(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append tokens to every text."""
        self._rows = [row.extended(own) for row, own in zip(self._rows, tokens, strict=True)]

    def append_states(self, states: Float[Tensor, "row position width"]) -> None:
        """Do nothing: the text is all that counts."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all texts but these."""
        self._rows = [self._rows[row] for row in rows]


class AveragedStates:
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

    def append(self, tokens: Sequence[Sequence[int]]) -> None:
        """Do nothing: a token counts by its state."""

    def append_states(self, states: Float[Tensor, "row position width"]) -> None:
        """Append the states, and forget those that the window has left behind."""
        pairs = zip(self._states, states, strict=True)
        self._states = [torch.cat([held.to(new), new])[-self._encoder.window :] for held, new in pairs]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all texts but these."""
        self._states = [self._states[row] for row in rows]


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """Turns prompts into features, and knows what it was made from.

    Attributes:
        name: gradient, embedding or growing-text.
        extract: turns prompts into features (row, dimension), not necessarily of unit length.
        record: what it was made from, for mixture.json.
        growing: follows prompts whose answers are written; None: the features are extracted again from the whole text.
    """

    name: str
    extract: Callable[[Sequence[TokenRow]], Tensor]
    record: Mapping[str, Any]
    growing: Callable[[Sequence[TokenRow]], GrowingFeatures] | None = None

    def __call__(self, prompts: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Extract the features of prompts, in float32 on the CPU."""
        return self.extract(prompts).float().cpu()

    def follow(self, prompts: Sequence[TokenRow]) -> GrowingFeatures:
        """Extract the features of prompts, and go on while their answers are written."""
        return self.growing(prompts) if self.growing else WholeTexts(self, prompts)
