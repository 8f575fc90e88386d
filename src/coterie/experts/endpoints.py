"""Experts behind an OpenAI-compatible server: many requests at a time, tried again when the server is busy.

The key comes from the environment and goes nowhere but into the request's header: what a server sends back is
searched for it before anything is kept, and redirections, which would carry it to another place, are not followed.
"""

import json
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2

from coterie.errors import CoterieError
from coterie.experts.answering import Done, Question, Reply, failed
from coterie.settings.groups import ExpertServingSettings

LARGEST_ANSWER = 16 * 2**20  # bytes
LONGEST_PAUSE = 60.0  # seconds
HOPELESS = 3  # questions in a row that failed in spite of all tries
BUSY = frozenset({408, 409, 425, 429, *range(500, 600)})
REFUSED = frozenset({401, 403, 404})
CHARACTERS_PER_TOKEN = 4  # where a server does not count


@dataclass(eq=False)
class Trouble(Exception):
    """A request without an answer.

    Attributes:
        reason: why there is none.
        again: whether another try may help.
        pause: seconds that the server asks to wait for.
        for_all: whether no question to this expert can succeed.
    """

    reason: str
    again: bool = field(default=False, kw_only=True)
    pause: float = field(default=0.0, kw_only=True)
    for_all: bool = field(default=False, kw_only=True)


def key_variable(expert: str) -> str:
    """Return the environment variable that holds an endpoint's key."""
    return "COTERIE_KEY_" + re.sub(r"[^A-Za-z0-9]", "_", expert).upper()


@dataclass(eq=False)
class Pace:
    """Spreads requests of all threads over time."""

    per_minute: int | None
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def turn(self) -> float:
        """Take the next free moment and return the seconds until then."""
        with self._lock:
            now = time.monotonic()
            mine = max(now, self._next)
            self._next = mine + (60 / self.per_minute if self.per_minute else 0.0)
        return mine - now


@dataclass(frozen=True)
class Endpoint:
    """Where an expert is asked: the server's address (ending in /v1 as a rule) and the model's name there."""

    expert: str
    url: str
    model: str


class EndpointAnswerer:
    """Asks one model behind an OpenAI-compatible server."""

    def __init__(self, endpoint: Endpoint, work: ExpertServingSettings, *, first_pause: float = 1.0) -> None:
        """Read the key from the environment; servers without one need none, and nothing is asked yet.

        The second try comes after `first_pause` seconds; each further pause is twice as long.

        Raises:
            CoterieError: when the key holds what no header takes; the key itself is not shown.
        """
        self._endpoint = endpoint
        self._work = work
        self._first_pause = first_pause
        variable = key_variable(endpoint.expert)
        self._key = os.environ.get(variable, "").strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise CoterieError(f"the key in {variable} holds spaces or characters beyond ASCII; set it to the bare key")
        self._pace = Pace(work.requests_per_minute)
        self._closed = threading.Event()
        self._hopeless: str | None = None
        self._failures = 0

    def answer(self, questions: Sequence[Question], done: Done) -> None:
        """Ask all questions, several at a time."""
        waiting = deque(enumerate(questions))
        broken: list[BaseException] = []
        count = min(self._work.concurrency, len(questions))

        def work(client: httpx2.Client) -> None:
            while waiting and not self._closed.is_set() and not broken:
                try:
                    number, question = waiting.popleft()
                    done(number, self._reply(client, question))
                except IndexError:  # another thread took the last one
                    return
                except BaseException as error:  # handed to the caller below
                    broken.append(error)

        with self._client() as client:
            threads = [threading.Thread(target=work, args=(client,), daemon=True) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if broken:
            raise broken[0]

    def close(self) -> None:
        """End all pauses, and ask nothing more."""
        self._closed.set()

    def _client(self) -> httpx2.Client:
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
            return httpx2.Client(headers=headers, timeout=self._work.timeout, limits=limits, follow_redirects=False)
        except (ImportError, ValueError) as error:
            raise CoterieError(
                f"the proxy that the environment names cannot be used ({error}); set or unset ALL_PROXY and HTTPS_PROXY"
            ) from error

    def _reply(self, client: httpx2.Client, question: Question) -> Reply:
        """Return the answer or the failure; an endpoint that refuses all, or fails again and again, is given up."""
        started = time.monotonic()
        try:
            reply = self._tried(client, question, started)
        except Trouble as trouble:
            self._failures += trouble.again
            if self._hopeless is None and (trouble.for_all or self._failures >= HOPELESS):
                self._hopeless = trouble.reason
            return failed(self._redacted(trouble.reason), time.monotonic() - started)
        self._failures = 0
        return reply

    def _tried(self, client: httpx2.Client, question: Question, started: float) -> Reply:
        for attempt in range(self._work.retries + 1):
            if self._hopeless is not None:
                raise Trouble(f"not asked any more after: {self._hopeless}")
            if self._closed.wait(self._pace.turn()):
                raise Trouble("stopped before an answer came")
            try:
                return self._request(client, question, started)
            except Trouble as trouble:
                if not trouble.again or attempt == self._work.retries:
                    raise
                pause = max(trouble.pause, self._first_pause * 2**attempt * random.uniform(0.5, 1.0))
                self._closed.wait(min(pause, LONGEST_PAUSE))
        raise AssertionError("the last try returns or raises")

    def _request(self, client: httpx2.Client, question: Question, started: float) -> Reply:
        body = json.dumps(_body(self._endpoint.model, question)).encode()
        deadline = time.monotonic() + self._work.timeout
        try:
            with client.stream("POST", f"{self._endpoint.url}/chat/completions", content=body) as response:
                if not response.is_success:
                    raise self._refusal(response, deadline)
                answer = _read(response, deadline)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:  # broken connections, and waiting too long
            where = f"{self._endpoint.url} does not answer"
            raise Trouble(f"{where} ({str(error) or type(error).__name__})", again=True) from error
        reply = _reply_from(self._redacted(answer), question, time.monotonic() - started)
        return replace(reply, text=self._redacted(reply.text))  # once more: JSON can write it in other ways

    def _refusal(self, response: httpx2.Response, deadline: float) -> Trouble:
        """Say what a status means: whether to try again, when, and what to check."""
        code, message = response.status_code, response.reason_phrase
        with suppress(httpx2.HTTPError, Trouble, ValueError, KeyError, TypeError, RecursionError):
            message = json.loads(_read(response, deadline))["error"]["message"]
        message = self._redacted(" ".join(str(message or "").split()))[:200]
        said = f"{self._endpoint.url} answered {code}" + (f" ({message})" if message else "")
        if code in REFUSED:
            hint = key_variable(self._endpoint.expert)
            what = "the model's name and the address" if code == 404 else f"the key in {hint}"
            return Trouble(f"{said}; check {what}", for_all=True)
        pause = 0.0
        with suppress(ValueError):  # no such header, or a date
            pause = max(0.0, float(response.headers.get("Retry-After", "")))
        return Trouble(said, again=code in BUSY, pause=pause)

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _body(model: str, question: Question) -> dict[str, Any]:
    sampling = question.sampling
    optional = {  # not every server knows these, so they are left out at their defaults
        "seed": sampling.seed if sampling.temperature else None,
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k or None,
        "repetition_penalty": sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        "stop": sampling.stop or None,
    }
    return {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in question.messages],
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _read(response: httpx2.Response, deadline: float) -> str:
    """Read a whole answer until the deadline: the client's own timeout starts anew with every byte that drips in."""
    parts, size = [], 0
    for part in response.iter_raw():
        size += len(part)
        if size > LARGEST_ANSWER:
            raise Trouble(f"the answer has more than {LARGEST_ANSWER:,} bytes")
        if time.monotonic() > deadline:
            raise httpx2.ReadTimeout("the answer took too long")
        parts.append(part)
    return b"".join(parts).decode("utf-8", errors="replace")


def _reply_from(answer: str, question: Question, seconds: float) -> Reply:
    try:
        record = json.loads(answer)
        choice = record["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str):
            raise TypeError(f"its content is a {type(text).__name__}")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Trouble(f"the server's answer is no chat completion ({reason}): {answer[:80]!r}") from error
    usage = record.get("usage") if isinstance(record.get("usage"), dict) else {}
    asked = sum(len(message.content) for message in question.messages)
    reason = "length" if choice.get("finish_reason") == "length" else "stop"
    text = text.encode("utf-8", errors="replace").decode()  # half characters, which JSON can write and no file can
    return Reply(
        text, _count(usage, "prompt_tokens", asked), _count(usage, "completion_tokens", len(text)), reason, seconds
    )


def _count(usage: Mapping[str, Any], field: str, characters: int) -> int:
    value = usage.get(field)
    return value if isinstance(value, int) and value > 0 else -(-characters // CHARACTERS_PER_TOKEN)
