"""Experts behind an OpenAI-compatible server: many requests at a time, tried again when the server is busy.

The key comes from the environment and goes nowhere but into the request's header: what a server sends back is
searched for it before anything is kept, and redirections, which would carry it to another place, are not followed.
"""

import asyncio
import json
import logging
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx2

from coterie.errors import CoterieError, first_line
from coterie.experts.answering import Done, Question, Reply, failed
from coterie.experts.chat_completions import (
    Change,
    Trouble,
    read_json_or_none,
    refusal,
    reply_from,
    request_body,
    seconds_to_wait,
)
from coterie.settings.groups import ExpertServingSettings

logger = logging.getLogger(__name__)

LARGEST_ANSWER = 4 * 2**20  # bytes
LONGEST_PAUSE = 60.0  # seconds
HOPELESS = 3  # questions in a row that failed in spite of all tries


def key_variable(expert: str) -> str:
    """Return the environment variable that holds an endpoint's key."""
    return "COTERIE_KEY_" + re.sub(r"[^A-Za-z0-9]", "_", expert).upper()


@dataclass(eq=False)
class Pace:
    """Spreads requests over time."""

    per_minute: int | None
    _next: float = 0.0

    def turn(self) -> float:
        """Take the next free moment and return the seconds until then."""
        now = time.monotonic()
        mine = max(now, self._next)
        self._next = mine + (60 / self.per_minute if self.per_minute else 0.0)
        return mine - now


def check_address(expert: str, url: str) -> None:
    """Refuse what is no address of a server, or has a secret in it, which would be written to files.

    Raises:
        CoterieError: naming the expert and what is wrong.
    """
    try:
        parts, reason = httpx2.URL(url), ""  # host names beyond ASCII in their IDNA form
        parts.host.encode("idna")  # as the look-up of names will
    except (httpx2.InvalidURL, ValueError) as error:
        parts, reason = httpx2.URL(), f" ({first_line(error)[:80]})"
    is_server = parts.scheme in ("http", "https") and re.fullmatch(r"[^%\s]+", parts.host) and not parts.fragment
    if not is_server or not (parts.port is None or 0 < parts.port < 2**16):
        shown = ascii(url[:80])
        raise CoterieError(f"{expert}: {shown} is no address{reason}; an endpoint has the form http://HOST/v1#MODEL")
    if parts.userinfo or parts.query:
        raise CoterieError(
            f"{expert}: an address with a user, password or query is not written to a file; "
            "leave it out and put the key into the environment"
        )


@dataclass(frozen=True)
class Endpoint:
    """Where an expert is asked: the server's address (ending in /v1 as a rule) and the model's name there."""

    expert: str
    url: str
    model: str


class _Impatient(ThreadPoolExecutor):
    """Looks up names for an event loop, whose end does not wait for a look-up that hangs."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)


class EndpointAnswerer:
    """Asks one model behind an OpenAI-compatible server."""

    def __init__(self, endpoint: Endpoint, work: ExpertServingSettings, *, first_pause: float = 1.0) -> None:
        """Read the key from the environment; servers without one need none, and nothing is asked yet.

        The second try comes after `first_pause` seconds; each further pause is twice as long.

        Raises:
            CoterieError: when the address is none, or the key holds what no header takes; the key is not shown.
        """
        check_address(endpoint.expert, endpoint.url)
        self._endpoint = endpoint
        self._work = work
        self._first_pause = first_pause
        variable = key_variable(endpoint.expert)
        self._key = os.environ.get(variable, "").strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise CoterieError(f"the key in {variable} holds spaces or characters beyond ASCII; set it to the bare key")
        self._pace = Pace(work.requests_per_minute)
        self._closed = False
        self._stop: Callable[[], object] = lambda: None
        self._hopeless: str | None = None
        self._failures = 0
        self._changes: frozenset[Change] = frozenset()

    def answer(self, questions: Sequence[Question], done: Done) -> None:
        """Ask all questions, several at a time, in an event loop of its own; not to be called inside another."""
        with asyncio.Runner() as runner, suppress(asyncio.CancelledError):
            runner.get_loop().set_default_executor(_Impatient())
            try:
                runner.run(self._ask(questions, done))
            except BaseExceptionGroup as group:  # what `done` raised
                raise group.exceptions[0] from None

    async def reply(self, question: Question) -> Reply:
        """Ask one question inside an event loop that asks others meanwhile; whatever failed before is tried again."""
        self._hopeless, self._failures = None, 0
        async with self._client() as client:
            return await self._reply(client, question)

    def close(self) -> None:
        """Break off what is under way, and ask nothing more."""
        self._closed = True
        with suppress(RuntimeError):  # the loop has ended meanwhile
            self._stop()

    async def _ask(self, questions: Sequence[Question], done: Done) -> None:
        waiting = deque(enumerate(questions))
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._stop = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)

        async def work(client: httpx2.AsyncClient) -> None:
            while waiting and not self._closed:
                number, question = waiting.popleft()
                done(number, await self._reply(client, question))

        async with self._client() as client, asyncio.TaskGroup() as group:
            for _ in range(min(self._work.concurrency, len(questions))):
                group.create_task(work(client))

    def _client(self) -> httpx2.AsyncClient:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # so that few bytes cannot become many
            "User-Agent": "coterie",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx2.Limits(max_connections=self._work.concurrency)
        try:
            return httpx2.AsyncClient(headers=headers, timeout=None, limits=limits, follow_redirects=False)
        except (ImportError, ValueError) as error:
            raise CoterieError(
                f"the proxy that the environment names cannot be used ({error}); set or unset ALL_PROXY and HTTPS_PROXY"
            ) from error

    async def _reply(self, client: httpx2.AsyncClient, question: Question) -> Reply:
        """Return the answer or the failure; an endpoint that refuses all, or fails again and again, is given up."""
        started = time.monotonic()
        try:
            reply = await self._tried(client, question, started)
        except Trouble as trouble:
            line = trouble.line(self._redacted)
            self._failures += trouble.again
            if self._hopeless is None and (trouble.for_all or self._failures >= HOPELESS):
                self._hopeless = line
            return failed(line, time.monotonic() - started)
        self._failures = 0
        return reply

    async def _tried(self, client: httpx2.AsyncClient, question: Question, started: float) -> Reply:
        attempt = 0
        while True:
            if self._hopeless is not None:
                raise Trouble(f"not asked any more after: {self._hopeless}")
            await asyncio.sleep(self._pace.turn())
            changes = self._changes
            try:
                return await self._request(client, question, changes, started)
            except Trouble as trouble:
                if trouble.changes - changes:
                    self._change(trouble.changes)
                    continue
                if not trouble.again or attempt == self._work.retries:
                    raise
                pause = max(trouble.pause, self._first_pause * 2**attempt * random.uniform(0.5, 1.0))
            attempt += 1
            await asyncio.sleep(min(pause, LONGEST_PAUSE))

    def _change(self, wanted: frozenset[Change]) -> None:
        """Ask this model as its server wants it from now on."""
        if "no temperature" in wanted - self._changes:
            name = self._endpoint.expert
            logger.warning("%s takes no temperature: it answers at its server's own, which is not greedy", name)
        self._changes |= wanted

    async def _request(
        self, client: httpx2.AsyncClient, question: Question, changes: frozenset[Change], started: float
    ) -> Reply:
        body = json.dumps(request_body(self._endpoint.model, question, changes)).encode()
        response, content = await self._exchange(client, body)
        if not response.is_success:
            raise self._refusal(response, content)
        if len(content) > LARGEST_ANSWER:
            raise Trouble(f"the answer has more than {LARGEST_ANSWER:,} bytes")
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            raise Trouble("the answer is compressed, which was not asked for", encoding)
        text = self._redacted(content.decode("utf-8", errors="replace"))
        reply = reply_from(text, question, time.monotonic() - started)
        return replace(reply, text=self._redacted(reply.text))  # once more: JSON can write it in other ways

    async def _exchange(self, client: httpx2.AsyncClient, body: bytes) -> tuple[httpx2.Response, bytes]:
        """Send a request once; looking up, connecting, sending and all that comes back have one deadline together."""
        url, response, content = self._endpoint.url, None, b""
        opened: list[Any] = []

        async def trace(event: str, info: Mapping[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                opened.append(info["return_value"])

        request = client.build_request("POST", f"{url}/chat/completions", content=body, extensions={"trace": trace})
        try:
            async with asyncio.timeout(self._work.timeout):
                response = await client.send(request, stream=True)
                content = await _read(response)
        except (TimeoutError, httpx2.HTTPError, OSError, ValueError) as error:
            if response is None or response.is_success:
                told = f"no whole answer within {self._work.timeout:g} s" if isinstance(error, TimeoutError) else error
                raise Trouble(f"{url} does not answer", str(told) or type(error).__name__, again=True) from error
        finally:
            for stream in opened if response is None else [response]:  # what a deadline in a handshake leaves open
                await stream.aclose()
        return response, content

    def _refusal(self, response: httpx2.Response, content: bytes) -> Trouble:
        """Say what a status that is no success means, by the status and what came with it."""
        reason = f"{self._endpoint.url} answered {response.status_code}"
        if response.is_redirect:
            place = response.headers.get("Location", "")
            return Trouble(reason, place, "it points elsewhere, where no key is sent: check the address", for_all=True)
        text = self._redacted(content.decode("utf-8", errors="replace")).strip()
        record = read_json_or_none(text)
        if record is None:  # words of a proxy, perhaps, but not its page
            record = response.reason_phrase if text.startswith("<") or not text else text
        key_hint = f"the key in {key_variable(self._endpoint.expert)}"
        pause = seconds_to_wait(response.headers.get("Retry-After"))
        return refusal(reason, response.status_code, record, key_hint=key_hint, pause=pause)

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


async def _read(response: httpx2.Response) -> bytes:
    """Read a whole answer, or one byte more than the largest: what follows stays unread."""
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > LARGEST_ANSWER:
            break
    return bytes(content[: LARGEST_ANSWER + 1])
