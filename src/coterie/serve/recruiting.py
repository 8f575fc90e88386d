"""Recruited experts behind the API: their answers to a question, and the aggregator's, which is streamed."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace

from fastapi import Request
from fastapi.responses import Response

from coterie.combiners.aggregate import VOTES
from coterie.data.examples import Example
from coterie.engine.text import begun
from coterie.experts.answering import Question, Reply
from coterie.grading.grade import after_thinking
from coterie.methods.symbolic.answer import ExpertAnswer, Outcome, RecruitingPlan, given_to, one_of, synthesis_ask
from coterie.mixture.local_answers import LocalAnswerer
from coterie.serve.answering import send
from coterie.serve.errors import ApiError
from coterie.serve.frames import Frames, Piece, Usage
from coterie.serve.metrics import Recounted
from coterie.serve.recruits import RecruitCell, RecruitDesk
from coterie.serve.schemas import AnswerRequest, CoterieField
from coterie.serve.token_bytes import TokenBytes
from coterie.settings.sampling import SamplingSettings

TAGS = ("<think>", "</think>")


async def respond_recruited(
    request: Request, body: AnswerRequest, form: Callable[..., Frames], cell: RecruitCell, question: Example
) -> Response:
    """Let recruited experts answer a question, in a form that makes the frames of the answer.

    Raises:
        ApiError: for what they cannot be asked for, or when none gave an answer.
        TimeoutError: when they took too long.
    """
    check_asked(body)
    sampling = SamplingSettings(**body.sampling(), max_new_tokens=body.limit)
    server, desk, came = request.app.state, cell.desk, time.monotonic()
    timeout = server.settings.capacity.timeout
    async with asyncio.timeout(timeout):
        work = await ask_recruits(desk, cell.root, question, sampling, came + timeout)
    shares = {name: share for name, share in work.plan.routing.normalized().row(0).items() if share}
    usage = Usage(work.count("prompt_tokens"), work.count("tokens"))
    frames = form(
        body.model,
        Unknown(),
        usage,
        usage_chunk=bool(body.stream_options and body.stream_options.include_usage),
        usage_always=bool(body.stream_options and body.stream_options.continuous_usage_stats),
        experts=desk.fitted.pool.names if body.coterie.detail else (),
        weights={0: shares},
    )
    told = Recounted(cell.id, came, shares, work.spoken, usage)
    pieces = server.metrics.recounted(told, work.pieces(desk, told), request.state.facts)
    return await send(pieces, frames, body, 1, {})


def check_asked(body: AnswerRequest) -> None:
    """Refuse what finished answers of experts of any kind cannot give."""
    given = {
        "n": body.n > 1,
        "logprobs": body.alternatives is not None,
        "lora": body.lora is not None,
        "coterie": body.coterie.model_copy(update={"detail": False}) != CoterieField(),
    }
    for name, is_given in given.items():
        if is_given:
            raise ApiError(f"recruited experts answer in text, each once; leave {name} out", param=name)


class Unknown(TokenBytes):
    """The vocabulary of answers whose tokens nobody sees."""

    def __init__(self) -> None:
        """Know nothing."""


@dataclass(frozen=True)
class Recruited:
    """The answers of recruited experts to one question, and what is to make one of them.

    Attributes:
        question: what was asked.
        plan: who was recruited.
        given: their answers.
        synthesis: what the aggregator is asked, where it is an expert.
        outcome: the one answer, where it is there already.
        deadline: until when all is to be answered, by `time.monotonic`.
    """

    question: Example
    plan: RecruitingPlan
    given: tuple[ExpertAnswer, ...]
    synthesis: Question | None
    outcome: Outcome | None
    deadline: float

    @property
    def spoken(self) -> Counter[str]:
        """How many tokens each expert has written; one that was drawn again without chance wrote once."""
        replies = {id(own.reply): (own.expert, own.reply) for own in self.given}
        if self.outcome and self.outcome.synthesis and self.synthesis:
            replies[id(self.outcome.synthesis)] = (self.synthesis.expert, self.outcome.synthesis)
        spoken = Counter[str]()
        for expert, reply in replies.values():
            spoken[expert] += reply.tokens
        return spoken

    def count(self, name: str) -> int:
        """Add up a count of the replies."""
        replies = self.outcome.replies if self.outcome else {id(own.reply): own.reply for own in self.given}.values()
        return sum(getattr(reply, name) for reply in replies)

    async def pieces(self, desk: RecruitDesk, told: Recounted) -> AsyncGenerator[Piece]:
        """Yield the one answer as it comes; the aggregator's thinking is left out."""
        outcome = self.outcome
        if outcome is None:
            async with aclosing(self._streamed(desk, told)) as pieces:
                async for piece in pieces:
                    yield piece
                    if piece.finish_reason:
                        return
            outcome = one_of(self.plan, 0, self.given, Reply("", finish_reason="failed"), self.question)
        if not outcome.text:
            reasons = (own.reply.error for own in self.given if own.reply.error)
            raise ApiError(f"no expert has given an answer: {next(reasons, 'all were empty')}", 502, code="no_answer")
        yield Piece(0, outcome.text, (), "length" if outcome.finish_reason == "length" else "stop", written=0)

    async def _streamed(self, desk: RecruitDesk, told: Recounted) -> AsyncGenerator[Piece]:
        """Yield what a local aggregator writes; nothing ends where it writes no answer."""
        assert self.synthesis is not None  # or there would be an outcome
        synthesis, seen = self.synthesis, Seen()
        async with desk.shelf.holding(synthesis.expert) as answerer:
            assert isinstance(answerer, LocalAnswerer)  # endpoints answer as a whole
            asked = await desk.worker.call(lambda: answerer.request(synthesis))
            told.usage.prompt += len(asked.prompt.ids)
            asked = replace(asked, deadline=self.deadline)
            async with aclosing(desk.worker.answer(answerer.engine, [asked])) as tokens:
                async for token in tokens:
                    told.spoken[synthesis.expert] += 1
                    text = seen.push(token.text, is_last=token.finish_reason is not None)
                    yield Piece(0, text, finish_reason=token.finish_reason if seen.text else None)


class Seen:
    """What is to be seen of an answer that grows: not its thinking, and no space around it."""

    def __init__(self) -> None:
        """Begin empty."""
        self.text = ""
        self._written = ""

    def push(self, text: str, *, is_last: bool) -> str:
        """Take more of the answer, and return what is new to see."""
        self._written += text
        certain = len(self._written) - (0 if is_last else begun(self._written, TAGS))
        whole = after_thinking(self._written[:certain])
        new = whole.removeprefix(self.text) if whole.startswith(self.text) else ""
        self.text += new
        return new


async def ask_recruits(
    desk: RecruitDesk, method: str, question: Example, sampling: SamplingSettings, deadline: float
) -> Recruited:
    """Recruit experts for a question and get their answers, all at once.

    The aggregator is asked here only where its answer cannot be streamed.

    Raises:
        CoterieError: when an expert cannot be asked.
    """
    fitted, shelf = desk.fitted, desk.shelf
    skills = await skills_of(desk, question, deadline)
    plan = await desk.worker.call(lambda: fitted.recruiting_plan(method, [question], skills, sampling))
    aggregator, questions = plan.aggregators[0], plan.asks(0, question)
    given = given_to(question, plan, 0, questions, await shelf.ask(questions, deadline))
    texts = [text for own in given if (text := after_thinking(own.reply.text))]
    if not texts or aggregator in VOTES:
        return Recruited(question, plan, given, None, one_of(plan, 0, given, None, question), deadline)
    synthesis = synthesis_ask(aggregator, question, texts, plan.sampling)
    if not desk.scheduler.group(aggregator).is_remote:
        return Recruited(question, plan, given, synthesis, None, deadline)
    replies = await shelf.ask([synthesis], deadline)
    return Recruited(question, plan, given, synthesis, one_of(plan, 0, given, replies[0], question), deadline)


async def skills_of(desk: RecruitDesk, question: Example, deadline: float) -> list[tuple[str, ...]]:
    """Return the skills that a question needs, for which an expert may have to be asked."""
    fitted, scheduler = desk.fitted, desk.scheduler
    if asks := fitted.skill_asks([question]):
        replies = await desk.shelf.ask(asks, deadline)
        return await desk.worker.call(lambda: fitted.skills(scheduler, [question], replies))
    async with AsyncExitStack() as stack:
        if fitted.skill_expert is not None:  # chooses, which takes one pass of its model
            await stack.enter_async_context(desk.shelf.holding(fitted.skill_expert))
        return await desk.worker.call(lambda: fitted.skills(scheduler, [question]))
