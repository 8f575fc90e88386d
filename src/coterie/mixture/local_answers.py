"""Experts on this machine: one base model, the adapters of all its experts stacked, several of them in one batch."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone, load_backbone
from coterie.combiners.logits import LogitCombiner
from coterie.data.batching import PromptFormat, TokenRow, by_length, check_lengths, pad
from coterie.data.examples import Example, from_prompt
from coterie.engine.decoding import DecodingBatch
from coterie.errors import CoterieError
from coterie.experts.answering import Done, Question, Reply, failed
from coterie.experts.bank import ExpertBank, load_adapter
from coterie.grading.lengths import ANSWER_TOKENS
from coterie.lora import Adapter
from coterie.mixture.scoring import score_votes
from coterie.routers.base import Routing
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
        rows = {}
        config = self.backbone.model.config.get_text_config()
        window = self.backbone.positions or getattr(config, "max_position_embeddings", None)
        for number, question in enumerate(questions):
            try:
                row = self._row(question)
            except CoterieError as error:
                done(number, failed(error))
                continue
            if window is not None and len(row.ids) >= window:
                done(number, failed(f"the question has {len(row.ids)} tokens, the model reads {window}"))
                continue
            rows[number] = row
        settings = {questions[number].sampling.model_dump_json(): questions[number].sampling for number in rows}
        for key, sampling in settings.items():
            numbers = [number for number in rows if questions[number].sampling.model_dump_json() == key]
            for places in by_length([rows[number] for number in numbers], self._batch_size):
                batch = [numbers[place] for place in places]
                self._run(batch, [questions[n].expert for n in batch], [rows[n] for n in batch], sampling, done)

    def close(self) -> None:
        """Nothing to close; memory is freed with the object."""

    def _row(self, question: Question) -> TokenRow:
        if question.expert in self._broken:
            raise CoterieError(self._broken[question.expert])
        return self._prompts[question.expert].row(Example("", question.messages)).prompt()

    def _run(
        self,
        numbers: Sequence[int],
        experts: Sequence[str],
        rows: Sequence[TokenRow],
        sampling: SamplingSettings,
        done: Done,
    ) -> None:
        """Decode a batch; if it breaks, its experts one by one, then its questions one by one."""
        finished: set[int] = set()
        replies = self._decoded(experts, rows, sampling)
        while True:
            try:
                place, reply = next(replies)
            except StopIteration:
                return
            except Exception as error:  # whatever a model's code raises, also for want of memory
                broken = error
                break
            finished.add(place)
            done(numbers[place], reply)
        left = [place for place in range(len(numbers)) if place not in finished]
        names = dict.fromkeys(experts[place] for place in left)
        single = [[place] for place in left]
        for part in [[p for p in left if experts[p] == name] for name in names] if len(names) > 1 else single:
            own = [numbers[place] for place in part]
            if len(part) == len(numbers):
                done(own[0], failed(broken))
            else:
                self._run(own, [experts[p] for p in part], [rows[p] for p in part], sampling, done)

    def _decoded(
        self, experts: Sequence[str], rows: Sequence[TokenRow], sampling: SamplingSettings
    ) -> Iterator[tuple[int, Reply]]:
        """Yield every row's place and reply as soon as it is complete."""
        started = time.perf_counter()
        batch = DecodingBatch(
            self.backbone,
            self.layers,
            LogitCombiner(),
            [row.ids for row in rows],
            self._one_hot(experts),
            [sampling],
            [sampling.max_new_tokens or ANSWER_TOKENS] * len(rows),
            end_ids=self._prompts[experts[0]].end_ids,
        )
        texts, counts = [""] * len(rows), [0] * len(rows)
        for token in batch.run():
            texts[token.request] += token.text
            counts[token.request] += 1
            if token.finish_reason:
                seconds = (time.perf_counter() - started) / len(rows)
                prompt = len(rows[token.request].ids)
                reply = Reply(texts[token.request], prompt, counts[token.request], token.finish_reason, seconds)
                yield token.request, reply

    def _one_hot(self, experts: Sequence[str]) -> Routing:
        weights = torch.zeros(len(experts), len(self.bank))
        weights[range(len(experts)), [self.bank.index(name) for name in experts]] = 1.0
        return Routing(self.bank.names, weights)

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
            plan = LogitCombiner().plan(self._one_hot([expert] * len(numbers)))
            ids = [rows[number].ids for number in numbers]
            batch = pad(ids, self.backbone.pad_id, side="left", device=self.backbone.device)
            with self.layers.running(self.layers.mix(plan)):
                hidden = self.backbone.hidden(*batch)[:, -1]
            logprobs = self.backbone.head(hidden).log_softmax(dim=-1).cpu()  # [row, vocabulary]
            found[numbers] = torch.stack([logprobs[:, own].logsumexp(dim=1) for own in tokens], dim=1)
        return found

    def likelihoods(self, examples: Sequence[Example]) -> Float[Tensor, "expert row"]:
        """Return every expert's mean log-likelihood per token of the reference answers, in nats.

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
        return found
