"""Experts meet in the weights: one merged adapter for every distinct row of weights, one forward pass."""

import torch

from coterie.backbone.layers import Merged
from coterie.combiners.base import Combiner, RowPlan
from coterie.lora import check_merge
from coterie.routers.base import Routing


class WeightCombiner(Combiner):
    """Runs each prompt through one adapter merged from all, exactly by default; anew whenever its weights change.

    Exact merging equals mixing in the layers. The other ways are approximations that are in use elsewhere (`factors`
    is ELREA's "MoE Merging"); `ExpertLayers.merge_error` tells how far off they are.
    """

    finest = "step"

    def __init__(self, how: str = "exact") -> None:
        """Store the way to merge: exact, factors, peft-linear, peft-0.4-linear, svd or svd:R.

        Raises:
            CoterieError: for another one.
        """
        check_merge(how)
        self._how = how
        self.approximates = None if how == "exact" else how
        self.kind = f"weights:{how}" if self.approximates else "weights"

    def plan(self, routing: Routing) -> RowPlan:
        """One row for every prompt, those of equal weights side by side."""
        distinct, owner = routing.weights.float().unique(dim=0, return_inverse=True)  # sorted, so rows keep their order
        prompts = owner.argsort(stable=True)
        counts = tuple(owner.bincount(minlength=len(distinct)).tolist())
        votes = torch.nn.functional.one_hot(prompts, len(prompts)).T.float()
        choice = Merged(tuple(tuple(row) for row in distinct.tolist()), counts, self._how)
        return RowPlan(tuple(prompts.tolist()), choice, votes)
