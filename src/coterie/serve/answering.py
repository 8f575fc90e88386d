"""What all answering does: route and answer what was asked, streamed or whole, as long as the client is there."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from coterie.data.batching import TokenRow
from coterie.data.examples import Example
from coterie.engine.request import Token
from coterie.mixture.completion import completion
from coterie.mixture.core import elected
from coterie.routers.base import Routing
from coterie.serve.asking import Asked, ask
from coterie.serve.catalogue import Cell
from coterie.serve.errors import ApiError, as_api_error
from coterie.serve.frames import Frames, Piece, Pieces, Usage, echo
from coterie.serve.schemas import AnswerRequest, CompletionRequest

CLIENT_GONE = 499
"""The status, which nobody reads, of a request that its client has given up; nginx calls it so."""
SHOW_WEIGHTS = "X-Coterie-Weights"
"""Header that asks for the routing, and tells it where it is known before the answer."""
IGNORED = "X-Coterie-Ignored"
"""Header that names what was asked for and passed over."""

ROWS, TOKENS, CHARACTERS = 8, 512, 2**16
"""Of one request, what is done between two steps of the engine: prompts that are routed, their tokens together, and
characters that are cut into tokens. One prompt is always done whole, however long it is."""

CUT = 64
"""Tokens that the beginning of a text may have more than they are in all of it, since a word was cut."""

Prompt = TypeVar("Prompt")
Result = TypeVar("Result")


async def respond(
    request: Request,
    body: AnswerRequest,
    form: Callable[..., Frames],
    prompts: Sequence[Prompt],
    read: Callable[[Cell, Prompt], list[TokenRow]],
    question: Example | None = None,
) -> Response:
    """Answer what a mixture was asked.

    Args:
        request: the client's.
        body: of it.
        form: makes the frames of the answer.
        prompts: that are to be answered.
        read: makes the rows of one, where the model may be used.
        question: the one that a prompt is of, for which answers can vote.
    """
    server = request.app.state
    cell: Cell = server.catalogue.resolve(body.model)
    made = await read_rows(request, cell, prompts, partial(read, cell))
    timeout = server.settings.capacity.timeout
    parts = await route_rows(request, made, lambda part: ask(cell, part, body, question, timeout))
    asked = replace(parts[0], requests=[own for part in parts for own in part.requests])
    if server.upstream:
        asked = server.upstream.accept(asked)
        tokens = server.upstream.answer(asked)
    else:
        tokens = server.worker.answer(cell.desk.engine, asked.requests)
    tokens = server.metrics.watched(cell.id, asked.requests, tokens, request.state.facts)
    usage = Usage(sum(len(own.prompt.ids) for own in asked.requests))
    if question and asked.mixture.combiner.finishes_answers:
        tokens = the_elected(tokens, question, asked.seed, usage)
    choices = range(len(asked.requests) * body.n)
    weights = {index: known for index in choices if (known := asked.weights(index // body.n))}
    detail = body.coterie.detail or SHOW_WEIGHTS in request.headers
    frames = form(
        body.model,
        cell.desk.vocabulary,
        usage,
        body.alternatives,
        usage_chunk=bool(body.stream_options and body.stream_options.include_usage),
        usage_always=bool(body.stream_options and body.stream_options.continuous_usage_stats),
        experts=asked.mixture.bank.names if detail else (),
        weights=weights,
    )
    headers = {SHOW_WEIGHTS: json.dumps(weights[0])} if detail and 0 in weights else {}
    return await send(pieces_of(tokens, frames, asked, body), frames, body, len(choices), headers)


async def read_rows(
    request: Request, cell: Cell, prompts: Sequence[Prompt], read: Callable[[Prompt], list[TokenRow]]
) -> list[TokenRow]:
    """Cut prompts into tokens, some at a time.

    Raises:
        CoterieError: as reading one, or for one that is much too long, before all of it is cut.
    """

    def part(at: slice) -> list[TokenRow]:
        for one in prompts[at]:
            for text in texts_of(one):
                check_size(cell, text)
        return [row for one in prompts[at] for row in read(one)]

    sizes = [sum(map(len, texts_of(one))) for one in prompts]
    return [row for own in await in_turns(request, turns(sizes, len(prompts), CHARACTERS), part) for row in own]


def texts_of(prompt: object) -> list[str]:
    """Return the texts of a prompt that have to be cut into tokens; it may be a text, tokens, or a conversation."""
    if isinstance(prompt, Example):
        return [message.content for message in prompt.prompt]
    return [prompt] if isinstance(prompt, str) else []


def check_size(cell: Cell, text: str) -> None:
    """Refuse a text of which a beginning has more tokens than the model reads; all of it could take many seconds.

    Raises:
        ApiError: naming so many tokens.
    """
    context, size = cell.mixture.backbone.context, CHARACTERS
    while context is not None and size < len(text):
        count = len(cell.mixture.tokenizer(text[:size])["input_ids"]) - CUT
        if count > context:
            words = f"the prompt has over {count} tokens, but the model's context has {context}; shorten it"
            raise ApiError(words, code="context_length_exceeded")
        size *= 2


async def route_rows(
    request: Request, rows: Sequence[TokenRow], route: Callable[[Sequence[TokenRow]], Result]
) -> list[Result]:
    """Weigh the experts for rows, some at a time."""
    sizes = [len(row.ids) for row in rows]
    return await in_turns(request, turns(sizes, ROWS, TOKENS), lambda at: route(rows[at]))


def turns(sizes: Sequence[int], count: int, most: int) -> list[slice]:
    """Cut a sequence into parts of so many things at most, whose sizes sum to `most` at most; one is never cut."""
    found, start, total = [], 0, 0
    for place, size in enumerate(sizes):
        if place > start and (place - start == count or total + size > most):
            found.append(slice(start, place))
            start, total = place, 0
        total += size
    return [*found, slice(start, len(sizes))] if sizes else []


async def in_turns(request: Request, parts: Sequence[slice], act: Callable[[slice], Result]) -> list[Result]:
    """Do something where the base model may be run, part by part, so that nobody waits for all of them."""
    return [await request.app.state.worker.call(lambda at=at: act(at)) for at in parts]


async def send(
    pieces: AsyncGenerator[Piece], frames: Frames, body: AnswerRequest, choices: int, headers: Mapping[str, str]
) -> Response:
    """Send so many answers, frame by frame or all at once, as it was asked."""
    ignored = {IGNORED: ", ".join(body.ignored())} if body.ignored() else {}
    if body.stream:
        first = await anext(pieces)  # what is refused is refused with a status
        content = frames_of(first, pieces, frames, choices)
        return StreamingResponse(content, media_type="text/event-stream", headers={**headers, **ignored})
    answers: list[list[Piece]] = [[] for _ in range(choices)]
    async with aclosing(pieces):
        async for piece in pieces:
            answers[piece.index].append(piece)
    return JSONResponse(frames.whole(answers), headers={**headers, **ignored})


async def frames_of(first: Piece, others: AsyncGenerator[Piece], frames: Frames, choices: int) -> AsyncGenerator[bytes]:
    """Yield frames as pieces come; an error is a frame, too, and the end is always told."""
    async with aclosing(others):
        for index in range(choices):
            yield frames.opening(index)
        yield frames.piece(first)
        try:
            async for piece in others:
                yield frames.piece(piece)
            yield frames.closing()
        except Exception as error:  # noqa: BLE001 - the status was sent long ago
            yield frames.failed(as_api_error(error).body())


async def pieces_of(
    tokens: AsyncGenerator[Token], frames: Frames, asked: Asked, body: AnswerRequest
) -> AsyncGenerator[Piece]:
    """Yield what becomes certain of each answer; before its first token comes its prompt, where that is wanted."""
    answers: dict[int, Pieces] = {}
    async with aclosing(tokens):
        async for token in tokens:
            index = token.request * body.n + token.draw
            if token.weights and isinstance(asked.requests[token.request].routing, Routing):
                known = zip(asked.mixture.bank.names, token.weights, strict=True)  # gates' average over the prompt
                frames.weights = {**frames.weights, index: {name: weight for name, weight in known if weight}}
                token = token._replace(weights=None)  # noqa: PLW2901
            piece = answers.setdefault(index, Pieces(index, frames.vocabulary)).push(token)
            if token.begun and token.draw == 0:
                frames.usage.cached += token.begun.cached
            if token.begun and isinstance(body, CompletionRequest) and body.echo:
                prompt, ids = body.prompt[token.request], asked.requests[token.request].prompt.ids
                text = prompt if isinstance(prompt, str) else None
                echoed = echo(index, text, ids, token.begun.prompt, frames.vocabulary)
                yield echoed if body.limit != 0 else echoed._replace(finish_reason="length")
            if body.limit != 0:
                yield piece


async def the_elected(
    tokens: AsyncGenerator[Token], question: Example, seed: int, usage: Usage
) -> AsyncGenerator[Token]:
    """Wait for all answers to a question, let them vote, and yield the tokens of the one that wins.

    Those of the others were written, too, and count as such.
    """
    drawn: dict[int, list[Token]] = {}
    async with aclosing(tokens):
        async for token in tokens:
            drawn.setdefault(token.draw, []).append(token)
    answers = {draw: completion("", drawn[draw], {}, ()) for draw in sorted(drawn)}
    winner = elected(question, list(answers.values()), seed)
    elected_draw = next(draw for draw, answer in answers.items() if answer is winner)
    usage.written += sum(len(own) for draw, own in drawn.items() if draw != elected_draw)
    for token in drawn[elected_draw]:
        yield token._replace(draw=0)


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result | Response:
    """Do something for a client that waits; when it has gone, the work is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=CLIENT_GONE)
    finally:
        working.cancel()
        leaving.cancel()
