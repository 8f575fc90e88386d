"""Experts meet in the next-token logits: each runs side by side on its own row (ELREA eq. 10)."""

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.layers import ByExpert
from coterie.combiners.base import Combiner, RowPlan
from coterie.routers.base import Routing


class LogitCombiner(Combiner):
    """Sums next-token logits with normalised weights, in float32.

    Normalising does not move the argmax, so greedy output is the paper's; it keeps the meaning of temperature and of
    log-probabilities. Experts with weight 0 are not run.
    """

    kind = "logits"

    def plan(self, routing: Routing) -> RowPlan:
        """One row for every prompt and expert with a weight, ordered by expert."""
        needed = routing.weights > 0
        experts = tuple(int(e) for e in needed.any(dim=0).nonzero())
        rows = [(expert, int(prompt)) for expert in experts for prompt in needed[:, expert].nonzero()]
        prompts = tuple(prompt for _, prompt in rows)
        counts = tuple(sum(e == expert for e, _ in rows) for expert in experts)
        return RowPlan(prompts, ByExpert(experts, counts), _votes(routing.weights, rows))

    def votes(self, plan: RowPlan, weights: Float[Tensor, "prompt expert"]) -> Float[Tensor, "prompt row"]:
        """Return other votes over the rows of a plan, so that one forward pass serves several weightings.

        Raises:
            ValueError: when a weight falls on an expert that the plan does not run.
        """
        choice = plan.choice
        if not isinstance(choice, ByExpert):
            raise ValueError("this plan mixes experts within rows, so its rows have no expert of their own")
        owners = [expert for expert, count in zip(choice.experts, choice.counts, strict=True) for _ in range(count)]
        votes = _votes(weights, list(zip(owners, plan.prompts, strict=True)))
        if not torch.allclose(votes.sum(dim=1), torch.ones(len(weights)), atol=1e-4):
            raise ValueError("some weights fall on experts that the plan does not run")
        return votes


def _votes(weights: Float[Tensor, "prompt expert"], rows: list[tuple[int, int]]) -> Float[Tensor, "prompt row"]:
    normalised = weights.float() / weights.float().sum(dim=1, keepdim=True)
    votes = torch.zeros(len(weights), len(rows))
    for row, (expert, prompt) in enumerate(rows):
        votes[prompt, row] = normalised[prompt, expert]
    return votes
