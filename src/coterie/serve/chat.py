"""`POST /v1/chat/completions`: a conversation that is answered."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from coterie.serve.answering import respond, unless_gone
from coterie.serve.frames import ChatFrames
from coterie.serve.recruiting import respond_recruited
from coterie.serve.recruits import RecruitCell
from coterie.serve.schemas import ChatRequest, conversation

routes = APIRouter()


@routes.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, as OpenAI's API has it."""
    question = conversation(body.messages)
    cell = request.app.state.catalogue.find(body.model)
    if isinstance(cell, RecruitCell):
        return await unless_gone(request, respond_recruited(request, body, cell, question))
    work = respond(request, body, ChatFrames, [question], lambda cell, one: cell.mixture.tokens(one), question)
    return await unless_gone(request, work)
