"""A client that has gone costs one step at most, however it was being answered."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from coterie.engine.engine import Engine
from served import Server, chat, chat_body


class Steps:
    """Lets an engine take one step at a time."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.count = 0
        self._allowed = threading.Semaphore(0)
        self._taken = threading.Semaphore(0)
        step = engine.step

        def one():
            self._allowed.acquire()
            try:
                self.count += 1
                return step()
            finally:
                self._taken.release()

        monkeypatch.setattr(engine, "step", one)

    def take(self, count: int) -> None:
        for _ in range(count):
            self._allowed.release()
            assert self._taken.acquire(timeout=30)

    def allow(self, count: int) -> None:
        self._allowed.release(count)


@pytest.fixture
def steps(server: Server, monkeypatch) -> Iterator[Steps]:
    stepping = Steps(server.catalogue.desks[0].engine, monkeypatch)
    yield stepping
    stepping.allow(10_000)


def wait_for(condition) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def post(url: str, **fields: object) -> socket.socket:
    """Send a request by hand, and return the connection."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(
        chat_body(**{"max_tokens": 300, "temperature": 0, "logit_bias": {"257": -100}, **fields})
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("written", [0, 3], ids=["before the first token", "while it is written"])
@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"n": 3, "temperature": 1.0}], ids=str)
def test_who_has_gone_costs_one_step_more(server, client, steps, fields, written):
    """ROCm/ATOM PR #1441, mlx-openai-server#269: a client that left was answered to the end, if it did not stream."""
    connection = post(server.url, **fields)
    wait_for(lambda: steps.engine.load.waiting == 1)
    steps.take(written)
    assert steps.engine.load[:2] == ((0, 1) if written else (1, 0))
    connection.close()
    wait_for(lambda: steps.engine.is_idle or not server.worker._jobs.empty())
    steps.allow(1)
    wait_for(lambda: steps.engine.is_idle)
    assert steps.engine.load[:3] == (0, 0, 0.0) and steps.count <= written + 1
    steps.allow(10_000)
    assert chat(client)["choices"]


def test_a_client_that_leaves_while_others_are_answered_takes_nobody_along(server, client, steps):
    """vLLM's gauges of what runs and waits return to nothing."""
    leaving = post(server.url, stream=True)
    wait_for(lambda: steps.engine.load.waiting == 1)
    steps.take(2)
    found: list[str] = []
    staying = threading.Thread(target=lambda: found.append(chat(client, temperature=0)["choices"][0]["finish_reason"]))
    staying.start()
    wait_for(lambda: not server.worker._jobs.empty())
    steps.take(2)
    leaving.close()
    steps.allow(10_000)
    staying.join()
    assert found in (["length"], ["stop"])
    wait_for(lambda: steps.engine.load[:3] == (0, 0, 0.0))
