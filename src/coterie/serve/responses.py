"""`POST /v1/responses`: a conversation that is answered, in the form of OpenAI's newer API.

Nothing is kept between requests: a client sends the whole conversation each time.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, model_validator

from coterie.data.forms import MAX_MESSAGES
from coterie.serve.chat import answered
from coterie.serve.errors import ApiError
from coterie.serve.frames import Json
from coterie.serve.response_frames import ResponseFrames
from coterie.serve.schemas import (
    AnswerRequest,
    Body,
    ChatMessage,
    Text,
    asks_something,
    check_format,
    check_unforced,
    conversation,
    wrong,
)
from coterie.settings.sampling import MOST_TOP_LOGPROBS

routes = APIRouter()

LOGPROBS = "message.output_text.logprobs"
"""What `include` calls the log-probabilities of an answer's tokens."""
KEPT = ("background", "conversation", "previous_response_id", "prompt")
"""Fields that lean on what a server has kept from before, or is to keep."""


class InputMessage(ChatMessage):
    """A turn of the conversation."""

    type: str = "message"

    @model_validator(mode="before")
    @classmethod
    def _is_a_message(cls, given: object) -> object:
        """Refuse calls of tools, thoughts, and references to what was said elsewhere."""
        if isinstance(given, Mapping) and (kind := given.get("type") or "message") != "message":
            raise ValueError(f"items of type {str(kind)[:40]!r} are not read; give messages")
        return given


class TextForm(Body):
    """In which form an answer is wanted."""

    format: dict[str, Any] | None = None


class ResponsesRequest(AnswerRequest):
    """What `/v1/responses` takes."""

    input: Annotated[
        list[InputMessage],
        BeforeValidator(
            lambda given: [{"role": "user", "content": given}] if isinstance(given, str) else given,
            json_schema_input_type=str | list[InputMessage],
        ),
        Field(min_length=1, max_length=MAX_MESSAGES),
        asks_something("input"),
    ]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    include: list[str] = []
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP_LOGPROBS)
    text: TextForm = TextForm()
    tools: list[Any] | None = None
    tool_choice: Any = None
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: dict[Text, Text] = {}

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer; None for as many as fit."""
        return self.max_output_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives are shown beside each token; None for no log-probabilities at all."""
        return self.top_logprobs if LOGPROBS in self.include else None

    def ignored(self) -> list[str]:
        """Return the names of what was given and does not act."""
        others, cuts = set(self.include) - {LOGPROBS}, self.truncation == "auto"
        passed = {"include": others, "tools": self.tools, "truncation": cuts}
        return sorted([*super().ignored(), *(name for name, given in passed.items() if given)])

    @model_validator(mode="after")
    def _is_answered_once_in_text(self) -> "ResponsesRequest":
        for name in KEPT:
            if (self.model_extra or {}).get(name):
                raise wrong(name, f"{name}: nothing is kept here; send the whole conversation as input")
        if self.n > 1:
            raise wrong("n", "n: a response holds one answer; leave it out, or ask /v1/chat/completions")
        if self.top_logprobs and self.alternatives is None:
            raise wrong("top_logprobs", f"top_logprobs needs include to have {LOGPROBS!r}")
        check_unforced("tool_choice", self.tool_choice)
        check_format("text.format", self.text.format)
        return self

    def question(self) -> list[ChatMessage]:
        """Return the conversation, with its instructions before it."""
        begins = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        return [*begins, *self.input]

    def settings(self) -> Json:
        """Return what a response tells of what was asked, and what acted."""
        same = ("model", "instructions", "temperature", "top_p", "presence_penalty", "frequency_penalty")
        more = ("max_output_tokens", "top_logprobs", "metadata")
        none = ("previous_response_id", "max_tool_calls", "safety_identifier", "prompt_cache_key", "error")
        fixed = {
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "truncation": "disabled",
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "background": False,
            "service_tier": "default",
        }
        return {name: getattr(self, name) for name in (*same, *more)} | dict.fromkeys(none) | fixed


@routes.post("/v1/responses", response_model=None)
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation, as OpenAI's newer API has it."""
    form = partial(ResponseFrames, settings=body.settings())
    return await answered(request, body, form, conversation(body.question()))


@routes.api_route("/v1/responses/{name:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
async def kept(name: str) -> Response:
    """Say that no response is kept.

    Raises:
        ApiError: always.
    """
    raise ApiError("responses are not kept here, nor worked on later; ask anew", 404)
