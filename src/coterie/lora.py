"""The arithmetic of LoRA on plain tensors.

Letters in shapes: E experts, R rank, I inputs and O outputs of a linear layer, N rows, T positions. An update is
`up.T @ down` here: `down` is PEFT's A (R, I); `up` is the transpose of PEFT's B (O, R) with the scaling alpha / r
already in it, so that no caller can forget it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class LoraPair(NamedTuple):
    """One layer's update: `x -> (x @ down.T) @ up`, with the scaling inside `up`."""

    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "rank out"]


Adapter = Mapping[str, LoraPair]
"""Module path in the base model -> that layer's update. A layer that is absent is not changed."""


class StackedPair(NamedTuple):
    """The updates of E experts for one layer, padded with zeros to one rank: padding adds exact zeros."""

    down: Float[Tensor, "expert rank in"]
    up: Float[Tensor, "expert rank out"]


def delta(pair: LoraPair) -> Float[Tensor, "out in"]:
    """Return the dense update of one layer, to be added to its weight (O, I)."""
    return pair.up.T @ pair.down


def stack(pairs: Sequence[LoraPair | None]) -> StackedPair:
    """Stack one layer's updates over experts; an expert without one (None) gets zeros.

    Shapes: E pairs (R_e, I), (R_e, O) -> (E, max R, I), (E, max R, O).

    Raises:
        ValueError: when no expert changes the layer.
    """
    present = [pair for pair in pairs if pair is not None]
    if not present:
        raise ValueError("no expert changes this layer")
    rank = max(pair.down.shape[0] for pair in present)
    like = present[0]
    down = like.down.new_zeros(len(pairs), rank, like.down.shape[1])
    up = like.up.new_zeros(len(pairs), rank, like.up.shape[1])
    for expert, pair in enumerate(pairs):
        if pair is not None:
            down[expert, : pair.down.shape[0]] = pair.down
            up[expert, : pair.up.shape[0]] = pair.up
    return StackedPair(down, up)


def apply_by_expert(
    x: Float[Tensor, "row position in"], pair: StackedPair, counts: Sequence[int]
) -> Float[Tensor, "row position out"]:
    """Apply each row's own expert; rows are ordered by expert, `counts[e]` of them for expert e.

    Equal counts take two batched products for all experts together; unequal ones take two small products an expert.
    """
    rows, positions, width = x.shape
    if len(set(counts)) == 1:
        grouped = x.reshape(len(counts), -1, width)  # [E, N/E * T, I]
        return torch.bmm(torch.bmm(grouped, pair.down.mT), pair.up).reshape(rows, positions, -1)
    parts = [
        part @ down.T @ up
        for part, down, up in zip(x.split(list(counts)), pair.down, pair.up, strict=True)
        if len(part)
    ]
    return torch.cat(parts)


def apply_weighted(
    x: Float[Tensor, "row position in"],
    pair: StackedPair,
    weights: Float[Tensor, "row #position expert"],  # noqa: F821
) -> Float[Tensor, "row position out"]:
    """Apply the exact mixture sum_e w_e up_e.T down_e, with weights of its own for every row (and position).

    All `down` stand in one product, the weights act in rank space, all `up` stand in one product: the cost grows
    with the sum of ranks, and no tensor of size rows x experts x outputs exists.
    """
    experts, rank, _ = pair.down.shape
    ranks = (x @ pair.down.flatten(0, 1).T).unflatten(-1, (experts, rank))  # [N, T, E, R]
    return (ranks * weights.unsqueeze(-1).to(x.dtype)).flatten(-2) @ pair.up.flatten(0, 1)


def merge(pairs: StackedPair, weights: Float[Tensor, " expert"]) -> LoraPair:
    """Return the single pair equal to the weighted sum of all: stack the ranks, scale one side only.

    Adding the `down`s and the `up`s separately would bring in every cross term up_i.T @ down_j.
    """
    scaled = pairs.up * weights[:, None, None].to(pairs.up.dtype)
    return LoraPair(down=pairs.down.flatten(0, 1), up=scaled.flatten(0, 1))
