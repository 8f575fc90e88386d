"""Alive is not ready (llm-d's simulator has both probes, as Kubernetes has)."""

import asyncio

import httpx2
import pytest

from asgi import ask, scope_of
from coterie.serve.app import create_app
from coterie.serve.catalogue import Catalogue
from coterie.serve.lifetime import Lifetime
from coterie.serve.worker import Worker
from coterie.settings.reading import from_flat
from coterie.settings.serving import ServeSettings
from served import started

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(("state", "ready"), [("loading", 503), ("ready", 200), ("draining", 503)])
def test_a_server_is_ready_when_all_is_loaded_and_until_it_is_told_to_stop(state, ready):
    settings = from_flat(ServeSettings, {"mixtures": ["none"]})
    with Worker() as worker:
        app = create_app(Catalogue(settings), worker, settings, Lifetime(state))
        health, found, models = (
            asyncio.run(ask(app, scope_of(path, method="GET"))) for path in ("/health", "/ready", "/v1/models")
        )
        metrics = asyncio.run(ask(app, scope_of("/metrics", method="GET")))
        words = [b'{"model": "x", "messages": [{"role": "user", "content": "?"}]}']
        chat = asyncio.run(ask(app, scope_of(CHAT, {"Content-Type": "application/json"}), words))
    assert (health.status, found.status, found.json) == (200, ready, {"status": state})
    assert metrics.status == 200 and models.status in (ready, 404)
    assert (chat.status, chat.code) == ((404, "model_not_found") if ready == 200 else (503, state))
    assert ready == 200 or int(chat.headers["retry-after"]) > 0


def test_a_dead_worker_is_neither_alive_nor_ready(run_folder):
    with started(f"elrea={run_folder}") as server:
        assert httpx2.get(f"{server.url}/ready").status_code == 200
        server.worker._jobs.put(None)  # noqa: SLF001 - as if a step had broken
        while server.worker.is_alive:
            pass
        assert httpx2.get(f"{server.url}/health").status_code == httpx2.get(f"{server.url}/ready").status_code == 503
        body = {"model": "elrea", "messages": [{"role": "user", "content": "add"}]}
        answer = httpx2.post(server.url + CHAT, json=body)
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "service_unavailable"
