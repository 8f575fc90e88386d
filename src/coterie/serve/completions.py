"""`POST /v1/completions`: texts, or rows of tokens, that are gone on with as they stand."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from coterie.data.batching import TokenRow
from coterie.serve.answering import respond
from coterie.serve.asking import Asked, ask
from coterie.serve.catalogue import Cell
from coterie.serve.simple import CompletionRequest, TextFrames

routes = APIRouter()


@routes.post("/v1/completions", response_model=None)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Go on with texts."""
    server = request.app.state
    cell = server.catalogue.resolve(body.model)

    def make() -> Asked:
        rows = [row(cell, prompt) for prompt in body.prompts()]
        return ask(cell, rows, body, server.settings.capacity.timeout)

    asked = await server.worker.call(make)
    return await respond(request, asked, TextFrames(cell.id, asked), stream=body.stream)


def row(cell: Cell, prompt: str | list[int]) -> TokenRow:
    """Take a text, or tokens, for the user's own words; no template is put around them."""
    ids = tuple(cell.mixture.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
    return TokenRow(ids, len(ids), (False,) * len(ids), (True,) * len(ids))
