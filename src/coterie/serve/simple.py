# ruff: noqa: D102
"""The simplest of what clients send and get, until the real forms are there."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel

from coterie.engine.request import Token
from coterie.serve.asking import Asked

SAMPLED = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed", "logit_bias")


class Sampled(BaseModel):
    """What both routes take."""

    model: str
    stream: bool = False
    n: int = 1
    max_tokens: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None

    def sampling(self) -> dict[str, Any]:
        """Return the fields of `SamplingSettings`."""
        given = {name: getattr(self, name) for name in (*SAMPLED, "stop")}
        return {name: value for name, value in given.items() if value is not None}


class ChatRequest(Sampled):
    """A conversation."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens

    def turns(self) -> list[dict[str, str]]:
        """Return role and text of each turn."""
        return [{"role": turn["role"], "content": turn["content"]} for turn in self.messages]


class CompletionRequest(Sampled):
    """Texts."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer."""
        return 16 if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """Return each prompt."""
        one = isinstance(self.prompt, str) or all(isinstance(part, int) for part in self.prompt)
        return [self.prompt] if one else list(self.prompt)  # pyrefly: ignore[bad-return]


class Frames:
    """One response."""

    DONE = b"data: [DONE]\n\n"
    object: ClassVar[tuple[str, str]]
    prefix: ClassVar[str]

    def __init__(self, model: str, asked: Asked) -> None:
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.asked = asked

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        body = {**self.head, "object": self.object[1], "choices": [{"logprobs": None, "finish_reason": None, **choice}]}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def index(self, token: Token) -> int:
        return token.request * len(self.asked.requests[0].draws) + token.draw

    @property
    def choices(self) -> int:
        return len(self.asked.requests) * len(self.asked.requests[0].draws)

    def first(self) -> list[bytes]:
        return []

    def last(self) -> list[bytes]:
        return []

    def of(self, token: Token) -> list[bytes]:
        index = self.index(token)
        frames = [self._chunk({"index": index, **self.text(token.text)})] if token.text else []
        if token.finish_reason:
            frames.append(self._chunk({"index": index, **self.text(""), "finish_reason": token.finish_reason}))
        return frames

    def error(self, error: Exception) -> bytes:
        body = {"error": {"message": str(error), "type": "server_error", "param": None, "code": None}}
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    def text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def whole_text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, tokens: Sequence[Token]) -> dict[str, Any]:
        choices = []
        for index in range(self.choices):
            own = [token for token in tokens if self.index(token) == index]
            text = "".join(token.text for token in own)
            choices.append(
                {"index": index, **self.whole_text(text), "logprobs": None, "finish_reason": own[-1].finish_reason}
            )
        prompt = sum(len(request.prompt.ids) for request in self.asked.requests)
        usage = {"prompt_tokens": prompt, "completion_tokens": len(tokens), "total_tokens": prompt + len(tokens)}
        return {**self.head, "object": self.object[0], "choices": choices, "usage": usage}


class ChatFrames(Frames):
    """A chat's."""

    object = ("chat.completion", "chat.completion.chunk")
    prefix = "chatcmpl"

    def first(self) -> list[bytes]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk({"index": index, "delta": delta}) for index in range(self.choices)]

    def text(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}


class TextFrames(Frames):
    """A completion's."""

    object = ("text_completion", "text_completion")
    prefix = "cmpl"

    def text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    whole_text = text
