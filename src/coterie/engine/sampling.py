"""Choosing the next token of one request from its combined logits, with transformers' own processors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coterie.settings.groups import SamplingSettings


class Sampler:
    """Chooses tokens for one request; its random numbers depend on its seed alone, not on its batch."""

    def __init__(self, settings: SamplingSettings) -> None:
        """Build the processors in the order that `generate` of transformers uses."""
        self.greedy = settings.temperature == 0
        self._processors = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self.greedy:
            if settings.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k > 0:
                self._processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self._processors.append(TopPLogitsWarper(settings.top_p))
            self._generator = torch.Generator().manual_seed(settings.seed)
        self.plain = self.greedy and not self._processors
        """Whether the token is just the argmax, so that a whole batch can be chosen at once."""

    def choose(self, logits: Float[Tensor, " vocabulary"], text: Int[Tensor, " position"]) -> int:
        """Choose a token, given the request's tokens so far (prompt included, no padding)."""
        scores = self._processors(text[None].long().to(logits.device), logits[None])[0]  # pyrefly: ignore
        if self.greedy:
            return int(scores.argmax())
        probabilities = scores.softmax(dim=-1).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
