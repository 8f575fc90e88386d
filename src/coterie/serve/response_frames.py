"""The frames of `/v1/responses`, as OpenAI's clients read them and the Open Responses specification has them."""

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coterie.serve.frames import DONE, ChatFrames, Json, Piece, chat_logprobs, sse


@dataclass
class ResponseFrames(ChatFrames):
    """The events of `/v1/responses`: one message, whose text grows.

    Attributes:
        settings: what is told of the request.
    """

    settings: Json = field(default_factory=dict)

    prefix = "resp_"

    def __post_init__(self) -> None:
        """Name the response and its message."""
        super().__post_init__()
        self._message = f"msg_{uuid.uuid4().hex}"
        self._pieces: list[Piece] = []
        self._sent = 0

    def opening(self, index: int) -> bytes:
        """Tell of a response that begins, and of its message without text."""
        begun = self._response("in_progress", [])
        item = self._item("in_progress", []) | self._prompt_weights(index)
        return (
            self._event("response.created", response=begun)
            + self._event("response.in_progress", response=begun)
            + self._event("response.output_item.added", output_index=0, item=item)
            + self._part_event("response.content_part.added", part=self._part("", []))
        )

    def piece(self, piece: Piece) -> bytes:
        """Write the events of a piece: its text if it has any, and the end of the message if it ends."""
        self.usage.written += piece.written
        self._pieces.append(piece)
        frames = b""
        if piece.text or self._logs(piece) or (self.experts and piece.weights):
            logs, detail = self._told_logs(piece), self._detail(piece)
            frames += self._part_event("response.output_text.delta", delta=piece.text, logprobs=logs, **detail)
        if piece.finish_reason:
            item = self._whole_item()
            (part,) = item["content"]
            frames += self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
            frames += self._part_event("response.content_part.done", part=part)
            frames += self._event("response.output_item.done", output_index=0, item=item)
        return frames

    def closing(self) -> bytes:
        """End a stream that went well, with the whole response."""
        response = self._ended()
        return self._event(f"response.{response['status']}", response=response) + DONE

    def failed(self, error: Mapping[str, Any]) -> bytes:
        """End a stream that went wrong, with the response so far and the error."""
        told = error["error"]
        why = {"code": told["code"] or told["type"], "message": told["message"]}
        output = [self._item("incomplete", [self._part("".join(one.text for one in self._pieces), [])])]
        return self._event("response.failed", response=self._response("failed", output) | {"error": why}) + DONE

    def whole(self, answers: Iterable[Sequence[Piece]]) -> Json:
        """Return the response that is not streamed."""
        (pieces,) = answers
        self._pieces = list(pieces)
        self.usage.written += sum(piece.written for piece in pieces)
        return self._ended()

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sent += 1
        return f"event: {kind}\n".encode() + sse({"type": kind, "sequence_number": self._sent - 1, **fields})

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._message, output_index=0, content_index=0, **fields)

    def _response(self, status: str, output: list[Json]) -> Json:
        head = {"id": self.head["id"], "object": "response", "created_at": self.head["created"], "status": status}
        ends = {"completed_at": None, "incomplete_details": None, "usage": None}
        return head | self.settings | ends | {"output": output}

    def _ended(self) -> Json:
        status, usage = self._status, self.usage
        counts = {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.written,
        }
        ends = {"usage": counts, "completed_at": int(time.time()) if status == "completed" else None}
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._response(status, [self._whole_item()]) | ends | {"incomplete_details": why}

    @property
    def _status(self) -> str:
        return "incomplete" if self._pieces[-1].finish_reason == "length" else "completed"

    def _item(self, status: str, content: list[Json]) -> Json:
        return {"id": self._message, "type": "message", "role": "assistant", "status": status, "content": content}

    def _whole_item(self) -> Json:
        """Return the message with all that is told of its routing, whatever of it was streamed."""
        self._begun.clear()
        text = "".join(piece.text for piece in self._pieces)
        logs = [log for piece in self._pieces for log in self._told_logs(piece)]
        return self._item(self._status, [self._part(text, logs)]) | self._detail(*self._pieces)

    def _part(self, text: str, logs: list[Json]) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logs}

    def _told_logs(self, piece: Piece) -> list[Json]:
        told = chat_logprobs(self._logs(piece), self.alternatives, self.vocabulary)
        return told["content"] if told else []
