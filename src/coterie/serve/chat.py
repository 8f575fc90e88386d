"""`POST /v1/chat/completions`: a conversation that is answered."""

from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import Response

from coterie.data.examples import Example
from coterie.serve.answering import respond, unless_gone
from coterie.serve.frames import ChatFrames, Frames
from coterie.serve.recruiting import respond_recruited
from coterie.serve.recruits import RecruitCell
from coterie.serve.schemas import AnswerRequest, ChatRequest, conversation

routes = APIRouter()


@routes.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation, as OpenAI's API has it."""
    return await answered(request, body, ChatFrames, conversation(body.messages))


async def answered(request: Request, body: AnswerRequest, form: Callable[..., Frames], question: Example) -> Response:
    """Let a mixture, or recruited experts, answer a conversation, in a form that makes the frames of the answer."""
    cell = request.app.state.catalogue.find(body.model)
    if isinstance(cell, RecruitCell):
        return await unless_gone(request, respond_recruited(request, body, form, cell, question))
    work = respond(request, body, form, [question], lambda cell, one: cell.mixture.tokens(one), question)
    return await unless_gone(request, work)
