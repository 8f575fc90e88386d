"""Experts meet inside every linear layer: the LoRA branches are summed there, in one forward pass."""

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.layers import Weighted
from coterie.combiners.base import RowPlan


class LayerCombiner:
    """Adds sum_e w_e s_e B_e A_e x to every layer's output, with each prompt's own weights, as they are.

    One row a prompt, whatever the number of experts (ELREA's "MoE Routing", where weights are normalised first).
    """

    kind = "layers"
    axes = frozenset({"request", "expert"})

    def plan(self, weights: Float[Tensor, "prompt expert"]) -> RowPlan:
        """One row for every prompt, mixed by its weights."""
        count = len(weights)
        return RowPlan(tuple(range(count)), Weighted(weights.float()[:, None, :]), torch.eye(count))
