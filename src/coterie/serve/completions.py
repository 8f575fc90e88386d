"""`POST /v1/completions`: texts, or rows of tokens, that are gone on with as they stand."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.serve.answering import respond, unless_gone
from coterie.serve.catalogue import Cell
from coterie.serve.frames import CompletionFrames
from coterie.serve.schemas import CompletionRequest

routes = APIRouter()


@routes.post("/v1/completions", response_model=None)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Go on with texts, as OpenAI's API has it."""
    work = respond(request, body, CompletionFrames, body.prompt, lambda cell, one: [as_it_stands(cell, one)])
    return await unless_gone(request, work)


def as_it_stands(cell: Cell, prompt: str | list[int]) -> TokenRow:
    """Take a text, or tokens, for the user's own words; no template is put around them.

    Raises:
        CoterieError: for a token that the model does not know.
    """
    ids = tuple(cell.mixture.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
    if unknown := [token for token in ids if token >= cell.mixture.backbone.embeddings]:
        raise CoterieError(f"prompt: the model knows {cell.mixture.backbone.embeddings} tokens, got {unknown[0]}")
    return TokenRow(ids, len(ids), (False,) * len(ids), (True,) * len(ids))
