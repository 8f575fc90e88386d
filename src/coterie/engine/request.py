"""What is asked of the engine, and what it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from coterie.combiners.base import Combiner
from coterie.data.batching import TokenRow
from coterie.features.growing_text import GrowingFeatures
from coterie.routers.base import Routing
from coterie.settings.sampling import SamplingSettings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Rerouting:
    """How the weights of requests change while their answers are written; requests that share it are weighed together.

    Attributes:
        texts: what is read off the requests' texts, as they grow.
        weigh: turns that into weights.
        experts: the bank's, in its order.
        every: tokens of an answer that share weights.
        recompute: read the whole text again under new weights, instead of keeping the cache.
    """

    texts: GrowingFeatures
    weigh: Callable[[Any], Routing]
    experts: tuple[str, ...]
    every: int
    recompute: bool = False

    def weights(self, texts: Sequence[Any]) -> list[Routing]:
        """Weigh the bank's experts for each text as far as it is known."""
        routing = self.weigh(self.texts.features(texts)).aligned(self.experts)
        return [routing.take([number]) for number in range(len(texts))]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt to answer, with everything that its answers hang on: they are the same alone and in any company.

    Attributes:
        prompt: its tokens.
        routing: the experts' weights for this prompt, in the bank's order; or what weighs them, again and again.
        combiner: where experts meet.
        limit: the most tokens of an answer.
        draws: how the tokens of each answer are chosen; the prompt is read once for all of them.
        end_ids: tokens that end an answer besides the model's own.
        deadline: the time, by `time.monotonic`, at which the request is given up; None for never.
        prompt_logprobs: score the prompt's own tokens, too, with so many alternatives to each; None for no such thing.
    """

    prompt: TokenRow
    routing: Routing | Rerouting
    combiner: Combiner
    limit: int
    draws: tuple[SamplingSettings, ...] = (SamplingSettings(),)
    end_ids: frozenset[int] = frozenset()
    deadline: float | None = None
    prompt_logprobs: int | None = None


class Scored(NamedTuple):
    """The natural log of a given token's probability, and the likeliest tokens there with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Begun(NamedTuple):
    """How a request began.

    Attributes:
        joined: the time, by `time.monotonic`, at which it waited no longer.
        cached: tokens of its prompt that were not read, since an earlier text had begun alike.
        prompt: how likely the prompt's tokens from the second on are, where that was asked for.
    """

    joined: float
    cached: int
    prompt: tuple[Scored, ...] = ()


class Token(NamedTuple):
    """One token of an answer.

    Attributes:
        request: the handle of its request.
        id: the token.
        logprob: natural log of its probability under the combined distribution, before temperature and penalties.
        text: text that became certain with it.
        finish_reason: why the answer ends here, or None.
        weights: the experts' shares that chose it, in the bank's order, where they change from token to token; where
            gates weigh them in every layer, the first token has their average over the prompt.
        draw: which of the request's answers it belongs to.
        top: the likeliest tokens there with their logs, where they were asked for.
        speculated: how many tokens were proposed in the pass that gave this one, and how many of them were right; on
            the first token of a pass.
        begun: how its request began; on the first token of each answer.
    """

    request: int
    id: int
    logprob: float
    text: str
    finish_reason: FinishReason | None
    weights: tuple[float, ...] | None = None
    draw: int = 0
    top: tuple[tuple[int, float], ...] = ()
    speculated: tuple[int, int] = (0, 0)
    begun: Begun | None = None


class Failure(NamedTuple):
    """The end of a request, with all of its answers, that comes without a token; other requests go on.

    Attributes:
        request: its handle.
        error: a TimeoutError for a deadline that has passed, or whatever its router, experts or combiner raised.
    """

    request: int
    error: Exception


class Load(NamedTuple):
    """What an engine has to do at one moment.

    Attributes:
        waiting: requests that have not begun.
        running: requests that are being answered.
        cache: the share of its cache that texts fill, from 0 to 1.
        tokens: that were read so far, those of prompts and answers and those that were proposed.
    """

    waiting: int
    running: int
    cache: float
    tokens: int
