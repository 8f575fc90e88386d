"""Asking an ASGI app without a server, message by message."""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(b"".join(self.parts))

    @property
    def code(self) -> str:
        """What an error in OpenAI's shape says is wrong, in a word."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
        return error["code"]


def scope_of(path: str, headers: dict[str, str] | None = None, method: str = "POST") -> dict[str, Any]:
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b"secret=words"}


async def ask(app: Any, scope: dict[str, Any], body: Iterable[bytes] = (b"",), pause: float = 0) -> Answer:
    """Send a body piece by piece, and then nothing until the client goes."""
    pieces, answer, gone = list(body), Answer(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if pieces:
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answer.parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return answer


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An app that answers with what it was sent."""
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body += message["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
