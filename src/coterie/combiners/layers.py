"""Experts meet inside every linear layer: the LoRA branches are summed there, in one forward pass."""

import torch

from coterie.backbone.layers import Choice, Gated, Weighted
from coterie.combiners.base import Combiner, RowPlan
from coterie.routers.base import Routing


class LayerCombiner(Combiner):
    """Adds sum_e w_e s_e B_e A_e x to every layer's output, with each prompt's (or token's) own weights, as they are.

    One row a prompt, whatever the number of experts (ELREA's "MoE Routing", where weights are normalised first, and its
    MoLE, where each layer's gate weighs each token).
    """

    kind = "layers"
    finest = "layer"

    def plan(self, routing: Routing) -> RowPlan:
        """One row for every prompt, mixed by its weights; experts without any weight are not computed."""
        if routing.gates:
            choice: Choice = Gated(tuple(map(routing.experts.index, routing.gates.experts)), routing.gates)
        else:
            used = (routing.weights > 0).any(dim=0)
            experts = tuple(used.nonzero().flatten().tolist())
            choice = Weighted(experts, routing.weights[:, None, list(experts)].float())
        count = len(routing.weights)
        return RowPlan(tuple(range(count)), choice, torch.eye(count))
