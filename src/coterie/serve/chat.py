"""`POST /v1/chat/completions`."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from coterie.data.examples import load_examples
from coterie.serve.answering import respond
from coterie.serve.asking import Asked, ask
from coterie.serve.simple import ChatFrames, ChatRequest

routes = APIRouter()


@routes.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    server = request.app.state
    cell = server.catalogue.resolve(body.model)

    def make() -> Asked:
        example = load_examples([{"messages": body.turns()}], need_response=False)[0]
        rows = cell.mixture.tokens(example)
        return ask(cell, rows, body, server.settings.capacity.timeout)

    asked = await server.worker.call(make)
    return await respond(request, asked, ChatFrames(cell.id, asked), stream=body.stream)
