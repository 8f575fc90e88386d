"""Features of texts, and of texts that grow token by token, for routing that follows them (Belofsky 2023)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.data.batching import TokenRow
from coterie.features.embedding import Encoder, HiddenStateEncoder
from coterie.features.prefill import MiddleStates, PrefillStates


class GrowingFeatures(ABC):
    """What is read off texts while answers are written below their prompts.

    A text is a value: nothing here changes one, so it can be copied by its name, forgotten, and gone back to.
    """

    @abstractmethod
    def begin(self, prompts: Sequence[TokenRow]) -> list[Any]:
        """Return the text of each prompt."""

    @abstractmethod
    def features(self, texts: Sequence[Any]) -> Any:
        """Read texts as far as they are known, together."""

    def append(self, text: Any, tokens: Sequence[int]) -> Any:
        """Return the text with further tokens, before the model's forward pass over them; by default as it is."""
        return text

    def append_states(self, text: Any, states: Float[Tensor, "position width"]) -> Any:
        """Return the text with the last hidden states of the model at its newest tokens; by default as it is."""
        return text


@dataclass(frozen=True)
class WholeTexts(GrowingFeatures):
    """Texts that are read anew, as a whole, whenever they are asked for: what a bidirectional encoder needs.

    Attributes:
        read: turns rows into features.
    """

    read: Callable[[Sequence[TokenRow]], Any]

    def begin(self, prompts: Sequence[TokenRow]) -> list[TokenRow]:
        """Return the prompts: a text is its tokens."""
        return list(prompts)

    def features(self, texts: Sequence[TokenRow]) -> Any:
        """Read every text so far."""
        return self.read(texts)

    def append(self, text: TokenRow, tokens: Sequence[int]) -> TokenRow:
        """Append tokens."""
        return text.extended(tokens)


@dataclass(frozen=True)
class AveragedStates(GrowingFeatures):
    """Texts whose embedding is the mean of hidden states that the running model computes anyway.

    A prompt's states come from the base model alone, those of the answer from the model as it runs, experts included:
    no forward pass is spent on them. A token counts once the model has read it, which is one step after it was chosen.
    """

    encoder: HiddenStateEncoder

    def begin(self, prompts: Sequence[TokenRow]) -> list[Float[Tensor, "_ width"]]:
        """Read prompts in one forward pass of the base model: a text is the states of its tokens."""
        return self.encoder.states(prompts)

    def features(self, texts: Sequence[Float[Tensor, "_ dimension"]]) -> Float[Tensor, "row dimension"]:
        """Average the states of the last tokens of every text, as many as the encoder's window has."""
        return self.encoder.means(texts)

    def append_states(
        self, text: Float[Tensor, "position width"], states: Float[Tensor, "new width"]
    ) -> Float[Tensor, "kept width"]:
        """Append the states, and leave out those that the window has left behind."""
        return torch.cat([text.to(states), states])[-self.encoder.window :]


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """Turns prompts into features, and knows what it was made from.

    Attributes:
        name: gradient, embedding, prefill, middle-states or growing-text.
        extract: turns prompts into features (row, dimension), not necessarily of unit length.
        record: what it was made from, for mixture.json.
        encoder: where features are embeddings or states: what makes them.
    """

    name: str
    extract: Callable[[Sequence[TokenRow]], Tensor]
    record: Mapping[str, Any]
    encoder: Encoder | PrefillStates | MiddleStates | None = None

    @property
    def dimensions(self) -> int:
        """Of a feature."""
        return self.encoder.dimensions if self.encoder else self.record["features"]["d_proj"]

    @property
    def key(self) -> Hashable:
        """What it was made from: extractors of the same give the same features."""
        return self.name, repr(sorted(self.record.items()))

    def __call__(self, prompts: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Extract the features of prompts, in float32 on the CPU."""
        return self.extract(prompts).float().cpu()
