"""What a server measures, under the names that dashboards know from vLLM, and what only a mixture has.

Everything is seen where answers pass: `watched` stands around a stream of tokens and counts what comes through.
"""

import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from starlette.types import Scope

from coterie.engine.request import Load, Request, Rerouting, Token
from coterie.serve.frames import Piece, Usage

MetricsNames = Literal["coterie", "vllm"]
PREFIXES: dict[MetricsNames, str] = {"coterie": "coterie_", "vllm": "vllm:"}
OWN = PREFIXES["coterie"]

MODEL = "model_name"
FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
)  # fmt: skip
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
PER_STEP = (1, *(2**power for power in range(3, 15)))
NATS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


class Measure(NamedTuple):
    """What is counted or observed of what passes.

    Attributes:
        name: without its prefix, and without the `_total` that the name of a counter gets.
        text: says what it is.
        labels: that its values are kept apart by.
        buckets: of a histogram; a counter has none.
        is_own: vLLM has nothing like it.
    """

    name: str
    text: str
    buckets: Sequence[float | int] | None = None
    labels: tuple[str, ...] = (MODEL,)
    is_own: bool = False

    def make(self, prefix: str, registry: CollectorRegistry) -> Counter | Histogram:
        """Let a registry keep it."""
        name = (OWN if self.is_own else prefix) + self.name
        if self.buckets is None:
            return Counter(name, self.text, self.labels, registry=registry)
        return Histogram(name, self.text, self.labels, buckets=self.buckets, registry=registry)


MEASURES = (
    Measure("prompt_tokens", "Tokens of prompts whose answers have begun, cached ones too."),
    Measure("generation_tokens", "Tokens of answers."),
    Measure("prefix_cache_queries", "Tokens of prompts that were looked for among the beginnings of earlier texts."),
    Measure("prefix_cache_hits", "Tokens of prompts that were found there, and not read again."),
    Measure("num_preemptions", "Answers that gave way to others: none ever, what has begun is written."),
    Measure("spec_decode_num_draft_tokens", "Tokens that speculation proposed."),
    Measure("spec_decode_num_accepted_tokens", "Proposed tokens that were right."),
    Measure("request_success", "Answers that have ended, by why.", labels=(MODEL, "finished_reason")),
    Measure("time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST),
    Measure("inter_token_latency_seconds", "Between two tokens of an answer.", BETWEEN),
    Measure("e2e_request_latency_seconds", "From a request's arrival to its last token.", SECONDS),
    Measure("request_queue_time_seconds", "That a request waited.", SECONDS),
    Measure("request_inference_time_seconds", "From when a request waited no longer to its last token.", SECONDS),
    Measure("request_prefill_time_seconds", "From when a request waited no longer to its first token.", SECONDS),
    Measure("request_decode_time_seconds", "From a request's first token to its last one.", SECONDS),
    Measure("request_prompt_tokens", "Tokens of a prompt.", TOKENS),
    Measure("request_generation_tokens", "Tokens of an answer.", TOKENS),
    Measure("request_params_n", "Answers that a request asks for.", (1, 2, 5, 10, 20)),
    Measure("request_params_max_tokens", "Tokens that an answer may have.", TOKENS),
    Measure("iteration_tokens_total", "Tokens that a step of an engine reads.", PER_STEP, labels=()),
    Measure("expert_weight", "Tokens of answers, shared out by weights.", labels=(MODEL, "expert"), is_own=True),
    Measure("routing_entropy_nats", "Entropy of a request's weights.", NATS, is_own=True),
    Measure("http_requests", "Requests of any kind.", labels=("path", "status"), is_own=True),
)


class Recounted(NamedTuple):
    """A request that recruited experts answer, of whose tokens not all pass here.

    Attributes:
        model: the id that was asked.
        came: when, by `time.monotonic`.
        shares: of the answers, by expert.
        spoken: tokens that each expert has written so far.
        usage: tokens that they have read.
    """

    model: str
    came: float
    shares: Mapping[str, float]
    spoken: dict[str, int]
    usage: Usage


class Metrics:
    """All metrics of a server, in a registry of their own."""

    def __init__(self, loads: Callable[[], Mapping[str, Load]], names: MetricsNames = "coterie") -> None:
        """Begin at zero.

        Args:
            loads: tells what every mixture has to do, by its id; it is asked whenever somebody reads the metrics.
            names: whose prefix is used for what vLLM has too.
        """
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.open: set[Watch] = set()
        self._loads = loads
        self._prefix = PREFIXES[names]
        self._kept = {measure.name: measure.make(self._prefix, self.registry) for measure in MEASURES}
        self.registry.register(self)

    def add(self, name: str, value: float | int, *labels: str) -> None:
        """Add to a counter, or observe a value for a histogram."""
        kept = self._kept[name].labels(*labels) if labels else self._kept[name]
        if isinstance(kept, Counter):
            kept.inc(value)
        else:
            kept.observe(value)

    def answered(self, scope: Scope, status: int) -> None:
        """Count a request of any kind; a path that leads nowhere has no name, or a client could make up any number."""
        self.add("http_requests", 1, getattr(scope.get("route"), "path", "none"), str(status))

    def set_up(self, cache: Mapping[str, str]) -> None:
        """Tell how the cache of every mixture is set up."""
        name, text = self._prefix + "cache_config_info", "How the cache of every mixture is set up."
        Gauge(name, text, list(cache), registry=self.registry).labels(**cache).set(1)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what is read off the engines at this moment (called by the registry)."""
        loads = self._loads()
        for name, text, pick in (
            ("num_requests_running", "Requests that are being answered.", lambda load: load.running),
            ("num_requests_waiting", "Requests that wait.", lambda load: load.waiting),
            ("kv_cache_usage_perc", "Share of the cache that texts fill, from 0 to 1.", lambda load: load.cache),
        ):
            family = GaugeMetricFamily(self._prefix + name, text, labels=[MODEL])
            for model, load in loads.items():
                family.add_metric([model], pick(load))
            yield family
        places = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        adapters = GaugeMetricFamily(
            self._prefix + "lora_requests_info", "When it was read, and who is asked.", labels=places
        )
        asked = [
            sorted({watch.model for watch in list(self.open) if watch.is_running == state}) for state in (True, False)
        ]
        adapters.add_metric([str(len(loads)), *map(",".join, asked)], time.time())
        yield adapters

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics as text, and its content type; a client may ask for OpenMetrics."""
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind

    def forget(self, model: str) -> None:
        """Drop all that was measured of a model that is served no longer, or names would pile up."""
        for measure in MEASURES:
            if MODEL in measure.labels:
                self._kept[measure.name].remove_by_labels({MODEL: model})

    async def watched(
        self, model: str, requests: Sequence[Request], tokens: AsyncGenerator[Token], facts: dict[str, Any]
    ) -> AsyncGenerator[Token]:
        """Yield the tokens of requests as they come, and measure them on the way.

        Args:
            model: the id that was asked.
            requests: what was asked.
            tokens: of the answers, each with its request's place among these.
            facts: gets how many tokens it were, and why the answers ended, for the log.
        """
        watches = [Watch(self, model, request) for request in requests]
        self.open |= {*watches}
        reason = "abort"
        try:
            async with aclosing(tokens):
                async for token in tokens:
                    watches[token.request].see(token)
                    yield token
        except Exception:
            reason = "error"
            raise
        finally:
            self.open -= {*watches}
            for watch in watches:
                watch.end(reason)
            facts["model"] = model
            facts["prompt_tokens"] = sum(len(request.prompt.ids) for request in requests)
            facts["completion_tokens"] = sum(watch.written for watch in watches)
            facts["finish_reasons"] = sorted(reason for watch in watches for reason in watch.reasons)

    async def recounted(
        self, told: Recounted, pieces: AsyncGenerator[Piece], facts: dict[str, Any]
    ) -> AsyncGenerator[Piece]:
        """Yield the pieces of an answer as they come, and measure the request as `watched` does, as far as is known."""
        first, reason = None, "abort"
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    first = first or time.monotonic()
                    reason = piece.finish_reason or reason
                    yield piece
        except Exception:
            reason = "error"
            raise
        finally:
            written = sum(told.spoken.values())
            for expert, tokens in told.spoken.items():
                self.add("expert_weight", tokens, told.model, expert)
            self.add("prompt_tokens", told.usage.prompt, told.model)
            self.add("generation_tokens", written, told.model)
            self.add("request_prompt_tokens", told.usage.prompt, told.model)
            self.add("request_generation_tokens", written, told.model)
            self.add("routing_entropy_nats", entropy([*told.shares.values()]), told.model)
            self.add("request_success", 1, told.model, reason)
            if first is not None:
                self.add("time_to_first_token_seconds", first - told.came, told.model)
                self.add("e2e_request_latency_seconds", time.monotonic() - told.came, told.model)
            facts |= {"model": told.model, "prompt_tokens": told.usage.prompt, "completion_tokens": written}
            facts["finish_reasons"] = [reason]


class Watch:
    """What is measured of one request."""

    def __init__(self, metrics: Metrics, model: str, request: Request) -> None:
        """Begin when the request has come."""
        self.model = model
        self._metrics = metrics
        self._request = request
        self._came = time.monotonic()
        self._joined = self._first = self._came
        self._last: dict[int, float] = {}  # of each answer, when its last token came
        self._lengths = dict.fromkeys(range(len(request.draws)), 0)  # of answers that have not ended
        self.written = 0  # tokens of all answers
        self.reasons: list[str] = []  # why those ended that have
        routing = request.routing
        self._experts = routing.experts
        self._shares: Sequence[float] = ()
        if not isinstance(routing, Rerouting) and not routing.gates:
            self._shares = routing.normalized().weights[0].tolist()
        self._spoken = [0.0] * len(routing.experts)  # of tokens, what each expert's share was

    @property
    def is_running(self) -> bool:
        """Whether its first token has come."""
        return bool(self._last)

    def see(self, token: Token) -> None:
        """Measure a token."""
        now = time.monotonic()
        self._shares = token.weights or self._shares
        if not self._last:
            self._begin(token, now)
        elif token.draw in self._last:
            self._add("inter_token_latency_seconds", now - self._last[token.draw])
        self._last[token.draw] = now
        self._lengths[token.draw] += 1
        self.written += 1
        self._add("generation_tokens", 1)
        self._add("spec_decode_num_draft_tokens", token.speculated[0])
        self._add("spec_decode_num_accepted_tokens", token.speculated[1])
        for place, share in enumerate(self._shares):
            self._spoken[place] += share
        if token.finish_reason:
            self._add("request_generation_tokens", self._lengths.pop(token.draw))
            self._end(1, token.finish_reason)
            if not self._lengths:
                self._share_out()
                self._add("e2e_request_latency_seconds", now - self._came)
                self._add("request_inference_time_seconds", now - self._joined)
                self._add("request_decode_time_seconds", now - self._first)

    def _begin(self, token: Token, now: float) -> None:
        length = len(self._request.prompt.ids)
        self._first = now
        self._add("prompt_tokens", length)
        self._add("num_preemptions", 0)
        self._add("time_to_first_token_seconds", now - self._came)
        if token.begun:
            self._joined = token.begun.joined
            self._add("prefix_cache_queries", length)
            self._add("prefix_cache_hits", token.begun.cached)
        self._add("request_queue_time_seconds", max(0.0, self._joined - self._came))
        self._add("request_prefill_time_seconds", now - self._joined)
        self._add("request_prompt_tokens", length)
        self._add("request_params_n", len(self._request.draws))
        self._add("request_params_max_tokens", self._request.limit)
        self._add("routing_entropy_nats", entropy(self._shares))

    def end(self, reason: str) -> None:
        """Count the answers that have not ended, which never will."""
        if self._lengths:
            self._end(len(self._lengths), reason)
            self._lengths.clear()
            self._share_out()

    def _end(self, answers: int, reason: str) -> None:
        self._add("request_success", answers, reason)
        self.reasons += [reason] * answers

    def _share_out(self) -> None:
        """Add what experts spoke, once a request: a token of a large bank would cost as many additions as experts."""
        for expert, tokens in zip(self._experts, self._spoken, strict=True):
            self._add("expert_weight", tokens, expert)

    def _add(self, name: str, value: float | int, *labels: str) -> None:
        self._metrics.add(name, value, self.model, *labels)


def entropy(shares: Sequence[float]) -> float:
    """Return the entropy of shares that sum to 1, in nats: 0 where one expert speaks, log E where all speak alike."""
    return -math.fsum(share * math.log(share) for share in shares if share > 0)
