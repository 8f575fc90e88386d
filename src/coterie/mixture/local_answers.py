"""Experts on this machine: one base model, the adapters of all its experts stacked, several of them in one batch."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone, load_backbone
from coterie.cluster import Elsewhere, done_elsewhere
from coterie.combiners.logits import LogitCombiner
from coterie.data.batching import PromptFormat, TokenRow, by_length, check_lengths
from coterie.data.examples import Example, from_prompt
from coterie.engine.engine import WHOLE_PROMPTS, Engine
from coterie.engine.request import Failure, Request
from coterie.engine.scoring import score_votes, states_at
from coterie.errors import CoterieError
from coterie.experts.answering import Done, Question, Reply, failed
from coterie.experts.bank import ExpertBank, load_adapter
from coterie.grading.lengths import ANSWER_TOKENS
from coterie.lora import Adapter
from coterie.routers.fixed import one_hot
from coterie.settings.groups import ModelSettings, PlacementSettings, SamplingSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalExpert:
    """An expert on a base model: an adapter's folder, or None for the base model itself."""

    adapter: Path | None = None
    system_prompt: str | None = None


def load_local(
    model: str, experts: Mapping[str, LocalExpert], placement: PlacementSettings, batch_size: int
) -> "LocalAnswerer":
    """Load a base model and the adapters of its experts; one that cannot be loaded fails alone.

    Raises:
        CoterieError: when the base model cannot be loaded, or no adapter fits it.
    """
    backbone = load_backbone(ModelSettings(model=model, **placement.model_dump()))
    adapters: dict[str, Adapter] = {}
    broken: dict[str, str] = {}
    for name, expert in experts.items():
        try:
            adapters[name] = {} if expert.adapter is None else load_adapter(expert.adapter, backbone.model)
        except CoterieError as error:
            broken[name] = str(error)
            logger.warning("%s cannot answer: %s", name, error)
    if not adapters:
        raise CoterieError(next(iter(broken.values())))
    prompts = {name: PromptFormat(backbone.tokenizer, experts[name].system_prompt) for name in adapters}
    return LocalAnswerer(backbone, ExpertBank(tuple(adapters), tuple(adapters.values())), prompts, broken, batch_size)


class LocalAnswerer:
    """Answers for all experts of one base model; rows of different experts run in one forward pass."""

    def __init__(
        self,
        backbone: Backbone,
        bank: ExpertBank,
        prompts: Mapping[str, PromptFormat],
        broken: Mapping[str, str] | None = None,
        batch_size: int = 8,
    ) -> None:
        """Stack the experts, of which an empty adapter stands for the base model itself.

        Args:
            backbone: the base model.
            bank: its experts.
            prompts: how each expert's questions are rendered.
            broken: experts that could not be loaded, and why.
            batch_size: questions that are decoded together.
        """
        self.backbone = backbone
        self.bank = bank
        self.layers = ExpertLayers(backbone.model, bank.adapters)
        self._prompts = dict(prompts)
        self._broken = dict(broken or {})
        self._batch_size = batch_size

    def answer(self, questions: Sequence[Question], done: Done) -> None:
        """Answer all questions, those of similar length together; those that cannot be asked fail at once."""
        requests = {}
        config = self.backbone.model.config.get_text_config()
        window = self.backbone.positions or getattr(config, "max_position_embeddings", None)
        for number, question in enumerate(questions):
            try:
                request = self.request(question)
            except CoterieError as error:
                done(number, failed(error))
                continue
            length = len(request.prompt.ids)
            if window is not None and length >= window:
                done(number, failed(f"the question has {length} tokens, the model reads {window}"))
                continue
            requests[number] = request
        engine = Engine(self.backbone, self.layers, places=self._batch_size, chunk=WHOLE_PROMPTS)
        ordered = sorted(requests.items(), key=lambda pair: -len(pair[1].prompt.ids))  # similar ones are read together
        asked = {engine.submit(request): number for number, request in ordered}
        texts, counts, seconds = [""] * len(questions), [0] * len(questions), [0.0] * len(questions)
        while not engine.is_idle:
            started = time.perf_counter()
            found = engine.step()
            share = (time.perf_counter() - started) / max(1, len(found))
            for token in found:
                number = asked[token.request]
                seconds[number] += share
                if isinstance(token, Failure):
                    done(number, failed(token.error))
                    continue
                texts[number] += token.text
                counts[number] += 1
                if token.finish_reason:
                    length = len(requests[number].prompt.ids)
                    done(number, Reply(texts[number], length, counts[number], token.finish_reason, seconds[number]))

    @cached_property
    def engine(self) -> Engine:
        """The engine of requests to these experts that come and go."""
        return Engine(self.backbone, self.layers, places=self._batch_size)

    def request(self, question: Question) -> Request:
        """Return a question as a request to an engine.

        Raises:
            CoterieError: when the expert could not be loaded, or its template does not take the question.
        """
        row = self._row(question)
        routing = one_hot(question.expert, self.bank.names).route([row])
        end_ids = self._prompts[question.expert].end_ids
        limit = question.sampling.max_new_tokens or ANSWER_TOKENS
        return Request(row, routing, LogitCombiner(), limit, (question.sampling,), end_ids)

    def close(self) -> None:
        """Nothing to close; memory is freed with the object."""

    def _row(self, question: Question) -> TokenRow:
        if question.expert in self._broken:
            raise CoterieError(self._broken[question.expert])
        return self._prompts[question.expert].row(Example("", question.messages)).prompt()

    @torch.inference_mode()
    def option_logprobs(
        self, expert: str, questions: Sequence[str], options: Sequence[str]
    ) -> Float[Tensor, "question option"]:
        """Return the log-probability of each option (its first token) right after every question, from one prefill.

        An option counts with and without a space before it, whichever the tokenizer and template lead to.

        Raises:
            CoterieError: when the expert could not be loaded, or two options begin with the same token.
        """
        rows = [self._row(Question(expert, from_prompt(text).messages, SamplingSettings())) for text in questions]
        tokens = []
        for option in options:  # every question ends with the same words of the template
            first, prompts = from_prompt(questions[0]), self._prompts[expert]
            plain, spaced = (prompts.following(first, text) for text in (option, f" {option}"))
            single = len(spaced) == 1 and spaced[0] != plain[0]  # one other token stands for the option after a space
            tokens.append([plain[0], spaced[0]] if single else [plain[0]])
        if len({own[0] for own in tokens}) != len(options):
            raise CoterieError("two options begin with the same token, so they cannot be told apart; use letters")
        found = torch.zeros(len(questions), len(options))
        for numbers in by_length(rows, self._batch_size):
            own = [rows[number] for number in numbers]
            plan = LogitCombiner().plan(one_hot(expert, self.bank.names).route(own))
            states = states_at(self.backbone, self.layers, plan, [row.ids for row in own])
            last = torch.stack([row[0, -1] for row in states])
            logprobs = self.backbone.head(last).log_softmax(dim=-1).cpu()  # [row, vocabulary]
            found[numbers] = torch.stack([logprobs[:, own].logsumexp(dim=1) for own in tokens], dim=1)
        return found

    def likelihoods(self, examples: Sequence[Example]) -> dict[str, Float[Tensor, " row"]]:
        """Return every expert's mean log-likelihood per token of the reference answers, in nats, by its name.

        Experts with the same system prompt share a forward pass.

        Raises:
            CoterieError: when a row cannot be tokenised.
        """
        found = torch.zeros(len(self.bank), len(examples))
        for prompt in dict.fromkeys(own.system_prompt for own in self._prompts.values()):
            experts = [n for n, name in enumerate(self.bank.names) if self._prompts[name].system_prompt == prompt]
            format_ = PromptFormat(self.backbone.tokenizer, prompt)
            votes = torch.eye(len(self.bank))[experts][:, None].expand(-1, len(examples), -1)
            label = ", ".join(self.bank.names[expert] for expert in experts)
            rows = [format_.row(example) for example in examples]
            check_lengths(rows, self.backbone.positions, [f"example {example.id}" for example in examples])
            found[experts] = -score_votes(self.backbone, self.layers, self.bank.names, rows, votes, label).nll
        return dict(zip(self.bank.names, found, strict=True))


class WorkerAnswerer:
    """Answers for the experts of one base model by workers, each of which loads all of them: one expert after another.

    Replies come expert by expert; what a worker was at that died is asked again.
    """

    def __init__(self, elsewhere: Elsewhere) -> None:
        """Load nothing here."""
        self._elsewhere = elsewhere

    def answer(self, questions: Sequence[Question], done: Done) -> None:
        """Answer all questions, each expert's in a task of its own."""
        shares: dict[str, list[int]] = {}
        for number, question in enumerate(questions):
            shares.setdefault(question.expert, []).append(number)
        calls = [(replies_of, ([questions[number] for number in numbers],)) for numbers in shares.values()]
        for place, replies in done_elsewhere(calls, self._elsewhere):
            for number, reply in zip(list(shares.values())[place], replies, strict=True):
                done(number, reply)

    def option_logprobs(
        self, expert: str, questions: Sequence[str], options: Sequence[str]
    ) -> Float[Tensor, "question option"]:
        """Return what `LocalAnswerer.option_logprobs` returns."""
        return self._one(LocalAnswerer.option_logprobs, expert, questions, options)

    def likelihoods(self, examples: Sequence[Example]) -> dict[str, Float[Tensor, " row"]]:
        """Return what `LocalAnswerer.likelihoods` returns."""
        return self._one(LocalAnswerer.likelihoods, examples)

    def close(self) -> None:
        """Nothing to close; workers end with their cluster."""

    def _one(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return next(done_elsewhere([(function, arguments)], self._elsewhere))[1]


def replies_of(answerer: LocalAnswerer, questions: Sequence[Question]) -> list[Reply]:
    """Return the replies to questions, in their order (runs in a worker)."""
    replies: dict[int, Reply] = {}
    answerer.answer(questions, replies.__setitem__)
    return [replies[number] for number in range(len(questions))]
