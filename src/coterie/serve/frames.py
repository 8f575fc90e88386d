"""Tokens of an answer as what goes over the wire: chunks of a stream, whole answers, usage, log-probabilities.

Pure functions and counters: nothing here knows of a model, a request or a connection.
"""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from coterie.engine.request import FinishReason, Scored, Token
from coterie.serve.token_bytes import TokenBytes

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"
FLOOR = -9999.0
"""Stands for the log of a probability of 0, which JSON cannot write."""


def sse(event: Mapping[str, Any]) -> bytes:
    """Write an object as one event of a stream."""
    return b"data: " + json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Usage:
    """Tokens that were read and written; those of the prompt that were kept from before count among them."""

    prompt: int
    written: int = 0
    cached: int = 0

    def plain(self) -> Json:
        """Return the object that clients read."""
        counts = {"prompt_tokens": self.prompt, "completion_tokens": self.written}
        total = {"total_tokens": self.prompt + self.written}
        return counts | total | {"prompt_tokens_details": {"cached_tokens": self.cached}}


# ------------------------------------------------------------------------------------------------ tokens


class Log(NamedTuple):
    """The log-probability of one token of a text, with those of its alternatives, likeliest first."""

    token: int
    bytes: bytes
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """What a token has made certain of an answer: text, and the logs of the tokens that it shows.

    Attributes:
        index: which of the answers.
        text: new text.
        logs: of tokens whose text begins in it.
        finish_reason: why the answer ends with it, or None.
        weights: the experts' shares that chose the token, where they are its own.
        written: how many tokens were written for it; none for a prompt that is given back.
    """

    index: int
    text: str
    logs: tuple[Log, ...] = ()
    finish_reason: FinishReason | None = None
    weights: tuple[float, ...] | None = None
    written: int = 1


class Pieces:
    """One answer, token by token: the log of a token goes out with the text of the token, and never without it."""

    def __init__(self, index: int, vocabulary: TokenBytes) -> None:
        """Begin an answer."""
        self._index = index
        self._vocabulary = vocabulary
        self._waiting: list[Log] = []
        self._ahead = 0  # bytes of tokens whose logs are out, but not yet all of their text
        self._begins = True

    def push(self, token: Token) -> Piece:
        """Take the next token of the answer, and return what is certain now."""
        own = self._vocabulary.added(token.id, begins=self._begins)
        self._begins = self._begins and not self._vocabulary.shows(token.id)
        self._waiting.append(Log(token.id, own, token.logprob, token.top))
        logs = self._shown(len(token.text.encode()))
        if token.finish_reason == "length" or (token.finish_reason and not own):  # what is left is only invisible
            logs += self._waiting
        return Piece(self._index, token.text, tuple(logs), token.finish_reason, token.weights)

    def _shown(self, size: int) -> list[Log]:
        """Return the waiting logs of tokens whose bytes begin within the next `size` bytes of the text."""
        covered, count = self._ahead, 0
        while count < len(self._waiting) and covered < size:
            covered += len(self._waiting[count].bytes)
            count += 1
        self._ahead = max(0, covered - size)
        shown, self._waiting = self._waiting[:count], self._waiting[count:]
        return shown


def echo(index: int, prompt: str | None, ids: Sequence[int], scored: Sequence[Scored], vocabulary: TokenBytes) -> Piece:
    """Return a prompt as the beginning of its answer, the first token without a log; None for a prompt of tokens."""
    logs: list[Log] = []
    begins = True
    for token, known in zip(ids, [None, *scored] if scored else [None] * len(ids), strict=True):
        own = vocabulary.added(token, begins=begins)
        begins = begins and not vocabulary.shows(token)
        logs.append(Log(token, own, known.logprob if known else None, known.top if known else ()))
    text = b"".join(log.bytes for log in logs).decode(errors="replace") if prompt is None else prompt
    return Piece(index, text, tuple(logs), written=0)


def chat_logprobs(logs: Sequence[Log], alternatives: int | None, vocabulary: TokenBytes) -> Json | None:
    """Return the logs of a chat's tokens, each with so many alternatives; None where they were not asked for."""

    def entry(token: int, own: bytes, logprob: float | None) -> Json:
        text = own.decode(errors="replace") or vocabulary.name(token)
        return {"token": text, "logprob": floored(logprob), "bytes": list(own)}

    if alternatives is None:
        return None
    content = [
        entry(log.token, log.bytes, log.logprob)
        | {"top_logprobs": [entry(i, vocabulary.middle(i), value) for i, value in log.top[:alternatives]]}
        for log in logs
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    logs: Sequence[Log], alternatives: int | None, vocabulary: TokenBytes, offset: int = 0
) -> Json | None:
    """Return the logs of a completion's tokens, whose text begins at a character; None where they were not asked for.

    The token itself always stands among its alternatives, with the very same number: lm-evaluation-harness takes it for
    the likeliest if it is equal to the largest.
    """
    if alternatives is None:
        return None
    offsets = []
    for log in logs:
        offsets.append(offset)
        offset += characters([log])
    tops = [None if log.logprob is None else _named(log, alternatives, vocabulary) for log in logs]
    names = [vocabulary.name(log.token) for log in logs]
    values = [floored(log.logprob) for log in logs]
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def characters(logs: Iterable[Log]) -> int:
    """Return how many characters begin in tokens."""
    return sum(byte & 0xC0 != 0x80 for log in logs for byte in log.bytes)


def _named(log: Log, alternatives: int, vocabulary: TokenBytes) -> dict[str, float]:
    """Return a token and its alternatives by name; of two that have the same name the second one is told by its id."""
    named: dict[str, float] = {}
    for token, value in dict([*log.top[:alternatives], (log.token, log.logprob or 0.0)]).items():
        name = vocabulary.name(token)
        named[f"token_id:{token}" if name in named else name] = max(value, FLOOR)
    return named


def floored(logprob: float | None) -> float | None:
    """Return a log that JSON can write; None where there is none, as for the first token of a text."""
    return None if logprob is None else max(logprob, FLOOR)


# ------------------------------------------------------------------------------------------------ frames


@dataclass
class Frames:
    """The frames of one response, streamed or whole.

    Attributes:
        model: as the client has named it.
        vocabulary: the tokens' bytes.
        usage: is counted while pieces pass.
        alternatives: to each token that are shown; None for no log-probabilities.
        usage_chunk: end a stream with its usage.
        usage_always: give it with every chunk, too.
        experts: names in the bank's order, where the routing is told; empty where it is not.
        weights: what they weigh for the prompt of each answer, by its index, where that is known.
    """

    model: str
    vocabulary: TokenBytes
    usage: Usage
    alternatives: int | None = None
    usage_chunk: bool = False
    usage_always: bool = False
    experts: tuple[str, ...] = ()
    weights: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    head: Json = field(init=False)

    prefix, object, chunk = "", "", ""

    def __post_init__(self) -> None:
        """Name the response."""
        self.head = {"id": f"{self.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}
        self._begun: set[int] = set()

    def _frame(self, choices: list[Json], usage: Json | None = None) -> bytes:
        body: Json = self.head | {"object": self.chunk, "choices": choices}
        if self.usage_chunk or self.usage_always:
            body["usage"] = self.usage.plain() if self.usage_always else usage
        return sse(body)

    def opening(self, index: int) -> bytes:
        """Open an answer; nothing where its form has no such frame."""
        return b""

    def piece(self, piece: Piece) -> bytes:
        """Write the frames of a piece: its text if it has any, and the end of the answer if it ends."""
        self.usage.written += piece.written
        frames = b""
        if piece.text or self._logs(piece) or (self.experts and piece.weights):
            frames += self._frame([self._choice(piece._replace(finish_reason=None)) | self._detail(piece)])
        if piece.finish_reason:
            frames += self._frame([self._end(piece.index, piece.finish_reason)])
        return frames

    def closing(self) -> bytes:
        """End a stream that went well."""
        return (self._frame([], self.usage.plain()) if self.usage_chunk else b"") + DONE

    def failed(self, error: Mapping[str, Any]) -> bytes:
        """End a stream that went wrong, with the error in OpenAI's form."""
        return sse(error) + DONE

    def whole(self, answers: Iterable[Sequence[Piece]]) -> Json:
        """Return the response that is not streamed, with every answer's pieces."""
        choices = []
        for pieces in answers:
            self.usage.written += sum(piece.written for piece in pieces)
            logs = tuple(log for piece in pieces for log in piece.logs)
            text = "".join(piece.text for piece in pieces)
            joined = Piece(pieces[0].index, text, logs, pieces[-1].finish_reason)
            choices.append(self._whole(joined) | self._detail(*pieces))
        return self.head | {"object": self.object, "choices": choices, "usage": self.usage.plain()}

    def _prompt_weights(self, index: int) -> Json:
        """Return what is told of an answer's routing before its first token, where that is known."""
        if not self.experts or index not in self.weights:
            return {}
        self._begun.add(index)
        return {"coterie": {"weights": self.weights[index]}}

    def _detail(self, *pieces: Piece) -> Json:
        """Return what is told of an answer's routing: the prompt's weights once, and those of tokens."""
        if not self.experts:
            return {}
        index = pieces[0].index
        first = index not in self._begun
        self._begun.add(index)
        own = [dict(zip(self.experts, one.weights, strict=True)) if one.weights else None for one in pieces]
        tokens = [{"text": one.text, "weights": weights} for one, weights in zip(pieces, own, strict=True)]
        weights = {"weights": self.weights.get(index, own[0])} if first else {}
        return {"coterie": weights | ({"tokens": tokens} if any(own) else {})}

    def _logs(self, piece: Piece) -> list[Log]:
        """Return the logs that are told: of a text all, with that of the token that ends it."""
        return [*piece.logs] if self.alternatives is not None else []

    def _choice(self, piece: Piece) -> Json:
        raise NotImplementedError

    def _end(self, index: int, reason: FinishReason) -> Json:
        raise NotImplementedError

    def _whole(self, piece: Piece) -> Json:
        raise NotImplementedError


class ChatFrames(Frames):
    """The frames of `/v1/chat/completions`."""

    prefix, object, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> bytes:
        """Say who speaks, before anything is said."""
        choice: Json = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return self._frame([choice | {"finish_reason": None} | self._prompt_weights(index)])

    def _logs(self, piece: Piece) -> list[Log]:
        """Return the logs that are told: of a chat those of tokens that are seen, which together are its content."""
        return [log for log in super()._logs(piece) if log.bytes]

    def _choice(self, piece: Piece) -> Json:
        logprobs = chat_logprobs(self._logs(piece), self.alternatives, self.vocabulary)
        return {"index": piece.index, "delta": {"content": piece.text}, "logprobs": logprobs, "finish_reason": None}

    def _end(self, index: int, reason: FinishReason) -> Json:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}

    def _whole(self, piece: Piece) -> Json:
        logprobs = chat_logprobs(self._logs(piece), self.alternatives, self.vocabulary)
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.index, "message": message, "logprobs": logprobs, "finish_reason": piece.finish_reason}


class CompletionFrames(Frames):
    """The frames of `/v1/completions`."""

    prefix, object, chunk = "cmpl-", "text_completion", "text_completion"

    def __post_init__(self) -> None:
        """Name the response, and begin to count characters."""
        super().__post_init__()
        self._characters: dict[int, int] = {}

    def _choice(self, piece: Piece) -> Json:
        offset = self._characters.get(piece.index, 0)
        self._characters[piece.index] = offset + characters(self._logs(piece))
        return self._whole(piece, offset)

    def _end(self, index: int, reason: FinishReason) -> Json:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason}

    def _whole(self, piece: Piece, offset: int = 0) -> Json:
        logprobs = completion_logprobs(self._logs(piece), self.alternatives, self.vocabulary, offset)
        return {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
