"""The likelihood of given texts: under a mixture, under many weightings of its experts at once, or along re-routing."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie import ranks
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone
from coterie.backbone.row_mix import RequestRows
from coterie.combiners.base import Combiner
from coterie.combiners.logits import LogitCombiner
from coterie.data.batching import TokenRow, by_length, pad
from coterie.data.devices import on_device
from coterie.engine.reading import Reader, summed_logits
from coterie.engine.request import Rerouting
from coterie.progress import steps
from coterie.routers.base import Routing

BATCH = 8


class ScoredTokens(NamedTuple):
    """Wanted tokens of one text: natural logs of their probabilities, and whether each is the likeliest token there."""

    logprobs: Float[Tensor, " token"]
    is_greedy: Bool[Tensor, " token"]


class Scores(NamedTuple):
    """Mean negative log-likelihood per token of every reference under every vote, in nats, and its number of tokens."""

    nll: Float[Tensor, "vote row"]
    tokens: Float[Tensor, " row"]


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
    """Score references under the combiner's own votes, or under those of other weights over the rows that it plans.

    Several processes share the rows.
    """
    nll, tokens = torch.zeros(1 if weights is None else len(weights), len(rows)), torch.zeros(len(rows))
    with steps(label and f"likelihood of {label}", len(rows), "row") as done, torch.inference_mode():
        for numbers in ranks.share(by_length(rows, BATCH)):
            if not numbers:
                backbone.take_part()
                continue
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
            done(len(numbers))
    return Scores(ranks.summed(nll), ranks.summed(tokens))


def answer_positions(row: TokenRow) -> list[int]:
    """Return the positions of the final answer's tokens."""
    return [place for place in range(row.prompt_length, len(row.ids)) if row.is_response[place]]


@torch.inference_mode()
def score_responses(
    backbone: Backbone,
    layers: ExpertLayers,
    requests: Sequence[RequestRows],
    votes: Sequence[Sequence[Float[Tensor, " _"]]],
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> list[list[ScoredTokens]]:
    """Score the wanted tokens of given texts, for several votes over the same rows.

    Args:
        backbone: the base model.
        layers: the bank's experts.
        requests: the model rows that are run for each text, once.
        votes: ways to combine them, each with votes for every text.
        texts: token ids and the positions of the wanted tokens, first to last (each at least 1).

    Returns:
        For every vote and text, scores in the order of the positions.
    """
    states = states_at(backbone, layers, requests, [ids[: places[-1]] for ids, places in texts])
    scored = []
    for number, ((ids, positions), own) in enumerate(zip(texts, states, strict=True)):
        before = on_device([position - 1 for position in positions], own.device)
        wanted = own[:, before]  # [own rows, tokens, width]
        targets = on_device([ids[position] for position in positions], own.device)
        for vote in votes:
            own_vote = on_device(vote[number], own.device)
            logits = summed_logits(
                backbone, lambda rows, by=own_vote: torch.einsum("r,rtd->td", by, rows.float()), wanted
            )
            scored.append(scored_tokens(logits, targets))
    found = on_host(scored)
    return [found[vote :: len(votes)] for vote in range(len(votes))]


@torch.inference_mode()
def states_at(
    backbone: Backbone, layers: ExpertLayers, requests: Sequence[RequestRows], texts: Sequence[Sequence[int]]
) -> list[Float[Tensor, "_ _ width"]]:
    """Return the last hidden states of every text's rows, from one pass without a cache."""
    rows = [ids for ids, own in zip(texts, requests, strict=True) for _ in own.votes]
    batch = pad(rows, backbone.pad_id, device=backbone.device)
    with layers.running(layers.mix(requests)):
        hidden = backbone.hidden(batch.input_ids)  # padding stands behind, where causal attention cannot see it
    own = hidden.split([len(own.votes) for own in requests])
    return [states[:, : len(ids)] for states, ids in zip(own, texts, strict=True)]


def scored_tokens(logits: Float[Tensor, "token vocabulary"], targets: Int[Tensor, " token"]) -> ScoredTokens:
    """Score tokens by the logits at their places; the scores are where the logits are."""
    logprobs = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)
    return ScoredTokens(logprobs, logits.argmax(dim=1) == targets)


def on_host(scored: Sequence[ScoredTokens]) -> list[ScoredTokens]:
    """Copy scores to the CPU, all at once, so that the device is waited for once."""
    sizes = [len(own.logprobs) for own in scored]
    both = torch.stack([torch.cat([own.logprobs for own in scored]), torch.cat([own.is_greedy for own in scored])])
    logprobs, is_greedy = both.cpu()
    return [ScoredTokens(*own) for own in zip(logprobs.split(sizes), is_greedy.bool().split(sizes), strict=True)]


def score_teacher_forced(
    reader: Reader,
    combiner: Combiner,
    rerouting: Rerouting,
    prompts: Sequence[TokenRow],
    answers: Sequence[Sequence[int]],
) -> list[ScoredTokens]:
    """Score answers as if the mixture had written them: the same weights at the same tokens as in decoding.

    Tokens that share their weights are read together, so this takes a forward pass for every re-routing, not for
    every token. Weighing may need gradients, so inference mode is on for the model's own passes only.

    Args:
        reader: reads them.
        combiner: where experts meet.
        rerouting: how their weights change.
        prompts: whose answers are scored.
        answers: of at least one token each.

    Returns:
        The scores of each answer's tokens.
    """
    followed = rerouting.texts.begin(prompts)
    plans = [combiner.plan(routing)[0] for routing in rerouting.weights(followed)]
    texts = [reader.open(prompt.ids, plan) for prompt, plan in zip(prompts, plans, strict=True)]
    found: list[list[ScoredTokens]] = [[] for _ in texts]
    active, known = list(range(len(texts))), 0
    while True:
        wanted = [answers[i][known : known + rerouting.every] for i in active]  # these share their weights
        for i, own in zip(active, wanted, strict=True):
            texts[i].ids += own[:-1]
            followed[i] = rerouting.texts.append(followed[i], own[:-1])
        hidden = reader.read([texts[i] for i in active], [texts[i].unread for i in active])
        for i, own, (states,) in zip(active, wanted, hidden, strict=True):
            with torch.inference_mode():
                logits = reader.backbone.head(states[-len(own) :])
                found[i].append(scored_tokens(logits, on_device(own, logits.device)))
            new = len(own) - (known == 0)  # the prompt's states are known
            followed[i] = rerouting.texts.append_states(followed[i], states[len(states) - new :])
        known += rerouting.every
        active = [i for i in active if len(answers[i]) > known]
        if not active:
            return on_host([ScoredTokens(*map(torch.cat, zip(*parts, strict=True))) for parts in found])
        for i in active:
            texts[i].ids.append(answers[i][known - 1])
            followed[i] = rerouting.texts.append(followed[i], answers[i][known - 1 : known])
        for i, routing in zip(active, rerouting.weights([followed[i] for i in active]), strict=True):
            reader.change(texts[i], combiner.plan(routing)[0], recompute=rerouting.recompute)
