"""Prompts described by what the base model's prefill computes anyway: hidden states behind one of its blocks.

They tell which model will be good at a prompt better than its meaning does (arXiv 2603.20895), for one forward pass and
no backward one.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coterie import ranks
from coterie.backbone.loading import Backbone
from coterie.data.batching import TokenRow, by_length, pad
from coterie.data.devices import on_device
from coterie.errors import CoterieError

Pooling = Literal["mean", "last"]
"""The mean over what the user wrote, or the state of the prompt's last token, which has read all of it."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
BATCH_ROWS = 16


class PrefillStates:
    """Turns prompts into hidden states behind one block, pooled in one way."""

    name = "prefill"

    def __init__(self, backbone: Backbone, layer: int, pooling: Pooling) -> None:
        """Choose block and pooling.

        Raises:
            CoterieError: for a block that the model does not have.
        """
        if not 1 <= layer <= len(backbone.blocks):
            raise CoterieError(f"this model has blocks 1 to {len(backbone.blocks)}, and none {layer}; fit again")
        self.dimensions: int = backbone.model.config.get_text_config().hidden_size
        self._backbone, self._layer, self._place = backbone, layer, POOLINGS.index(pooling)

    def rows(self, rows: Sequence[TokenRow]) -> Float[Tensor, "row width"]:
        """Return the states of prompts, in float32 on the CPU."""
        return prefill_states(self._backbone, rows, [self._layer])[:, 0, self._place]


def candidate_layers(backbone: Backbone) -> list[int]:
    """Return the blocks among which a router chooses: a quarter, half, three quarters of the way, and the last one.

    Raises:
        CoterieError: when the model's blocks are not known.
    """
    depth = len(backbone.blocks)
    if not depth:
        raise CoterieError("this model's blocks are not known, so there are no states to route by; use loss-routing")
    return sorted({max(1, round(depth * share / 4)) for share in range(1, 5)})


@torch.no_grad()
def prefill_states(
    backbone: Backbone, rows: Sequence[TokenRow], layers: Sequence[int]
) -> Float[Tensor, "row layer pooling width"]:
    """Return the states of prompts behind several blocks, counted from 1, in every pooling; one forward pass for all.

    A prompt without any of the user's own text has zeros for their mean. Several processes share the prompts.
    """
    width = backbone.model.config.get_text_config().hidden_size
    result = torch.zeros(len(rows), len(layers), len(POOLINGS), width)
    for numbers in ranks.share(by_length(rows, BATCH_ROWS)):
        if not numbers:
            backbone.take_part()
            continue
        batch = pad([rows[i].ids for i in numbers], backbone.pad_id, device=backbone.device)
        shares = torch.zeros(batch.input_ids.shape)
        for number, i in enumerate(numbers):
            wrote = torch.tensor(rows[i].is_user_text, dtype=torch.float)
            shares[number, : len(wrote)] = wrote / wrote.sum().clamp(min=1)
        counted, every = on_device(shares, backbone.device), torch.arange(len(numbers), device=backbone.device)
        last = on_device([len(rows[i].ids) - 1 for i in numbers], backbone.device)
        behind = _behind(backbone, [backbone.blocks[layer - 1] for layer in layers], batch)
        means = [torch.einsum("rp,rpw->rw", counted, states.float()) for states in behind]
        pairs = zip(means, behind, strict=True)
        pooled = [torch.stack([mean, states[every, last].float()], dim=1) for mean, states in pairs]
        result[numbers] = torch.stack(pooled, dim=1).cpu()
    return ranks.summed(result)


def _behind(backbone: Backbone, blocks: Sequence[nn.Module], batch: Any) -> list[Float[Tensor, "row position width"]]:  # noqa: ANN401 - a Batch's fields
    """Run the model and return what comes out of these blocks."""
    kept: dict[nn.Module, Tensor] = {}

    def keep(block: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401 - blocks return tensors or tuples
        kept[block] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(keep).remove)
        backbone.hidden(*batch)
    return [kept[block] for block in blocks]
