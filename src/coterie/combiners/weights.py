"""Experts meet in the weights: one merged adapter for every distinct row of weights, one forward pass."""

import torch

from coterie.backbone.row_mix import EXACT, RequestRows
from coterie.combiners.base import Combiner
from coterie.lora import check_merge
from coterie.routers.base import Routing


class WeightCombiner(Combiner):
    """Runs each prompt through one adapter merged from all, exactly by default; anew whenever its weights change.

    Exact merging equals mixing in the layers, and is computed there, where no adapter has to be made. The other ways
    are approximations that are in use elsewhere (`factors` is ELREA's "MoE Merging"); `ExpertLayers.merge_error` tells
    how far off they are.
    """

    finest = "step"

    def __init__(self, how: str = EXACT) -> None:
        """Store the way to merge: exact, factors, peft-linear, peft-0.4-linear, svd or svd:R.

        Raises:
            CoterieError: for another one.
        """
        check_merge(how)
        self._how = how
        self.approximates = None if how == EXACT else how
        self.kind = f"weights:{how}" if self.approximates else "weights"

    def plan(self, routing: Routing) -> list[RequestRows]:
        """One row for every request."""
        return [RequestRows(weights, torch.ones(1), merge=self._how) for weights in routing.weights.float().split(1)]
