"""Features of texts, and of texts that grow token by token, for routing that follows them (Belofsky 2023)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.data.batching import TokenRow
from coterie.features.embedding import Encoder, HiddenStateEncoder


class GrowingFeatures(ABC):
    """A batch of texts and what is read off them, while answers are written below their prompts."""

    @abstractmethod
    def features(self) -> Any:
        """Read every text as far as it is known."""

    def append(self, tokens: Sequence[Sequence[int]]) -> None:  # noqa: B027
        """Append tokens to every text, before the model's forward pass over them; by default they do not count."""

    def append_states(self, states: Float[Tensor, "row position width"]) -> None:  # noqa: B027
        """Append the last hidden states of the model's last forward pass; by default they do not count."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these texts; one that is named twice becomes two."""


@dataclass
class WholeTexts(GrowingFeatures):
    """Texts that are read anew, as a whole, whenever they are asked for: what a bidirectional encoder needs.

    Attributes:
        read: turns rows into features.
        rows: the texts so far, at first the prompts.
    """

    read: Callable[[Sequence[TokenRow]], Any]
    rows: Sequence[TokenRow]

    def features(self) -> Any:
        """Read every text so far, the whole batch at once."""
        return self.read(self.rows)

    def append(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append tokens to every text."""
        self.rows = [row.extended(own) for row, own in zip(self.rows, tokens, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these texts."""
        self.rows = [self.rows[row] for row in rows]


class AveragedStates(GrowingFeatures):
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

    def append_states(self, states: Float[Tensor, "row position width"]) -> None:
        """Append the states, and forget those that the window has left behind."""
        pairs = zip(self._states, states, strict=True)
        self._states = [torch.cat([held.to(new), new])[-self._encoder.window :] for held, new in pairs]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these texts."""
        self._states = [self._states[row] for row in rows]


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """Turns prompts into features, and knows what it was made from.

    Attributes:
        name: gradient, embedding or growing-text.
        extract: turns prompts into features (row, dimension), not necessarily of unit length.
        record: what it was made from, for mixture.json.
        encoder: where features are embeddings: what embeds.
    """

    name: str
    extract: Callable[[Sequence[TokenRow]], Tensor]
    record: Mapping[str, Any]
    encoder: Encoder | None = None

    @property
    def dimensions(self) -> int:
        """Of a feature."""
        return self.encoder.dimensions if self.encoder else self.record["features"]["d_proj"]

    def __call__(self, prompts: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Extract the features of prompts, in float32 on the CPU."""
        return self.extract(prompts).float().cpu()
