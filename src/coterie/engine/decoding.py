"""Decoding a batch of requests: prefill once, then one token a step for everybody, until the last one has left."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone
from coterie.combiners.base import Combiner, RequestRows
from coterie.data.batching import pad
from coterie.engine.rerouting import Rerouting
from coterie.engine.rows import CachedRows, RowPlan
from coterie.engine.sampling import BatchSampler, Chosen, check_biases
from coterie.engine.sampling_stages import SampledText
from coterie.engine.text import TextStream
from coterie.routers.base import Routing
from coterie.settings.groups import SamplingSettings

FinishReason = Literal["stop", "length"]


class Token(NamedTuple):
    """One token of one request.

    Attributes:
        request: number of the request in its batch; where several answers are drawn for a prompt, prompt by prompt.
        id: the token.
        logprob: natural log of its probability under the combined distribution, before temperature and penalties.
        text: text that became certain with it.
        finish_reason: why the request ends here, or None.
        weights: the experts' shares that chose it, in the bank's order, where they may change from token to token.
        top: the likeliest tokens there with their logs, where they were asked for.
    """

    request: int
    id: int
    logprob: float
    text: str
    finish_reason: FinishReason | None
    weights: tuple[float, ...] | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class _Request:
    number: int
    ids: list[int]
    longest: int | float  # tokens of prompt and answer
    sampled: SampledText
    stream: TextStream


def combined_logits(
    backbone: Backbone, hidden: Float[Tensor, "row width"], votes: Float[Tensor, "prompt row"]
) -> Float[Tensor, "prompt vocabulary"]:
    """Sum the rows' logits with the votes, in float32.

    Where logits are linear in the hidden state, the sum is taken before the output layer: the same logits for one
    product a prompt instead of one a row. A soft cap is not linear, so there every row goes through on its own.
    """
    votes = votes.to(hidden.device)
    if backbone.logit_cap is None:
        return backbone.head(votes @ hidden.float())
    return votes @ backbone.head(hidden)


class DecodingBatch:
    """Requests that decode together on one base model; finished ones leave with their rows of the cache."""

    def __init__(
        self,
        backbone: Backbone,
        layers: ExpertLayers,
        combiner: Combiner,
        prompts: Sequence[Sequence[int]],
        routing: Routing,
        draws: Sequence[SamplingSettings],
        limits: Sequence[int],
        rerouting: Rerouting | None = None,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Take in the requests; nothing is computed yet.

        Args:
            backbone: the base model.
            layers: the bank's experts.
            combiner: where experts meet.
            prompts: token ids of every request.
            routing: of every request, as `CachedRows` takes it.
            draws: how tokens are chosen, for each answer that is drawn for every prompt.
            limits: the most tokens that every prompt's answers may take.
            rerouting: how the weights change later; None for not at all.
            end_ids: tokens that end an answer besides the model's own.
        """
        self._backbone = backbone
        self.rows = CachedRows(backbone, layers, combiner, routing)
        self._prompts = prompts
        check_biases(draws[0], backbone.output_layer.out_features)
        self._rerouting = rerouting
        self._stop_ids = backbone.stop_ids | end_ids
        bound = math.inf if backbone.positions is None else backbone.positions + 1  # the last one is not read
        most = [min(bound, len(ids) + limit) for ids, limit in zip(prompts, limits, strict=True)]
        each = len(draws)
        self._active = [
            _Request(
                each * number + place,
                list(ids),
                longest,
                SampledText(own, ids),
                TextStream(backbone.tokenizer, own.stop),
            )
            for number, (ids, longest) in enumerate(zip(prompts, most, strict=True))
            for place, own in enumerate(draws)
        ]
        self._sampler = BatchSampler()

    def run(self) -> Iterator[Token]:
        """Yield tokens step by step, in the order of the requests within a step; a prompt is read once."""
        each = len(self._active) // len(self._prompts)
        hidden = self.rows.read(self._prompts)
        logits = combined_logits(self._backbone, hidden[:, -1], self.rows.plan.votes)
        if each > 1:
            logits = logits.repeat_interleave(each, dim=0)
            self._keep([number // each for number in range(len(self._active))])
        for written in itertools.count(1):
            tokens = self._choose(logits)
            yield from tokens
            staying = [place for place, token in enumerate(tokens) if token.finish_reason is None]
            if not staying:
                return
            if len(staying) < len(self._active):
                self._active = [self._active[place] for place in staying]
                self._keep(staying)
            chosen = [request.ids[-1:] for request in self._active]
            if self._rerouting is None:
                hidden = self.rows.read(chosen)
            else:
                texts = [request.ids for request in self._active]
                hidden = self._rerouting.read(self.rows, chosen, texts, written)
            logits = combined_logits(self._backbone, hidden[:, -1], self.rows.plan.votes)

    def _keep(self, requests: Sequence[int]) -> None:
        self.rows.keep(requests)
        if self._rerouting is not None:
            self._rerouting.texts.keep(requests)

    def _choose(self, logits: Float[Tensor, "prompt vocabulary"]) -> list[Token]:
        chosen = self._sampler.choose([request.sampled for request in self._active], logits[:, None])
        pairs = zip(self._active, chosen, strict=True)
        tokens = [self._advance(request, chosen) for request, (chosen,) in pairs]
        if self._rerouting is None:
            return tokens
        shares = self.rows.routing.normalized().weights.tolist()
        return [token._replace(weights=tuple(row)) for token, row in zip(tokens, shares, strict=True)]

    def _advance(self, request: _Request, chosen: Chosen) -> Token:
        token = chosen.id
        request.ids.append(token)
        ends_turn = token in self._stop_ids
        text = "" if ends_turn else request.stream.push(token)
        reason: FinishReason | None = None
        if ends_turn or request.stream.stopped:
            reason = "stop"
        elif len(request.ids) >= request.longest:
            reason = "length"
        if reason and not request.stream.stopped:
            text += request.stream.finish()
        return Token(request.number, token, chosen.logprob, text, reason, top=chosen.top)


class ScoredTokens(NamedTuple):
    """Wanted tokens of one text: natural logs of their probabilities, and whether each is the likeliest token there."""

    logprobs: Float[Tensor, " token"]
    is_greedy: Bool[Tensor, " token"]


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
    plan = RowPlan(list(requests))
    ids = pad([texts[n][0][: texts[n][1][-1]] for n in plan.prompts], backbone.pad_id, device=backbone.device)
    with layers.running(layers.mix(requests)):
        hidden = backbone.hidden(ids.input_ids)  # padding stands behind the text, where causal attention cannot see it
    result: list[list[ScoredTokens]] = [[] for _ in votes]
    rows = hidden.split([len(own.votes) for own in requests])
    for number, ((text, positions), own) in enumerate(zip(texts, rows, strict=True)):
        before = torch.tensor(positions, device=hidden.device) - 1
        targets = torch.tensor(text, device=hidden.device)[before + 1]
        states = own[:, before]  # [own rows, tokens, width]
        for place, vote in enumerate(votes):
            own_vote = vote[number].to(hidden.device)
            if backbone.logit_cap is None:  # as in `combined_logits`
                logits = backbone.head(torch.einsum("r,rtd->td", own_vote, states.float()))
            else:
                logits = torch.einsum("r,rtv->tv", own_vote, backbone.head(states))
            result[place].append(scored_tokens(logits, targets))
    return result


def scored_tokens(logits: Float[Tensor, "token vocabulary"], targets: Int[Tensor, " token"]) -> ScoredTokens:
    """Score tokens by the logits at their places."""
    logprobs = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=1)
    return ScoredTokens(logprobs.cpu(), (logits.argmax(dim=1) == targets).cpu())
