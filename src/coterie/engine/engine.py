"""The engine: requests join and leave at any step, and whatever they ask for, all of them share the forward passes.

A step reads one chunk of the prompts that wait, then one token of every request that writes, and chooses the next ones.
Nobody's tokens hang on who else is there.
"""

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from coterie.backbone.adding import ModelInUse
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone
from coterie.backbone.slots import Slots
from coterie.backbone.steps import CudaGraphs, Record, checked
from coterie.data.devices import Stopwatch, on_device
from coterie.engine.answers import Answer, Waiting, begin, by_rerouting, padded_drafts, planned, weigh
from coterie.engine.prompt_logprobs import score_prompts
from coterie.engine.proposing import Proposing
from coterie.engine.reading import Reader, Text
from coterie.engine.request import Begun, Failure, FinishReason, Load, Request, Rerouting, Token
from coterie.engine.sampling import BatchSampler, Chosen, check_biases
from coterie.engine.sampling_stages import SampledText
from coterie.engine.speculation import Drafting
from coterie.engine.text import TextStream
from coterie.errors import CoterieError
from coterie.settings.sampling import SamplingSettings

CHUNK, CHUNK_ON_CPU = 512, 128
"""Tokens of prompts that a step reads, each counted for every row that reads it: so long do those wait that write."""
RECOUNTED = 16
"""Requests for one count of what others take of the memory, which takes 30 ms."""
WHOLE_PROMPTS = 16384
"""The same where nobody waits for the next token."""

Found = TypeVar("Found")


class Engine:
    """Answers requests on one base model; the thread that takes its steps owns it and the model."""

    def __init__(
        self,
        backbone: Backbone,
        layers: ExpertLayers,
        slots: Slots | None = None,
        *,
        places: int = 8,
        chunk: int | None = None,
        record: Record | None = None,
    ) -> None:
        """Begin without requests.

        Args:
            backbone: the base model.
            layers: the bank's experts.
            slots: the cache; without a budget if none is given.
            places: answers that are written at once.
            chunk: tokens of prompts that a step reads, each counted for every row that reads it: as long do requests
                that write wait for those that join. By default what suits the device.
            record: keeps passes over answers, in steps of a fixed shape; CUDA graphs do, where there is a GPU.
        """
        self._backbone = backbone
        record = checked(CudaGraphs()) if record is None and backbone.device.type == "cuda" else record
        self._reader = Reader(backbone, layers, slots or Slots(backbone), record)
        self._places = places
        self._chunk = chunk or (CHUNK_ON_CPU if backbone.device.type == "cpu" else CHUNK)
        positions = float("inf" if backbone.positions is None else backbone.positions)
        self._longest = positions + 1  # the last one is not read
        self._handles, self._asked = itertools.count(), 0
        self._waiting: deque[Waiting] = deque()
        self._answers: list[Answer] = []
        self._failures: list[Failure] = []
        self._sampler = BatchSampler()
        self._proposing = Proposing(self._reader, self._longest, self._chunk)
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------------------ from outside

    def submit(self, request: Request) -> int:
        """Let a request wait for its turn, and return its handle; requests begin in the order in which they come.

        Raises:
            CoterieError: when it can never be answered: an empty prompt, one that is too long, or too little memory.
        """
        length = len(request.prompt.ids)
        if not length:
            raise CoterieError("a request needs a prompt of at least one token")
        if length >= self._longest:
            raise CoterieError(f"the prompt has {length} tokens, but the base model reads {self._longest - 1:.0f}")
        for settings in request.draws:
            check_biases(settings, self._backbone.output_layer.out_features)
        plan = planned(request)
        self._asked += 1
        if self._asked % RECOUNTED == 1:
            self._reader.slots.recount()
        self._reader.slots.fits(self._proposing.rows(request, plan) * len(request.draws), self._reach(request))
        handle = next(self._handles)
        with self._owned():
            self._waiting.append(Waiting(handle, request, plan))
        return handle

    def cancel(self, handle: int) -> None:
        """End a request with all of its answers, and no further token; nothing happens where it has ended already."""
        with self._owned():
            self._end(handle)

    @property
    def load(self) -> Load:
        """What there is to do; any thread may ask."""
        writing = {answer.handle for answer in list(self._answers)}
        return Load(len(self._waiting), len(writing), self._reader.slots.usage, self._reader.tokens)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or is being answered."""
        return not (self._waiting or self._answers)

    def step(self) -> list[Token | Failure]:
        """Advance every answer that is being written by a token, and read one chunk of the prompts that wait.

        Returns:
            The new tokens, and what ends without one.

        Raises:
            CoterieError: when another thread is in a step, or somebody else runs the model.
        """
        with self._owned():
            self._give_up_late_ones()
            self._admit()
            self._weigh_again()
            writing = [answer for answer in self._answers if answer.text.unread == 1]
            size, started = self._proposing(writing), time.perf_counter()
            passes = self._read(dict.fromkeys(writing, 1), in_steps=True)
            with Stopwatch(self._backbone.device) as chunk_time:
                try:
                    chunk = self._read(self._next_chunk())
                except ModelInUse:
                    if not passes:  # what was read must not be lost; the next step tells
                        raise
                    chunk = []
            tokens = self._choose([*passes, *chunk])
            if len(passes) == 1:
                self._proposing.costs.note(*size, time.perf_counter() - started - chunk_time.seconds)
            failures, self._failures = self._failures, []
            return [*tokens, *failures]

    def run(self, requests: Iterable[Request] = ()) -> Iterator[Token | Failure]:
        """Submit requests and take steps until all is answered."""
        for request in requests:
            self.submit(request)
        while not self.is_idle:
            yield from self.step()

    @contextmanager
    def _owned(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise CoterieError(
                "this engine is in the middle of a step, of another thread or further up; let one thread own the "
                "engine and the model, and put requests for it into a queue"
            )
        try:
            yield
        finally:
            self._lock.release()

    # ------------------------------------------------------------------------------------------- joining, leaving

    def _admit(self) -> None:
        """Let those who wait join while there is room, in their order."""
        joined: list[Answer] = []
        while self._waiting and self._has_room(self._waiting[0]):
            handle, request, plan = self._waiting.popleft()
            text = self._reader.open(request.prompt.ids, plan, self._reach(request))
            if not isinstance(request.routing, Rerouting) and request.prompt_logprobs is None:
                self._reader.recall(text)
            own = self._drawn_by(text, request, request.draws[0])
            joined.append(Answer(handle, request, text, Begun(time.monotonic(), text.read), known=len(text.ids), **own))
            self._answers.append(joined[-1])
        for rerouting, group in by_rerouting(joined):
            for answers, texts in self._apart(group, partial(begin, rerouting)):
                for answer, text in zip(answers, texts, strict=True):
                    answer.followed, answer.is_due = text, True

    def _has_room(self, waiting: Waiting) -> bool:
        """Tell whether a request can join now; what those that joined will still take is counted."""
        draws, rows = len(waiting.request.draws), self._proposing.rows(waiting.request, waiting.plan)
        to_part = [own for own in self._answers if not own.written]
        taken = len(self._answers) + sum(len(own.request.draws) - 1 for own in to_part)
        if taken and taken + draws > self._places:
            return False
        rows_to_come = sum(len(own.request.draws) * self._proposing.rows(own.request, own.text.plan) for own in to_part)
        rows_to_come -= sum(len(own.text.rows) for own in to_part) - self._proposing.unclaimed(self._answers)
        with suppress(CoterieError):  # one that could never join was refused when it came
            return self._reader.slots.fits(rows * draws + rows_to_come, self._reach(waiting.request))
        return False

    def _reach(self, request: Request) -> int:
        """Return how many tokens of a request's text are read at most; the last one is not."""
        return int(min(self._longest, len(request.prompt.ids) + request.limit)) - 1

    def _give_up_late_ones(self) -> None:
        requests = {own.handle: own.request for own in (*self._waiting, *self._answers)}
        for handle, request in requests.items():
            if request.deadline is not None and request.deadline <= time.monotonic():
                self._fail(handle, TimeoutError("the deadline of the request has passed"))

    def _apart(
        self, answers: Sequence[Answer], act: Callable[[Sequence[Answer]], Found]
    ) -> list[tuple[Sequence[Answer], Found]]:
        """Do something for answers together; where it breaks, for each request alone, which ends if it breaks again."""
        if not answers:
            return []
        handles = dict.fromkeys(answer.handle for answer in answers)
        try:
            return [(answers, act(answers))]
        except ModelInUse:
            raise
        except Exception as error:  # whatever a router, a model's code or want of memory raises
            if len(handles) == 1:
                self._fail(answers[0].handle, error)
                return []
        return [found for handle in handles for found in self._apart([a for a in answers if a.handle == handle], act)]

    def _fail(self, handle: int, error: Exception) -> None:
        self._end(handle)
        self._failures.append(Failure(handle, error))

    def _end(self, handle: int) -> None:
        self._waiting = deque(own for own in self._waiting if own.handle != handle)
        for answer in [own for own in self._answers if own.handle == handle]:
            self._leave(answer)

    def _leave(self, answer: Answer) -> None:
        """Free an answer's place for the last one, whose rows of the cache may have to move then, and no others."""
        self._reader.close(answer.text)
        self._proposing.forget(answer)
        place = self._answers.index(answer)
        last = self._answers.pop()
        if last is not answer:
            self._answers[place] = last

    # ------------------------------------------------------------------------------------------------ reading

    def _weigh_again(self) -> None:
        """Renew the weights of all answers that are due for it, those together that are weighed by the same."""
        for rerouting, group in by_rerouting([answer for answer in self._answers if answer.is_due]):
            for answers, routings in self._apart(group, partial(weigh, rerouting)):
                for answer, routing in zip(answers, routings, strict=True):
                    answer.shares, answer.is_due = tuple(routing.normalized().weights[0].tolist()), False
                    plan = answer.request.combiner.plan(routing)[0]
                    self._reader.change(answer.text, plan, recompute=rerouting.recompute and answer.written > 0)

    def _next_chunk(self) -> dict[Answer, int]:
        """Say how many tokens to read of the prompts that wait, in their order: of others as many as of the first."""
        counts: dict[Answer, int] = {}
        rows = longest = 0
        for answer in sorted((a for a in self._answers if a.text.unread > 1), key=lambda a: a.handle):
            own = len(answer.text.rows)
            longest = longest or min(answer.text.unread, max(1, self._chunk // own))
            rows += own
            if counts and rows * longest > self._chunk:
                break
            counts[answer] = min(longest, answer.text.unread)
        return counts

    def _read(
        self, counts: dict[Answer, int], *, in_steps: bool = False
    ) -> list[tuple[Sequence[Answer], list[Tensor]]]:
        """Read the next tokens of texts, as many as these counts at most; all that is left where a pass has broken."""

        def read(answers: Sequence[Answer]) -> list[Tensor]:
            texts = [answer.text for answer in answers]
            own = [min(counts[answer], answer.text.unread) for answer in answers]
            try:
                watched = any(answer.text.plan.gates and not answer.written for answer in answers)
                return self._reader.read(texts, own, watch_gates=watched, in_steps=in_steps)
            except ModelInUse:
                raise
            except Exception:
                for text, count in zip(texts, own, strict=True):
                    self._reader.restore(text, count)
                counts.update((answer, len(answer.text.ids)) for answer in answers)  # alone, all of it
                raise

        passes = self._apart(list(counts), read)
        pairs = [pair for answers, hidden in passes for pair in zip(answers, hidden, strict=True)]
        score_prompts(self._backbone, pairs)
        for answer, states in pairs:
            self._follow(answer, states[0, : states.shape[1] - len(answer.text.drafts)])
        return passes

    def _follow(self, answer: Answer, states: Float[Tensor, "position width"]) -> None:
        """Show the states of what was read last to whoever weighs the experts again."""
        if answer.known < answer.text.read and isinstance(rerouting := answer.request.routing, Rerouting):
            new = states[answer.known - answer.text.read :]
            answer.followed = rerouting.texts.append_states(answer.followed, new)
            answer.known = answer.text.read

    # ------------------------------------------------------------------------------------------------ choosing

    def _choose(self, passes: Sequence[tuple[Sequence[Answer], list[Tensor]]]) -> list[Token]:
        """Choose the next tokens of all answers whose texts were read to the end; the draws of a request part here."""
        choosing: list[Answer] = []
        states: list[Tensor] = []
        logits: list[Tensor] = []
        for answers, hidden in passes:
            ready = [place for place, answer in enumerate(answers) if not answer.text.unread]
            for answer in (answers[place] for place in ready):
                if not answer.written and not isinstance(answer.request.routing, Rerouting):
                    self._reader.remember(answer.text)
            if ready:
                plan = self._reader.planned([answer.text for answer in answers])
                drawn = [(place, own) for place in ready for own in self._drawn(answers[place])]
                sizes = [1 + len(answer.text.drafts) for answer in answers]
                pairs = zip(hidden, sizes, strict=True)
                last = [pad(own[:, -size:], (0, 0, 0, max(sizes) - size)) for own, size in pairs]
                with torch.inference_mode():
                    own = plan.logits(self._backbone, torch.cat(last))
                    places = [place for place, _ in drawn]
                    logits.append(own if places == [*range(len(own))] else own[on_device(places, own.device)])
                choosing += [answer for _, answer in drawn]
                states += [hidden[place] for place, _ in drawn]
        if not choosing:
            return []
        drafts = padded_drafts(choosing, logits[0].device)
        longest = 1 if drafts is None else 1 + drafts.shape[1]
        joined = torch.cat([pad(own, (0, 0, 0, longest - own.shape[1])) for own in logits])
        found = self._sampler.choose([answer.sampled for answer in choosing], joined, drafts)
        triples = zip(choosing, found, states, strict=True)
        return [token for answer, chosen, own in triples for token in self._write(answer, chosen, own[0])]

    def _write(self, answer: Answer, chosen: Sequence[Chosen], states: Float[Tensor, "position width"]) -> list[Token]:
        """Write the proposals that were right and one token more, as far as the answer goes."""
        proposed, right = len(answer.text.drafts), len(chosen) - 1
        answer.drafting.learn([token.id for token in chosen])
        self._reader.keep(answer.text, right)
        tokens = [token for one in chosen for token in self._advance(answer, one)]
        if right and answer in self._answers:
            self._follow(answer, states[: states.shape[0] - proposed + right])
        return [token._replace(speculated=(proposed, right)) for token in tokens[:1]] + tokens[1:]

    def _drawn(self, answer: Answer) -> list[Answer]:
        """Return an answer; behind the prompt, also the others that are drawn from it, which go on by themselves."""
        found = [answer]
        for draw, settings in enumerate([] if answer.written else answer.request.draws[1:], start=1):
            text = self._reader.fork(answer.text)
            found.append(replace(answer, text=text, draw=draw, **self._drawn_by(text, answer.request, settings)))
        self._answers += found[1:]
        return found

    def _drawn_by(self, text: Text, request: Request, settings: SamplingSettings) -> dict[str, Any]:
        """Return what an answer begins with whose tokens are drawn by these settings and go behind a text."""
        end_ids = self._backbone.stop_ids | request.end_ids
        return {
            "sampled": SampledText(settings, text.ids),
            "stream": TextStream(self._backbone.tokenizer, settings.stop, end_ids),
            "drafting": Drafting.by(settings.speculate),
        }

    def _advance(self, answer: Answer, chosen: Chosen) -> list[Token]:
        """Write a token behind an answer, which may end with it."""
        if answer not in self._answers:  # another answer to its prompt has just failed
            return []
        if not math.isfinite(chosen.logprob):
            self._fail(answer.handle, CoterieError("the model's numbers are no longer finite; try --dtype float32"))
            return []
        token = chosen.id
        request, stream = answer.request, answer.stream
        answer.text.ids.append(token)
        text = stream.push(token)
        reason: FinishReason | None = None
        if stream.stopped:
            reason = "stop"
        elif len(answer.text.ids) >= self._longest or answer.written >= request.limit:
            reason, text = "length", text + stream.finish()
        gates = answer.text.gate_weights
        shares = tuple(gates.tolist()) if gates is not None and answer.written == 1 else answer.shares
        if reason:
            self._leave(answer)
        elif isinstance(rerouting := request.routing, Rerouting):
            answer.followed = rerouting.texts.append(answer.followed, [token])
            answer.is_due = answer.written % rerouting.every == 0
        token = Token(answer.handle, token, chosen.logprob, text, reason, shares, answer.draw, chosen.top)
        return [token._replace(begun=answer.begun) if answer.written == 1 else token]
