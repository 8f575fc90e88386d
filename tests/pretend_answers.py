"""A pretend server of the API, whose answers are known word for word, with the real playground in front of it."""

import asyncio
import json
import math
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from coterie.serve.lifetime import SAME
from coterie.serve.playground.pages import routes

EXPERTS = ["base", "cluster-0", "cluster-1", "cluster-2", "cluster-3"]
MIXTURE = {"router": "gradient-centroids", "combiner": "logits", "combiners": ["logits", "layers"], "reroutes": False}
ANSWER = (
    "Sunlight holds all colours. Air scatters the short waves of blue far more than the long waves of red, so blue "
    "light reaches us from every side of the sky. In the evening the light takes a longer way through the air, most "
    "blue is lost on it, and what is left is red."
)


def models() -> list[dict[str, Any]]:
    """A mixture, as another method, two experts and the base model."""
    entries = [("smollm2", "base", []), ("elrea", "mixture", EXPERTS), ("elrea:uniform", "method", EXPERTS)]
    entries += [(name, "expert", [name]) for name in EXPERTS[1:3]]
    return [
        {"id": name, "object": "model", "coterie": {**MIXTURE, "kind": kind, "experts": experts}}
        for name, kind, experts in entries
    ]


def weights(step: float) -> dict[str, float]:
    """Weights that change slowly as the answer grows."""
    values = {name: math.exp(2.5 * math.sin(step / 4 + 1.7 * number)) for number, name in enumerate(EXPERTS)}
    return {name: value / sum(values.values()) for name, value in values.items()}


def pretend_app(key: str | None = None, pause: float = 0.0) -> FastAPI:
    """The application; `state.asked` is what it was asked, and `state.fail` how it is to fail."""
    app = FastAPI()
    app.include_router(routes)
    app.state.asked, app.state.fail, app.state.pause = [], None, pause

    @app.middleware("http")
    async def locked(request: Request, go_on: Any) -> Any:
        if request.url.path.startswith("/v1") and key and request.headers.get("Authorization") != f"Bearer {key}":
            return JSONResponse({"error": {"message": "the API key is wrong"}}, 401)
        return await go_on(request)

    @app.get("/v1/models")
    def listed() -> Any:
        if app.state.fail == "loading":
            return JSONResponse({"error": {"message": "the server is still loading"}}, 503, {"Retry-After": "5"})
        return {"data": models()}

    @app.post("/v1/route")
    async def routed(request: Request) -> dict[str, Any]:
        body = await request.json()
        app.state.asked.append(("route", body))
        return {"data": [{"index": 0, "weights": weights(len(body["messages"][-1]["content"]))}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        app.state.asked.append(("chat", body))
        if app.state.fail == "busy":
            return JSONResponse({"error": {"message": "too many requests wait"}}, 429, {"Retry-After": "7"})
        if body.get("stream"):
            return StreamingResponse(frames(app, body), media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", "content": answer(body)}, "finish_reason": "stop"}
        choice["coterie"] = {"weights": weights(0)}
        return {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}

    return app


async def frames(app: FastAPI, body: dict[str, Any]) -> AsyncIterator[str]:
    """A streamed answer, a word a token."""
    told = body.get("coterie", {})
    yield frame({"index": 0, "delta": {"role": "assistant"}, "finish_reason": None})
    words = re.findall(r"^\S+| ?\S+", answer(body))
    for number, text in enumerate(words):
        choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        if told.get("detail"):
            choice["coterie"] = {"tokens": [{"text": text, "weights": told.get("weights") or weights(number)}]}
        yield frame(choice)
        if app.state.fail == "midway" and number == 3:
            yield 'data: {"error": {"message": "the expert cluster-1 gave no number"}}\n\ndata: [DONE]\n\n'
            return
        await asyncio.sleep(app.state.pause)
    yield frame({"index": 0, "delta": {}, "finish_reason": "stop"})
    yield f'data: {{"choices": [], "usage": {{"completion_tokens": {len(words)}}}}}\n\ndata: [DONE]\n\n'


def frame(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def answer(body: dict[str, Any]) -> str:
    """What is answered: what the question says behind `Say: `, or always the same."""
    question = body["messages"][-1]["content"]
    return question.partition("Say: ")[2] or ANSWER


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Run an application in a thread; give its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", **SAME))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
