"""What both routes do: route and answer what was asked, streamed or whole, for as long as the client is there."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from coterie.data.batching import TokenRow
from coterie.engine.request import Token
from coterie.serve.asking import Asked, Body, ask
from coterie.serve.catalogue import Cell
from coterie.serve.errors import as_api_error
from coterie.serve.frames import Frames, Piece, Pieces, Usage, echo
from coterie.serve.schemas import CompletionRequest

CLIENT_GONE = 499
"""The status, which nobody reads, of a request that its client has given up; nginx calls it so."""
SHOW_WEIGHTS = "X-Coterie-Weights"
"""Header that asks for the routing, and tells it where it is known before the answer."""
IGNORED = "X-Coterie-Ignored"
"""Header that names what was asked for and passed over."""

Result = TypeVar("Result")


async def respond(request: Request, body: Body, rows: Callable[[Cell], list[TokenRow]], form: type[Frames]) -> Response:
    """Answer the prompts that `rows` makes of a body, in a route's form."""
    server = request.app.state
    cell: Cell = server.catalogue.resolve(body.model)
    detail = body.coterie.detail or SHOW_WEIGHTS in request.headers

    async def answered() -> Response:
        timeout = server.settings.capacity.timeout
        asked: Asked = await server.worker.call(lambda: ask(cell, rows(cell), body, timeout))
        if server.upstream:
            asked = server.upstream.accept(asked)
        answer = Answer(asked, body, cell, form, detail=detail)
        answering = (
            server.upstream.answer(asked) if server.upstream else server.worker.answer(cell.desk.engine, asked.requests)
        )
        tokens = server.metrics.watched(cell.id, asked.requests, answering, request.state.facts)
        if not body.stream:
            return JSONResponse(await answer.whole(tokens), headers=answer.headers)
        first = await anext(tokens)  # what is refused, is refused with a status
        return StreamingResponse(answer.stream(first, tokens), media_type="text/event-stream", headers=answer.headers)

    return await unless_gone(request, answered()) or Response(status_code=CLIENT_GONE)


class Answer:
    """The answers to one body, told as its client wants them."""

    def __init__(self, asked: Asked, body: Body, cell: Cell, form: type[Frames], *, detail: bool) -> None:
        """Begin to answer."""
        self._draws = body.n
        self._body = body
        self._vocabulary = cell.desk.vocabulary
        self._prompts = [request.prompt.ids for request in asked.requests]
        self._choices = range(len(asked.requests) * body.n)
        self._pieces = [Pieces(index, cell.desk.vocabulary) for index in self._choices]
        weights = {index: known for index in self._choices if (known := asked.weights(index // body.n))}
        options = body.stream_options
        self._frames = form(
            body.model,
            cell.desk.vocabulary,
            Usage(sum(len(request.prompt.ids) for request in asked.requests)),
            body.alternatives,
            usage_chunk=bool(options and options.include_usage),
            usage_always=bool(options and options.continuous_usage_stats),
            experts=asked.mixture.bank.names if detail else (),
            weights=weights,
        )
        self.headers = {IGNORED: ", ".join(body.ignored())} if body.ignored() else {}
        if detail and 0 in weights:
            self.headers[SHOW_WEIGHTS] = json.dumps(weights[0])

    async def whole(self, tokens: AsyncGenerator[Token]) -> dict[str, Any]:
        """Wait for all tokens."""
        found = [[] for _ in self._choices]
        async with aclosing(tokens):
            async for token in tokens:
                for piece in self._take(token):
                    found[piece.index].append(piece)
        return self._frames.whole(found)

    async def stream(self, first: Token, others: AsyncGenerator[Token]) -> AsyncGenerator[bytes]:
        """Yield frames as tokens come; an error is a frame, too, and the end is always told."""
        async with aclosing(others):
            for index in self._choices:
                yield self._frames.opening(index)
            yield b"".join(map(self._frames.piece, self._take(first)))
            try:
                async for token in others:
                    yield b"".join(map(self._frames.piece, self._take(token)))
                yield self._frames.closing()
            except Exception as error:  # noqa: BLE001 - the status was sent long ago
                yield self._frames.failed(as_api_error(error).body())

    def _take(self, token: Token) -> list[Piece]:
        """Return what a token makes certain; before the first one of an answer comes its prompt, if that is wanted."""
        index, body = token.request * self._draws + token.draw, self._body
        piece = self._pieces[index].push(token)
        if token.begun is None:
            return [piece]
        if token.draw == 0:
            self._frames.usage.cached += token.begun.cached
        if not isinstance(body, CompletionRequest) or not body.echo:
            return [piece]
        prompt, ids = body.prompt[token.request], self._prompts[token.request]
        echoed = echo(index, prompt if isinstance(prompt, str) else None, ids, token.begun.prompt, self._vocabulary)
        return [echoed, piece] if body.limit != 0 else [echoed._replace(finish_reason="length")]


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result | None:
    """Do something for a client that waits; None when it has gone, and the work was cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
