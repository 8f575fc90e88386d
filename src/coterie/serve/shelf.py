"""The experts of a pool side by side: whoever asks one holds it for as long, and all share engines and memory.

A base model with its experts is loaded when one of them is asked for. It gives way to another one that there is no room
for beside it as soon as nobody asks it any more. Who waits longest comes first, with all who want the same.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from coterie.engine.request import Load
from coterie.experts.answering import Answerer, Question, Reply, failed
from coterie.experts.endpoints import EndpointAnswerer
from coterie.mixture.local_answers import LocalAnswerer
from coterie.mixture.scheduler import ExpertScheduler
from coterie.serve.worker import Worker, WorkerDied


@dataclass(frozen=True, eq=False)
class Waiting:
    """Somebody who waits for an expert."""

    expert: str
    group: str
    entered: asyncio.Future[None]


class Shelf:
    """Asks experts; belongs to the event loop, and lets the worker do what models are needed for."""

    def __init__(self, scheduler: ExpertScheduler, worker: Worker, concurrency: int) -> None:
        """Load nothing yet.

        Args:
            scheduler: loads experts; only the worker's thread touches it.
            worker: owns their models.
            concurrency: questions that one endpoint gets at the same time.
        """
        self._scheduler = scheduler
        self._worker = worker
        self._concurrency = concurrency
        self._queue: list[Waiting] = []
        self._users: Counter[str] = Counter()  # questions that each group is asked
        self._turns: dict[str, asyncio.Semaphore] = {}

    @property
    def load(self) -> Load:
        """What there is to do: questions that wait for their expert, and those that are asked; any thread may ask."""
        return Load(len(self._queue), self._users.total(), 0.0, 0)

    async def ask(self, questions: Sequence[Question], deadline: float) -> list[Reply]:
        """Get the replies to questions, all at once, in their order; equal ones are asked once.

        An expert that fails costs its own replies.

        Raises:
            WorkerDied: when nothing is done any more.
        """
        keys = [self._scheduler.key(question) for question in questions]
        distinct = dict(zip(keys, questions, strict=True))
        replies = await asyncio.gather(*(self._reply(question, deadline) for question in distinct.values()))
        by_key = dict(zip(distinct, replies, strict=True))
        return [by_key[key] for key in keys]

    @asynccontextmanager
    async def holding(self, expert: str) -> AsyncIterator[Answerer]:
        """Context manager: an expert's answerer, loaded, which stays so until the end; not within another one.

        Raises:
            CoterieError: when it cannot be loaded, or not within the memory.
        """
        group = self._scheduler.group(expert).name
        waiting = Waiting(expert, group, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._let_in()
        try:
            await waiting.entered
            yield await self._worker.call(lambda: self._scheduler.loaded(expert, keep=[*+self._users]))
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)
            else:
                self._users[group] -= 1
            self._let_in()

    def _let_in(self) -> None:
        """Let in who has waited longest, with all who wait for the same, while there is room for them."""
        while self._queue and self._scheduler.fits_beside(self._queue[0].expert, [*+self._users]):
            group = self._queue[0].group
            for waiting in [one for one in self._queue if one.group == group]:
                self._queue.remove(waiting)
                self._users[group] += 1
                if not waiting.entered.done():  # or it was given up a moment ago
                    waiting.entered.set_result(None)

    async def _reply(self, question: Question, deadline: float) -> Reply:
        started = time.monotonic()
        try:
            async with self.holding(question.expert) as answerer:
                if isinstance(answerer, LocalAnswerer):
                    return await self._written(answerer, question, deadline, started)
                assert isinstance(answerer, EndpointAnswerer)  # there is no third kind
                async with self._turns.setdefault(question.expert, asyncio.Semaphore(self._concurrency)):
                    return await answerer.reply(question)
        except WorkerDied:
            raise
        except Exception as error:  # noqa: BLE001 - a model or a library may raise anything; the others go on
            return failed(error, time.monotonic() - started)

    async def _written(self, answerer: LocalAnswerer, question: Question, deadline: float, started: float) -> Reply:
        """Return what an expert on this machine writes."""
        request = replace(await self._worker.call(lambda: answerer.request(question)), deadline=deadline)
        texts, reason = [], None
        async with aclosing(self._worker.answer(answerer.engine, [request])) as tokens:
            async for token in tokens:
                texts.append(token.text)
                reason = token.finish_reason
        assert reason is not None  # or an error would have been raised
        length = len(request.prompt.ids)
        return Reply("".join(texts), length, len(texts), reason, time.monotonic() - started)
