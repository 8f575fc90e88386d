"""The likelihood of reference answers under a mixture, or under many weightings of its experts at once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone
from coterie.combiners.base import Combiner
from coterie.combiners.logits import LogitCombiner
from coterie.data.batching import TokenRow, by_length
from coterie.engine.decoding import score_responses
from coterie.routers.base import Routing

BATCH = 8


class Scores(NamedTuple):
    """Mean negative log-likelihood per token of every reference under every vote, in nats, and its number of tokens."""

    nll: Float[Tensor, "vote row"]
    tokens: Float[Tensor, " row"]


class Likelihoods(NamedTuple):
    """How likely responses are: the natural log of the probability of each as a whole, and its number of tokens.

    The token that ends the answer counts among them.
    """

    logprobs: Float[Tensor, " response"]
    tokens: Float[Tensor, " response"]


def score_votes(
    backbone: Backbone,
    layers: ExpertLayers,
    names: tuple[str, ...],
    rows: Sequence[TokenRow],
    weights: Float[Tensor, "vote row expert"],
    label: str,
) -> Scores:
    """Score references under many weightings of the experts' logits; one forward pass serves them all.

    The experts' names stand in the order of the layers. Without a label no progress is shown.
    """
    together = Routing(names, weights.sum(dim=0))  # runs every expert that some vote has a weight on
    return score_planned(backbone, layers, LogitCombiner(), together, rows, weights, label)


def score_planned(
    backbone: Backbone,
    layers: ExpertLayers,
    combiner: Combiner,
    routing: Routing,
    rows: Sequence[TokenRow],
    weights: Float[Tensor, "vote row expert"] | None,
    label: str,
) -> Scores:
    """Score references under the combiner's own votes, or under those of other weights over the rows that it plans."""
    nll, tokens = torch.zeros(1 if weights is None else len(weights), len(rows)), torch.zeros(len(rows))
    with tqdm(total=len(rows), desc=f"likelihood of {label}", unit="row", disable=not label) as bar:
        for numbers in by_length(rows, BATCH):
            plan = combiner.plan(routing.take(numbers))
            if weights is None:
                own_votes = [[own.votes for own in plan]]
            else:
                own_votes = [
                    [LogitCombiner.votes(own.weights, row) for own, row in zip(plan, vote, strict=True)]
                    for vote in weights[:, numbers]
                ]
            texts = [(rows[i].ids, answer_positions(rows[i])) for i in numbers]
            found = score_responses(backbone, layers, plan, own_votes, texts)
            for vote, scored in enumerate(found):
                nll[vote, numbers] = torch.stack([-own.logprobs.mean() for own in scored])
            tokens[numbers] = torch.tensor([float(len(positions)) for _, positions in texts])
            bar.update(len(numbers))
    return Scores(nll, tokens)


def answer_positions(row: TokenRow) -> list[int]:
    """Return the positions of the final answer's tokens."""
    return [place for place in range(row.prompt_length, len(row.ids)) if row.is_response[place]]
