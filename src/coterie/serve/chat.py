"""`POST /v1/chat/completions`: a conversation that is answered."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from coterie.serve.answering import respond
from coterie.serve.frames import ChatFrames
from coterie.serve.schemas import ChatRequest, conversation

routes = APIRouter()


@routes.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, as OpenAI's API has it."""
    example = conversation(body.messages)
    return await respond(request, body, lambda cell: cell.mixture.tokens(example), ChatFrames)
