"""Prompts described by what the base model's prefill computes anyway: hidden states behind one of its blocks.

They tell which model will be good at a prompt better than its meaning does (arXiv 2603.20895), for one forward pass and
no backward one.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

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

_last_pass: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], list[TokenRow], Tensor]] = WeakKeyDictionary()
"""Of each model the blocks and prompts that were read last, and their states: a router and its refusal share a pass."""


class PrefillStates:
    """Turns prompts into hidden states behind one block, pooled in one way."""

    name = "prefill"

    def __init__(self, backbone: Backbone, layer: int, pooling: Pooling) -> None:
        """Choose block and pooling.

        Raises:
            CoterieError: for a block that the model does not have.
        """
        _check_block(backbone, layer)
        self.dimensions: int = backbone.model.config.get_text_config().hidden_size
        self._backbone, self._layer, self._place = backbone, layer, POOLINGS.index(pooling)

    def rows(self, rows: Sequence[TokenRow]) -> Float[Tensor, "row width"]:
        """Return the states of prompts, in float32 on the CPU."""
        return _of_one_pass(self._backbone, rows, [self._layer])[:, 0, self._place]


class MiddleStates:
    """Turns prompts into hidden states of the middle of the model, in every pooling: which kind of text a prompt is.

    States nearer to the input tell words, and those nearer to the output tell what comes next.
    """

    name = "middle-states"

    def __init__(self, backbone: Backbone, layers: Sequence[int]) -> None:
        """Choose blocks: those of `middle_layers`, or those that were chosen when something was fitted.

        Raises:
            CoterieError: for a block that the model does not have.
        """
        for layer in layers:
            _check_block(backbone, layer)
        width: int = backbone.model.config.get_text_config().hidden_size
        self.dimensions = len(layers) * len(POOLINGS) * width
        self._backbone, self._layers = backbone, list(layers)

    def rows(self, rows: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Return the states of prompts, each of unit length, side by side, in float32 on the CPU."""
        return side_by_side(_of_one_pass(self._backbone, rows, self._layers))


def side_by_side(states: Float[Tensor, "row layer pooling width"]) -> Float[Tensor, "row dimension"]:
    """Return states each of unit length, side by side: the cosine of two rows is the mean of those of their states."""
    return torch.nn.functional.normalize(states, dim=-1).flatten(1)


def candidate_layers(backbone: Backbone) -> list[int]:
    """Return the blocks among which a router chooses: a quarter, half, three quarters of the way, and the last one.

    Raises:
        CoterieError: when the model's blocks are not known.
    """
    return sorted({_block_at(backbone, share) for share in (0.25, 0.5, 0.75, 1.0)})


def middle_layers(backbone: Backbone) -> list[int]:
    """Return the blocks that tell which kind of text a prompt is: half and three quarters of the way.

    Raises:
        CoterieError: when the model's blocks are not known.
    """
    return sorted({_block_at(backbone, share) for share in (0.5, 0.75)})


def _block_at(backbone: Backbone, share: float) -> int:
    if not (depth := len(backbone.blocks)):
        raise CoterieError("this model's blocks are not known, so there are no states to route by; use elrea")
    return max(1, round(depth * share))


def _check_block(backbone: Backbone, layer: int) -> None:
    if not 1 <= layer <= len(backbone.blocks):
        raise CoterieError(f"this model has blocks 1 to {len(backbone.blocks)}, and none {layer}; fit again")


def _of_one_pass(
    backbone: Backbone, rows: Sequence[TokenRow], layers: Sequence[int]
) -> Float[Tensor, "row layer pooling width"]:
    """Return the states behind these blocks, from the pass that read the same prompts last, if there was one."""
    blocks, prompts, states = _last_pass.get(backbone.model, ((), [], torch.empty(0)))
    same = len(prompts) == len(rows) and all(own is other for own, other in zip(prompts, rows, strict=True))
    if not (same and set(layers) <= set(blocks)):
        blocks = tuple(sorted({*candidate_layers(backbone), *layers}))
        states = prefill_states(backbone, rows, blocks)
        _last_pass[backbone.model] = (blocks, list(rows), states)
    return states[:, [blocks.index(layer) for layer in layers]]


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
