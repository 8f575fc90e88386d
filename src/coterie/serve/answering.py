"""What both routes do with requests to the engine: answer them, streamed or whole, as long as the client is there."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from coterie.engine.request import Token
from coterie.serve.asking import Asked
from coterie.serve.simple import Frames

CLIENT_GONE = 499
"""The status, which nobody reads, of a request that its client has given up; nginx calls it so."""

Result = TypeVar("Result")


async def respond(request: Request, asked: Asked, frames: Frames, *, stream: bool) -> Response:
    """Answer requests as they were asked: frame by frame, or all at once."""
    tokens = request.app.state.worker.answer(asked.cell.desk.engine, asked.requests)
    if stream:
        return StreamingResponse(streamed(tokens, frames), media_type="text/event-stream")
    found = await unless_gone(request, collected(tokens))
    return Response(status_code=CLIENT_GONE) if found is None else JSONResponse(frames.whole(found))


async def streamed(tokens: AsyncGenerator[Token], frames: Frames) -> AsyncGenerator[bytes]:
    """Yield the frames of an answer as its tokens come; an error is a frame too, and the end is always told."""
    async with aclosing(tokens):
        for frame in frames.first():
            yield frame
        try:
            async for token in tokens:
                for frame in frames.of(token):
                    yield frame
            for frame in frames.last():
                yield frame
        except Exception as error:  # noqa: BLE001 - the status was sent long ago
            yield frames.error(error)
    yield frames.DONE


async def collected(tokens: AsyncGenerator[Token]) -> list[Token]:
    """Wait for all tokens."""
    async with aclosing(tokens):
        return [token async for token in tokens]


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
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
