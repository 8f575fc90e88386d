"""Experts meet inside every linear layer: the LoRA branches are summed there, in one forward pass."""

import torch

from coterie.backbone.row_mix import Gated, RequestRows
from coterie.combiners.base import Combiner
from coterie.routers.base import Routing


class LayerCombiner(Combiner):
    """Adds sum_e w_e s_e B_e A_e x to every layer's output, with each prompt's (or token's) own weights, as they are.

    One row a prompt, whatever the number of experts (ELREA's "MoE Routing", where weights are normalised first, and its
    MoLE, where each layer's gate weighs each token).
    """

    kind = "layers"
    finest = "layer"

    def plan(self, routing: Routing) -> list[RequestRows]:
        """One row for every request, mixed by its weights or by gates."""
        gates = routing.gates
        gated = Gated(tuple(map(routing.experts.index, gates.experts)), gates) if gates else None
        return [RequestRows(weights, torch.ones(1), gated) for weights in routing.weights.float().split(1)]
