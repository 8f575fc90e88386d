"""A frozen base model: what it computes, up to the states that its output layer reads and from there to logits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from coterie.backbone.int8 import Int8Linear
from coterie.backbone.products import few_row_forwards


@dataclass(frozen=True)
class BaseModelIdentity:
    """Which base model it is: the name that it was loaded by, and what it computes with.

    Attributes:
        id: its name.
        revision: on the hub.
        sha256: of the weight files.
        config_sha256: of what its configuration says about their use; None where that follows from the weight file, and
            in folders that are older than this field.
    """

    id: str
    revision: str | None
    sha256: str
    config_sha256: str | None = None


@dataclass(frozen=True)
class Reads:
    """In which ways a model can read on from a cache; the probe at loading finds out.

    Attributes:
        ragged: rows of unequal length side by side, told apart by masks; otherwise rows of one length at a time.
        in_pieces: several tokens at once; otherwise one by one.
    """

    ragged: bool = True
    in_pieces: bool = True


@dataclass(frozen=True)
class Backbone:
    """A frozen base model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseModelIdentity
    reads: Reads = Reads()

    def __repr__(self) -> str:
        """Return what the model is called, how large it is and where it lies."""
        millions = sum(weight.numel() for weight in self.model.parameters()) / 1e6
        kind, dtype = type(self.model).__name__, str(self.model.dtype).removeprefix("torch.")
        dtype += ", linear layers in int8" if any(isinstance(m, Int8Linear) for m in self.model.modules()) else ""
        return f"Backbone({self.identity.id}: {kind}, {millions:,.1f}M parameters, {dtype}, {self.device})"

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

    @property
    def decoder(self) -> nn.Module:
        """All of the model that stands before its output layer."""
        decoder = self.model.get_decoder()
        return self.model.model if decoder is self.model else decoder  # Llama 4's text model finds only itself

    @cached_property
    def pad_id(self) -> int:
        """A token to fill rows up with; it is masked wherever it stands, so any that has an embedding will do."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None and token < self.embeddings)

    @property
    def embeddings(self) -> int:
        """How many tokens have an embedding; the tokenizer may know more, or fewer."""
        layer: Any = self.model.get_input_embeddings()
        return layer.weight.shape[0]

    def hidden(
        self,
        input_ids: Int[Tensor, "row position"],
        attention_mask: Tensor | Mapping[str, Tensor] | None = None,
        position_ids: Int[Tensor, "row position"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "row position width"]:
        """Run the model up to the state that its output layer reads.

        Masks are (row, total), or (row, 1, position, total) and by pattern of attention, as transformers takes them.
        """
        return self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def take_part(self) -> None:
        """Read one token: a pass for the sake of other processes, which need this one's part of the model in theirs."""
        self.hidden(torch.tensor([[self.pad_id]], device=self.device))

    def head(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """Turn hidden states into next-token logits, in float32, with the scaling or cap that the model has.

        The product is in float32 too, whatever the weights' type: rounded to bfloat16, the two best tokens would be
        equal in one position of twenty. Only where gradients are wanted it is in the weights' own type.
        """
        layer = self.output_layer
        if (hidden.requires_grad and torch.is_grad_enabled()) or layer.weight.dtype not in HALVES:
            packed = layer.weight.dtype.itemsize < 2  # takes any type
            return self.scaled(self._output(hidden if packed else hidden.to(layer.weight.dtype)).float())
        logits = float32_product(hidden.reshape(-1, hidden.shape[-1]), layer.weight).reshape(*hidden.shape[:-1], -1)
        return self.scaled(logits if layer.bias is None else logits + layer.bias.float())

    @cached_property
    def _output(self) -> Callable[[Tensor], Tensor]:
        """The output layer, in the form that is the fastest for few rows."""
        return few_row_forwards([self.output_layer]).get(self.output_layer, self.output_layer)

    def scaled(self, logits: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows vocabulary"]:
        """Apply the scaling or cap that the model has to what its output layer gives."""
        config = self.model.config.get_text_config()
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        for name in ("logit_scale", "lm_head_multiplier"):
            if (factor := getattr(config, name, None)) is not None:
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
        """The stack of transformer blocks, first to last: of the lists that are as long, the one with most weights.

        Empty where no list is.
        """
        count = self.model.config.get_text_config().num_hidden_layers
        lists = (m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
        return max(
            lists, key=lambda blocks: sum(weight.numel() for weight in blocks.parameters()), default=nn.ModuleList()
        )

    @cached_property
    def positions(self) -> int | None:
        """The most tokens of a text, where positions are looked up in a table; None where they never run out.

        Learned positions are an embedding of their own, which OPT begins with two entries for padding; GPT-J keeps a
        table of angles. MPT makes its biases as long as its configuration says.
        """
        config: Any = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if config.model_type == "mpt":
            return config.max_seq_len
        words = self.model.get_input_embeddings()
        embeddings = (m for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not words)
        learned = any(limit is not None and m.num_embeddings in (limit, limit + 2) for m in embeddings)
        buffers = (buffer for buffer in self.model.buffers() if buffer.dim() == 2)
        return limit if learned or any(buffer.shape[0] == limit for buffer in buffers) else None

    def within(self, positions: Int[Tensor, "row position"]) -> Int[Tensor, "row position"]:
        """Return positions that the model has, for padding behind the end of a text, too."""
        return positions if self.positions is None else positions.clamp(max=self.positions - 1)

    @cached_property
    def context(self) -> int | None:
        """The most tokens of a text that the model was made for, where its configuration says so."""
        return self.positions or getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        return frozenset([*ids, self.tokenizer.eos_token_id]) - {None}


HALVES = (torch.bfloat16, torch.float16)
"""Types of two bytes, whose products are too coarse to tell close logits apart."""

ROWS_AT_ONCE = 1024  # of the weight; its float32 copy then stays in the processor's cache


def float32_product(x: Float[Tensor, "row in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "row out"]:
    """Return x @ weight.T in float32 for a weight of two bytes, without a float32 copy of the whole weight.

    On CUDA, one product reads the weight once and adds up in float32; a float32 x goes in as the sum of two numbers of
    the weight's type. Elsewhere the weight is widened part by part, as fast as a product with a float32 weight.
    """
    if x.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        high = x.to(weight.dtype)
        terms = [high] if x.dtype == weight.dtype else [high, (x - high.float()).to(weight.dtype)]
        return torch.mm(torch.cat(terms), weight.T, out_dtype=torch.float32).unflatten(0, (len(terms), -1)).sum(dim=0)
    return torch.cat([nn.functional.linear(x.float(), part.float()) for part in weight.split(ROWS_AT_ONCE)], dim=-1)
