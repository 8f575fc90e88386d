"""A mixture is a bank of experts, a router and a combiner on one base model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.memory import held_bytes
from coterie.backbone.slots import Slots
from coterie.combiners.base import Combiner
from coterie.combiners.table import check_fit, make_combiner, that_follows
from coterie.combiners.texts import majority
from coterie.data.batching import TokenRow, by_length, check_lengths
from coterie.data.examples import Example
from coterie.data.forms import Message
from coterie.engine.engine import WHOLE_PROMPTS, Engine
from coterie.engine.reading import Reader
from coterie.engine.request import Failure, Request, Rerouting, Token
from coterie.engine.scoring import BATCH, ScoredTokens, Scores, answer_positions, score_planned, score_teacher_forced
from coterie.errors import CoterieError
from coterie.grading.answers import read_answer
from coterie.grading.grade import after_thinking
from coterie.grading.lengths import ANSWER_TOKENS, longest_answer
from coterie.mixture.completion import Completion, Likelihoods, completion
from coterie.mixture.folder import StoredMixture
from coterie.mixture.prompts import Prompt, as_examples
from coterie.progress import steps
from coterie.routers.base import Router, Routing
from coterie.routers.derived import keep_top
from coterie.routers.fixed import FixedRouter
from coterie.routers.token import TokenLevel
from coterie.settings.groups import SamplingSettings
from coterie.settings.reading import from_flat


@dataclass(frozen=True, repr=False)
class Mixture(StoredMixture):
    """A bank, a router and a combiner on one base model.

    Attributes:
        layers: the bank, stacked for the base model; made from it where none are given, and shared by `replace`.
    """

    layers: ExpertLayers = field(default=None, repr=False)  # pyrefly: ignore[bad-assignment] - set below

    def __post_init__(self) -> None:
        """Refuse a combiner that cannot follow the router's weights.

        Raises:
            CoterieError: naming the combiners that can.
        """
        check_fit(self.router, self.combiner)
        model, adapters = self.backbone.model, self.bank.adapters
        if self.layers is None or self.layers.model is not model or self.layers.adapters is not adapters:
            object.__setattr__(self, "layers", ExpertLayers(model, adapters))

    def __repr__(self) -> str:
        """Return what stands in each of the three places."""
        router, combiner = f"{self.router.kind} ({self.router.grain})", self.combiner.kind
        lines = [f"router={router}, combiner={combiner}, method={self.method}", f"{self.bank}", f"{self.backbone}"]
        return "\n  ".join([f"Mixture({self.folder or 'not in a folder'})", *lines])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self.backbone.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the base model lies and the mixture computes."""
        return self.backbone.device

    def tokens(self, prompts: Prompt | Sequence[Prompt]) -> list[TokenRow]:
        """Tokenise one prompt or several, without answers.

        Raises:
            CoterieError: when a prompt is empty or too long, or the chat template does not take it.
        """
        rows = [self.prompts.row(example).prompt() for example in as_examples(prompts)]
        check_lengths(rows, self.backbone.positions, [f"prompt {number + 1}" for number in range(len(rows))])
        return rows

    # ------------------------------------------------------------------------------------------------ routing

    def route(self, prompts: Prompt | Sequence[Prompt], top_k_experts: int | None = None) -> Routing:
        """Weigh the experts for every prompt, in batches; one prompt alone is a batch of one.

        Raises:
            CoterieError: for an empty prompt, or more experts asked for than there are.
        """
        routing = self.router.route(self.tokens(prompts))
        return routing if top_k_experts is None else routing.top(top_k_experts)

    @property
    def reroutes(self) -> bool:
        """Whether weights change while an answer is written."""
        return self.router.every is not None

    def rerouted(
        self, every: int | None, *, cache: str | None = None, combiner: Combiner | str | None = None
    ) -> "Mixture":
        """Return the same mixture with its router asked again at every n-th token of an answer.

        Args:
            every: tokens that share weights; None for the prompt's weights all along.
            cache: `keep` what earlier weights left in the KV cache, or `recompute` it; as it is by default.
            combiner: another one, where the mixture's own cannot change its weights meanwhile.

        Raises:
            CoterieError: for a combiner or a router that cannot change its weights meanwhile, or `every` below 1.
        """
        router = TokenLevel(self.router.of_prompts, every, cache or self.router.cache)
        return self.replace(router=router, combiner=combiner)

    def replace(
        self, *, router: Router | str | Mapping[str, float] | None = None, combiner: Combiner | str | None = None
    ) -> "Mixture":
        """Return another cell of the grid: another router or combiner on the same bank; nothing is trained.

        Args:
            router: a router, a name that `named_router` takes, or the experts' weights for every prompt.
            combiner: a combiner or its name; by default the mixture's own, or `layers` for a router that weighs experts
                in the layers, which no other combiner follows.

        Raises:
            CoterieError: for an unknown name, or a combiner that cannot follow the router.
        """
        if isinstance(router, Mapping):
            for name in router:
                self.bank.index(name)
            router = FixedRouter(router)
        weighing = self.named_router(router) if isinstance(router, str) else router or self.router
        meeting = make_combiner(combiner) if isinstance(combiner, str) else combiner
        return replace(self, router=weighing, combiner=meeting or that_follows(weighing, self.combiner))

    # --------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        n: int = 1,
        batch_size: int = 8,
        top_k_experts: int | None = None,
        routing: Routing | None = None,
        progress: Callable[[int], object] | None = None,
        **sampling: Any,  # noqa: ANN401 - fields of SamplingSettings
    ) -> list[Completion]:
        """Answer prompts, those of similar length together.

        Noise hangs on `seed` and the place in the answer alone, not on what else is in the call: a prompt's answer is
        the same alone and among others, and equal prompts get equal answers. For several answers to a prompt ask for
        `n`: each has a seed of its own, and the first is the answer that `n=1` gives.

        Args:
            prompts: questions, or one of them.
            n: answers to every prompt, which stand side by side in the result; a prompt is read once for all.
            batch_size: answers decoded together. It does not change them in float32; in half precision, where rounding
                depends on the shapes of products, a token may differ if two are nearly as likely.
            top_k_experts: keep only the experts with the largest weights.
            routing: weights of these prompts, if they are known already; they are computed otherwise.
            progress: is called with 1 whenever a prompt's answers are complete.
            **sampling: fields of `SamplingSettings`, such as max_new_tokens (by default what each prompt's task wants,
                256 where none is known), temperature, top_p, seed.

        Raises:
            CoterieError: for an empty prompt, a setting that does not fit, or a routing that is not of these prompts or
                would not be followed.
        """
        settings = from_flat(SamplingSettings, sampling, ("n", "batch_size", "top_k_experts", "routing", "progress"))
        draws = self.combiner.draws(settings, n)
        examples = as_examples(prompts)
        rows = self.tokens(examples)
        mixture = self
        if routing is not None:
            routing = self._followed(routing, len(rows), top_k_experts)
        elif top_k_experts is not None:
            mixture = self.replace(router=keep_top(self.router, top_k_experts))
        limits = [longest_answer(settings, example) for example in examples]
        drawn = mixture._completions(examples, rows, routing, [draws] * len(rows), batch_size, limits, progress)
        if self.combiner.finishes_answers:
            return [elected(example, own, settings.seed) for example, own in zip(examples, drawn, strict=True)]
        return [answer for own in drawn for answer in own]

    def _followed(self, routing: Routing, prompts: int, top_k_experts: int | None) -> Routing:
        """Return a routing that was given, changed as was asked for; refuse one that would not act as it stands."""
        if len(routing.weights) != prompts:
            raise CoterieError(f"the routing is of {len(routing.weights)} prompts, but {prompts} are given")
        if self.reroutes:
            raise CoterieError(
                "the mixture re-routes while it answers, so a given routing would not last; leave it out, or take "
                "mixture.rerouted(None)"
            )
        if routing.gates and self.combiner.finest != "layer":
            raise CoterieError(
                f"the routing weighs experts by gates in every layer, which combiner {self.combiner.kind!r} does not "
                "follow; use layers"
            )
        return routing if top_k_experts is None else routing.top(top_k_experts)

    def complete(
        self, rows: Sequence[TokenRow], each: Sequence[SamplingSettings] = (), *, batch_size: int = 8, **sampling: Any
    ) -> list[Completion]:
        """Continue rows of tokens as they stand: no template is put around them, and `prompt` stays empty.

        Args:
            rows: texts to continue.
            each: how every row's tokens are chosen, where that differs between rows.
            batch_size: as for `generate`.
            **sampling: fields of `SamplingSettings`, for all rows.

        Raises:
            CoterieError: for a combiner that needs finished answers, a row that is too long, or a setting that does
                not fit.
        """
        if self.combiner.finishes_answers:
            raise CoterieError("combiner 'texts' lets finished answers vote, so it continues no text; use another one")
        check_lengths(rows, self.backbone.positions, [f"row {number + 1}" for number in range(len(rows))])
        settings = each or [from_flat(SamplingSettings, sampling, ("each", "batch_size"))] * len(rows)
        limits = [own.max_new_tokens or ANSWER_TOKENS for own in settings]
        return [own[0] for own in self._completions(None, rows, None, [[own] for own in settings], batch_size, limits)]

    def engine(
        self, *, places: int = 8, chunk: int | None = None, budget: int | None = None, prefixes: int = 0
    ) -> Engine:
        """Return an engine for requests to this mixture and all others of its base model and bank.

        Args:
            places: answers that are written at once.
            chunk: tokens of prompts that a step reads at most, counted for every row; None for what suits the device.
            budget: bytes for base model, experts, router and cache, which are counted now and then; None for any.
            prefixes: how many of these may keep prompts for later ones that begin alike and run the same experts.

        Raises:
            CoterieError: when there is nothing left for a cache.
        """
        if budget is not None:
            self.layers.load()
        slots = Slots(self.backbone, budget, prefixes, partial(held_bytes, self, device=self.backbone.device))
        return Engine(self.backbone, self.layers, slots, places=places, chunk=chunk)

    def requests(
        self,
        rows: Sequence[TokenRow],
        limits: Sequence[int],
        draws: Sequence[SamplingSettings],
        routing: Routing | None = None,
    ) -> list[Request]:
        """Ask for answers of at most so many tokens; the weights are `routing` where it is known, else the router's."""
        if (rerouting := self._rerouting) is not None:
            routings: list[Routing | Rerouting] = [rerouting] * len(rows)
        else:
            aligned = (self.router.start(rows) if routing is None else routing).aligned(self.bank.names)
            routings = [aligned.take([number]) for number in range(len(rows))]
        end_ids = self.prompts.end_ids
        parts = zip(rows, routings, limits, strict=True)
        return [Request(row, own, self.combiner, limit, tuple(draws), end_ids) for row, own, limit in parts]

    @cached_property
    def _rerouting(self) -> Rerouting | None:
        """How weights change while answers are written, if they do; requests that share it are weighed together."""
        router = self.router
        if router.every is None:
            return None
        return Rerouting(router.growing, router.weigh, self.bank.names, router.every, router.cache == "recompute")

    def _completions(
        self,
        examples: Sequence[Example] | None,
        rows: Sequence[TokenRow],
        routing: Routing | None,
        draws: Sequence[Sequence[SamplingSettings]],
        batch_size: int,
        limits: Sequence[int],
        progress: Callable[[int], object] | None = None,
    ) -> list[list[Completion]]:
        """Draw answers of at most so many tokens for every row, in the rows' order."""
        started = self.router.start(rows) if routing is None and not self.reroutes else routing
        pairs = zip(self.requests(rows, limits, (), started), draws, strict=True)
        requests = [replace(request, draws=tuple(own)) for request, own in pairs]
        engine = self.engine(places=batch_size, chunk=WHOLE_PROMPTS)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))  # those of similar length are read together
        places = {engine.submit(requests[i]): i for i in order}
        tokens: list[list[list[Token]]] = [[[] for _ in own] for own in draws]
        left = {handle: len(draws[i]) for handle, i in places.items()}
        for token in _tokens(engine):
            tokens[places[token.request]][token.draw].append(token)
            left[token.request] -= token.finish_reason is not None
            if progress and token.finish_reason and not left[token.request]:
                progress(1)
        if started is not None and started.gates and routing is None:  # their weights are known now
            columns = [self.bank.index(name) for name in started.experts]
            started = replace(started, weights=torch.tensor([drawn[0][0].weights for drawn in tokens])[:, columns])
        shares = started and started.normalized()
        result = []
        for number, drawn in enumerate(tokens):
            question = examples[number].instruction if examples else ""
            weights = shares.row(number) if shares else None
            result.append([completion(question, own, weights, self.bank.names) for own in drawn])
        return result

    def stream(
        self, prompt: Prompt | Sequence[Prompt], *, top_k_experts: int | None = None, **sampling: Any
    ) -> Iterator[Token]:  # noqa: ANN401
        """Answer one prompt, giving each token with its text as soon as it is certain.

        Raises:
            CoterieError: for an empty prompt or several, a setting that does not fit, or a combiner that needs finished
                answers.
        """
        if self.combiner.finishes_answers:
            raise CoterieError("combiner 'texts' lets finished answers vote, so it cannot stream; leave --stream out")
        if len(examples := as_examples(prompt)) != 1:
            raise CoterieError(f"a stream answers one prompt, but {len(examples)} are given; use generate for several")
        rows = self.tokens(examples)
        mixture = self if top_k_experts is None else self.replace(router=keep_top(self.router, top_k_experts))
        settings = from_flat(SamplingSettings, sampling, ("top_k_experts",))
        engine = mixture.engine(places=1)
        for request in mixture.requests(rows, [longest_answer(settings, examples[0])], [settings]):
            engine.submit(request)
        yield from _tokens(engine)

    # ------------------------------------------------------------------------------------------------ likelihood

    def score(self, prompts: Prompt | Sequence[Prompt], responses: str | Sequence[str]) -> Likelihoods:
        """Say how likely responses to prompts are, as answers of the mixture that end where the responses end.

        Args:
            prompts: questions, or one of them.
            responses: an answer to each.

        Raises:
            CoterieError: for an empty text, another number of responses than of prompts, or a combiner or router that
                scores no text.
        """
        examples = as_examples(prompts)
        texts = [responses] if isinstance(responses, str) else responses
        if len(texts) != len(examples):
            raise CoterieError(f"every prompt is scored with one response, but {len(examples)} have {len(texts)}")
        if self.combiner.finishes_answers:
            raise CoterieError("combiner 'texts' lets finished answers vote, so it scores none; use another one")
        rows = []
        for number, (example, text) in enumerate(zip(examples, texts, strict=True), start=1):
            if not text.strip():
                raise CoterieError(f"response {number} is empty; give some text")
            rows.append(self.prompts.row(replace(example, messages=(*example.prompt, Message("assistant", text)))))
        check_lengths(rows, self.backbone.positions, [f"prompt {number + 1}" for number in range(len(rows))])
        routing = self.router.start([row.prompt() for row in rows])
        found = self.score_rows(rows, routing)
        return Likelihoods(-found.nll[0] * found.tokens, found.tokens)

    def score_rows(self, rows: Sequence[TokenRow], routing: Routing, label: str = "") -> Scores:
        """Score references under the mixture's own combiner; one vote. Without a label no progress is shown.

        Where weights change while an answer is written, they do so along the reference.
        """
        if not self.reroutes:
            aligned = routing.aligned(self.bank.names)
            return score_planned(self.backbone, self.layers, self.combiner, aligned, rows, None, label)
        nll, tokens = torch.zeros(1, len(rows)), torch.zeros(len(rows))
        with steps(label and f"likelihood of {label}", len(rows), "row") as done:
            for numbers in by_length(rows, BATCH):
                answers = [rows[i].ids[rows[i].prompt_length :] for i in numbers]
                found = self.score_teacher_forced([rows[i].prompt() for i in numbers], answers)
                for i, scored in zip(numbers, found, strict=True):
                    wanted = [place - rows[i].prompt_length for place in answer_positions(rows[i])]
                    nll[0, i], tokens[i] = -scored.logprobs[wanted].mean(), len(wanted)
                done(len(numbers))
        return Scores(nll, tokens)

    def score_teacher_forced(self, prompts: Sequence[TokenRow], answers: Sequence[Sequence[int]]) -> list[ScoredTokens]:
        """Score the tokens of given answers where weights change along them (see `reroutes`)."""
        rerouting = self._rerouting
        assert rerouting is not None  # whoever asks has looked at `reroutes`
        reader = Reader(self.backbone, self.layers, Slots(self.backbone))
        return score_teacher_forced(reader, self.combiner, rerouting, prompts, answers)


def _tokens(engine: Engine) -> Iterator[Token]:
    """Take steps until all is answered; the first request that fails ends all."""
    for found in engine.run():
        if isinstance(found, Failure):
            raise found.error
        yield found


def elected(example: Example, answers: Sequence[Completion], seed: int) -> Completion:
    """Let answers to a prompt vote by what is read in them, thinking left out; several leading ones are drawn from.

    Where nothing is read, and where the prompt is one for code, an answer votes by its whole text.
    """
    texts = [answer.text.strip() for answer in answers]
    if example.tests is not None:
        return answers[majority(texts, seed)]
    readings = [read_answer(after_thinking(text), example.instruction) for text in texts]
    return answers[majority([reading or text for reading, text in zip(readings, texts, strict=True)], seed)]
