"""What all other servers have in common: how they are asked, and how what they say becomes tokens and errors."""

import asyncio
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx2

from coterie.engine.request import Request, Token
from coterie.errors import CoterieError, first_line, shortened
from coterie.experts.chat_completions import error_words
from coterie.experts.endpoints import check_address
from coterie.experts.names import BACKBONE
from coterie.mixture import Mixture
from coterie.mixture.llama_cpp import COMBINERS
from coterie.routers.base import Routing
from coterie.serve.asking import Asked
from coterie.serve.errors import ApiError
from coterie.settings.sampling import SamplingSettings

KEY = "COTERIE_UPSTREAM_KEY"
"""Environment variable with the key that the other server wants."""
UNTOLD = -math.inf
"""Stands for a log-probability that the server does not tell."""
PATIENCE = 30.0  # seconds, for what is asked at the start, and for a connection
TRIAL = "The 3 cats of Zoë cost 17.50 €, don't they?\n\tYes"
"""A text in which tokenizers differ."""


class Upstream(ABC):
    """Another server, which has a mixture's base model and experts."""

    name: str

    def __init__(self, url: str, mixture: Mixture) -> None:
        """Look whether the server has this base model and these experts.

        Raises:
            CoterieError: when it does not answer, or has others.
        """
        check_address("--upstream", url)
        self.url, self.mixture = url.rstrip("/").removesuffix("/v1"), mixture
        self.ends = sorted(mixture.backbone.stop_ids | mixture.prompts.end_ids)
        with httpx2.Client(**self._client(timeout=PATIENCE)) as http:
            self.connect(http)

    @abstractmethod
    def connect(self, http: httpx2.Client) -> None:
        """Learn what experts are called there.

        Raises:
            CoterieError: when one of them is not there.
        """

    @abstractmethod
    def _body(self, request: Request, sampling: SamplingSettings) -> dict[str, Any]:
        """Return what asks for one answer, streamed, where the experts stand aside."""

    @abstractmethod
    def _running(
        self, http: httpx2.AsyncClient, weights: Mapping[str, float]
    ) -> AbstractAsyncContextManager[tuple[str, dict[str, Any]]]:
        """Async context manager: the path to ask at and the fields by which these experts run there."""

    @abstractmethod
    def _tokens(self, event: Mapping[str, Any], request: Request) -> list[Token]:
        """Read the tokens of one event of a stream; the last one says if the answer ends."""

    def accept(self, asked: Asked) -> Asked:
        """Return requests as this server computes them.

        Raises:
            ApiError: for a mixture that it cannot compute.
        """
        mixture = asked.mixture
        if mixture.combiner.kind not in COMBINERS:
            told = f"{self.name} mixes experts in the layers, not by {mixture.combiner.kind!r}; take combiner layers"
            raise ApiError(told, param="coterie.combiner")
        if mixture.reroutes or mixture.router.grain != "prompt":
            told = f"router {mixture.router.kind!r} weighs experts during an answer, which {self.name} does not"
            raise ApiError(f"{told}; take another router, or every inf", param="coterie.router")
        there = dict(zip(self.mixture.bank.names, self.mixture.bank.adapters, strict=True))
        own = dict(zip(mixture.bank.names, mixture.bank.adapters, strict=True))
        for name in {name for request in asked.requests for name in experts_of(request)}:
            if there.get(name) is not own[name]:  # as of what was loaded later
                raise ApiError(f"{self.name} does not have the expert {name!r} of this model", param="model")
        return asked

    async def answer(self, asked: Asked) -> AsyncGenerator[Token]:
        """Yield the tokens of all answers as they come; what is left ends there when this is closed.

        Raises:
            ApiError: in the server's words, or when it does not answer.
            TimeoutError: when the deadline of a request has passed.
        """
        found: asyncio.Queue[Token | Exception] = asyncio.Queue()

        async def work(place: int, draw: int) -> None:
            request = asked.requests[place]
            try:
                async with asyncio.timeout_at(request.deadline):
                    async for token in self._answer(request, request.draws[draw], asked.mixture):
                        found.put_nowait(token._replace(request=place, draw=draw))
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                found.put_nowait(error)

        draws = [(place, draw) for place, request in enumerate(asked.requests) for draw in range(len(request.draws))]
        works = [asyncio.create_task(work(*one)) for one in draws]
        left = len(works)
        try:
            while left:
                if isinstance(token := await found.get(), Exception):
                    raise token
                left -= token.finish_reason is not None
                yield token
        finally:
            for one in works:
                one.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _answer(self, request: Request, sampling: SamplingSettings, mixture: Mixture) -> AsyncIterator[Token]:
        """Yield the tokens of one answer, the last of which says why it ends."""
        body, written = self._body(request, sampling), 0
        async with (
            httpx2.AsyncClient(**self._client(timeout=httpx2.Timeout(None, connect=PATIENCE))) as http,
            self._running(http, experts_of(request)) as (path, fields),
        ):
            async for event in self._events(http, path, body | fields):
                for token in self._tokens(event, request):
                    written += 1
                    ends = token.finish_reason or ("stop" if token.id in self.ends else None)
                    ends = ends or ("length" if written == request.limit else None)
                    yield token._replace(finish_reason=ends)
                    if ends:
                        return
        raise ApiError(f"{self.name} broke off in the middle of an answer", 502, code="upstream_failed")

    async def _events(
        self, http: httpx2.AsyncClient, path: str, body: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream."""
        try:
            async with http.stream("POST", path, json=dict(body)) as response:
                await check(response, self.name)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        event = json.loads(data)
                        if told := event.get("error"):
                            raise ApiError(f"{self.name}: {told_by(told)}", 502, code="upstream_failed")
                        yield event
        except httpx2.TransportError as error:
            raise ApiError(f"{self.name} does not answer: {first_line(error)}", 502, code="upstream_failed") from error
        except json.JSONDecodeError as error:
            raise ApiError(f"{self.name} sends what is no JSON", 502, code="upstream_failed") from error

    def _client(self, **options: Any) -> dict[str, Any]:  # noqa: ANN401 - of httpx2
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return {"base_url": self.url, "headers": headers, "trust_env": False, **options}

    def _asked(self, http: httpx2.Client, path: str, body: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401 - JSON
        """Ask something at the start.

        Raises:
            CoterieError: when there is no answer that is JSON.
        """
        try:
            response = http.get(path) if body is None else http.post(path, json=dict(body))
            response.raise_for_status()
            return response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise CoterieError(f"--upstream: {self.url}{path} does not answer: {first_line(error)[:200]}") from error

    def _check_tokens(self, found: Sequence[int]) -> None:
        """Refuse a base model whose tokens are not those of ours."""
        ours = self.mixture.tokenizer(TRIAL, add_special_tokens=False)["input_ids"]
        if list(found) != list(ours):
            base = self.mixture.backbone.identity.id
            raise CoterieError(
                f"--upstream: {self.url} reads a text as other tokens than {base}, so it has another model"
            )


def experts_of(request: Request) -> dict[str, float]:
    """Return the weights of the experts that a request runs beside the base model, of those that were accepted."""
    assert isinstance(request.routing, Routing)
    return {name: weight for name, weight in request.routing.row(0).items() if weight and name != BACKBONE}


async def check(response: httpx2.Response, name: str) -> None:
    """Pass on what a server refuses: as the client's fault where it says so, as its own otherwise.

    Raises:
        ApiError: in its words.
    """
    if response.status_code == httpx2.codes.OK:
        return
    await response.aread()
    try:
        told = response.json()
    except ValueError:
        told = response.text
    busy = response.status_code in (429, 503)
    status = 400 if response.status_code in (400, 413, 422) else 503 if busy else 502
    wait = response.headers.get("Retry-After", "1")
    headers = {"Retry-After": wait} if busy and wait.isdigit() else None
    raise ApiError(f"{name}: {told_by(told)}", status, code="upstream_failed", headers=headers)


def told_by(answer: object) -> str:
    """Return what a server says of an error, in any of the forms that servers give it."""
    return shortened(error_words(answer) or "no reason is told", 300)
