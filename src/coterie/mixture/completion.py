"""Answers, with the weights that led to them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from coterie.engine.request import Token
from coterie.records.evaluation import Trace


class Likelihoods(NamedTuple):
    """How likely responses are: the natural log of the probability of each as a whole, and its number of tokens.

    The token that ends the answer counts among them.
    """

    logprobs: Float[Tensor, " response"]
    tokens: Float[Tensor, " response"]


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        prompt: the question, as given by the user.
        text: the answer.
        token_ids: its tokens, with the one that ended it.
        logprobs: natural log of each token's probability under the combined distribution; not a number where another
            engine tells none.
        finish_reason: stop or length.
        weights: normalised routing weights of the prompt by expert name.
        trace: how the weights went on from there, where they may change from token to token.
        top_logprobs: the likeliest tokens at each of them with their logs, where they were asked for.
        speculated: how many tokens were proposed while it was written, and how many of these were right.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    logprobs: tuple[float, ...] = field(repr=False)
    finish_reason: str
    weights: Mapping[str, float]
    trace: Trace | None = field(default=None, repr=False)
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = field(default=None, repr=False)
    speculated: tuple[int, int] = field(default=(0, 0), repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """Return the object that `generate --json` prints."""
        proposed, accepted = self.speculated
        return {
            "prompt": self.prompt,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "logprobs": [None if math.isnan(one) else one for one in self.logprobs],
            **({"top_logprobs": [list(map(list, top)) for top in self.top_logprobs]} if self.top_logprobs else {}),
            "finish_reason": self.finish_reason,
            **({"speculation": {"proposed": proposed, "accepted": accepted}} if proposed else {}),
            "routing": {"weights": dict(self.weights), **({"trace": self.trace.plain()} if self.trace else {})},
        }


def completion(
    prompt: str, tokens: Sequence[Token], weights: Mapping[str, float] | None, experts: Sequence[str]
) -> Completion:
    """Put an answer together.

    The weights are the prompt's, normalised, by expert; None where the tokens bring their own, in the order of
    `experts`.
    """
    trace = None
    if weights is None:
        shares = [token.weights or () for token in tokens]
        used = [place for place in range(len(experts)) if any(row[place] for row in shares)]
        names = tuple(experts[place] for place in used)  # without the experts that no token has any weight on
        kept = tuple(tuple(row[place] for place in used) for row in shares)
        trace = Trace(experts=names, pieces=tuple(token.text for token in tokens), weights=kept)
    return Completion(
        prompt=prompt,
        text="".join(token.text for token in tokens),
        token_ids=tuple(token.id for token in tokens),
        logprobs=tuple(token.logprob for token in tokens),
        finish_reason=tokens[-1].finish_reason or "length",
        weights=weights or (dict(zip(trace.experts, trace.weights[0], strict=True)) if trace else {}),
        trace=trace,
        top_logprobs=tuple(token.top for token in tokens) if tokens[0].top else None,
        speculated=(sum(token.speculated[0] for token in tokens), sum(token.speculated[1] for token in tokens)),
    )
