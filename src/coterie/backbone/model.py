"""A frozen base model: what it computes, up to the states that its output layer reads and from there to logits."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class BaseModelIdentity:
    """Which base model it is: the name it was loaded by, a hub revision, and the hash of its weight files."""

    id: str
    revision: str | None
    sha256: str


@dataclass(frozen=True)
class Backbone:
    """A frozen base model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseModelIdentity

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings, where token ids go."""
        return next(self.model.get_input_embeddings().parameters()).device

    @property
    def output_layer(self) -> nn.Linear:
        """The layer from hidden states to logits."""
        layer = self.model.get_output_embeddings()
        assert isinstance(layer, nn.Linear)  # a causal language model has one
        return layer

    def hidden(
        self,
        input_ids: Int[Tensor, "row position"],
        attention_mask: Int[Tensor, "row total"] | None = None,
        position_ids: Int[Tensor, "row position"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "row position width"]:
        """Run the model up to the state that its output layer reads."""
        return self.model.get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def head(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Turn hidden states into next-token logits, in float32, with the scaling or cap that the model has."""
        config = self.model.config.get_text_config()
        logits = self.output_layer(hidden.to(self.output_layer.weight.dtype)).float()
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (factor := getattr(config, "logit_scale", None)) is not None:
            logits = logits * factor
        if (cap := self.logit_cap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def logit_cap(self) -> float | None:
        """The soft cap on logits (Gemma 2 has one); without it, logits are linear in the hidden state."""
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The stack of transformer blocks, first to last."""
        count = self.model.config.get_text_config().num_hidden_layers
        lists = (m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        return next(lists)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        return frozenset([*ids, self.tokenizer.eos_token_id]) - {None}
