"""The worker: one thread owns all engines and all base models, and nobody else touches either.

Whoever wants something of a model asks here, and gets it on the event loop. The thread takes a step of every engine
that has requests, in turn; between two steps it does what else was asked, in the order in which it was, for a moment.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from coterie.engine.engine import Engine
from coterie.engine.request import Failure, Request, Token
from coterie.errors import CoterieError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PATIENCE = 2.0  # seconds
MOMENT = 0.05
"""Seconds of jobs after which those who write get their next step, however many jobs wait; one job is never cut."""


class WorkerDied(CoterieError):
    """The worker does nothing any more: it was stopped, or a step has broken in a way that no request caused."""


class Worker:
    """Answers requests on engines, and calls functions, in a thread of its own, for the length of a `with`."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[Engine, dict[int, Callable[[Token | Failure], None]]] = {}
        self._death: WorkerDied | None = None
        self._door = threading.Lock()  # behind a death no job comes in, which nobody would do
        self.stepped: Callable[[int], object] = lambda tokens: None  # is told how many tokens a step has read
        self._thread = threading.Thread(target=self._run, name="coterie-worker", daemon=True)

    def __enter__(self) -> "Worker":
        """Begin to work."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop after the present step; a job that takes long, such as loading, is left behind."""
        self._jobs.put(None)
        if self._thread is not threading.current_thread():  # which may be the last one that knows of it
            self._thread.join(PATIENCE)

    # ------------------------------------------------------------------------------------------ from the event loop

    @property
    def is_alive(self) -> bool:
        """Whether what is asked will be done."""
        return self._death is None and self._thread.is_alive()

    @property
    def is_busy(self) -> bool:
        """Whether the thread has not ended; behind the `with`, because something takes too long."""
        return self._thread.is_alive()

    async def call(self, function: Callable[[], Result]) -> Result:
        """Let the worker call a function between two steps, and return what it returns.

        Raises:
            WorkerDied: when nothing is done any more.
        """
        return await asyncio.wrap_future(self.put(function))

    async def answer(self, engine: Engine, requests: Sequence[Request]) -> AsyncGenerator[Token]:
        """Yield the tokens of requests as they come, each with its request's place among these in place of a handle.

        When the generator is closed, all that is left of the requests ends before the next step.

        Raises:
            CoterieError: as `Engine.submit`.
            WorkerDied: when nothing is done any more.
            Exception: what ended one of the requests, a TimeoutError for its deadline; the others end with it.
        """
        loop, results = asyncio.get_running_loop(), asyncio.Queue[Token | Failure]()
        handles: list[int] = []

        def push(found: Token | Failure) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody is there any more
                loop.call_soon_threadsafe(results.put_nowait, found)

        def submit() -> None:
            for request in requests:
                handles.append(engine.submit(request))
                self._listeners.setdefault(engine, {})[handles[-1]] = push

        try:
            await self.call(submit)
            left = {handle: len(request.draws) for handle, request in zip(handles, requests, strict=True)}
            while any(left.values()):
                found = await results.get()
                if isinstance(found, Failure):
                    raise found.error
                left[found.request] -= found.finish_reason is not None
                yield found._replace(request=handles.index(found.request))
        finally:
            self.put(lambda: self._end(engine, handles))

    def put(self, function: Callable[[], Result]) -> Future[Result]:
        """Let the worker call a function between two steps; any thread may ask."""
        future: Future[Result] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._death:
                    raise self._death
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
                future.set_exception(error)

        with self._door:
            if self._death:
                future.set_exception(self._death)
            else:
                self._jobs.put(job)
        return future

    # --------------------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        """Do jobs as they come, and steps while there are none or they have taken a moment, until the end."""
        taken = 0.0  # by jobs since the last step
        while True:
            is_idle = all(engine.is_idle for engine in self._listeners)
            if not is_idle and (self._jobs.empty() or taken >= MOMENT):
                self._step()
                taken = 0.0
            elif (job := self._jobs.get()) is None:
                break
            else:
                started = time.perf_counter()
                job()
                taken += time.perf_counter() - started
        self._die(WorkerDied("the server is shutting down; try again later"))
        while not self._jobs.empty():
            if job := self._jobs.get():
                job()

    def _step(self) -> None:
        try:
            for engine, listeners in self._listeners.items():
                before = engine.load.tokens
                for found in engine.step():
                    listeners[found.request](found)
                self.stepped(engine.load.tokens - before)
        except Exception as error:
            logger.exception("a step has broken; nothing is answered any more")
            self._die(WorkerDied(f"the engine has died of {type(error).__name__}; start the server again"))

    def _die(self, death: WorkerDied) -> None:
        """Tell everybody who waits; jobs that come later are told the same."""
        with self._door:
            self._death = self._death or death
        for listeners in self._listeners.values():
            for handle, push in listeners.items():
                push(Failure(handle, self._death))
        self._listeners.clear()

    def _end(self, engine: Engine, handles: Sequence[int]) -> None:
        """Cancel requests that have not ended, and listen no more."""
        listeners = self._listeners.get(engine, {})
        for handle in handles:
            engine.cancel(handle)
            listeners.pop(handle, None)
        if not listeners:
            self._listeners.pop(engine, None)
