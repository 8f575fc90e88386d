"""Experts meet in the next-token logits: each runs side by side on its own row (ELREA eq. 10)."""

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.row_mix import RequestRows
from coterie.combiners.base import Combiner
from coterie.routers.base import Routing


class LogitCombiner(Combiner):
    """Sums next-token logits with normalised weights, in float32.

    Normalising does not move the argmax, so greedy output is the paper's; it keeps the meaning of temperature and of
    log-probabilities. Experts with weight 0 are not run.
    """

    kind = "logits"

    def plan(self, routing: Routing) -> list[RequestRows]:
        """One row for every expert with a weight."""
        plans = []
        for weights in routing.weights:
            rows = torch.eye(len(weights))[weights > 0]
            plans.append(RequestRows(rows, self.votes(rows, weights)))
        return plans

    @staticmethod
    def votes(rows: Float[Tensor, "row expert"], weights: Float[Tensor, " expert"]) -> Float[Tensor, " row"]:
        """Return other votes over the rows of a plan, so that one forward pass serves several weightings.

        Raises:
            ValueError: when a weight falls on an expert that the plan does not run alone.
        """
        votes = rows @ (weights.float() / weights.float().sum())
        if not torch.isclose(votes.sum(), torch.ones(()), atol=1e-4):
            raise ValueError("some weights fall on experts that the plan does not run")
        return votes
