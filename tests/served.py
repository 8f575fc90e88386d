"""One server for the tests of a module: the tiny mixture behind real HTTP, in a thread, on a free port."""

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import uvicorn

from coterie.engine.request import Failure
from coterie.serve.app import create_app, listening, load
from coterie.serve.catalogue import Catalogue
from coterie.serve.lifetime import SAME
from coterie.serve.worker import Worker
from coterie.settings.reading import from_flat
from coterie.settings.serving import ServeSettings

QUESTION = "add 3 4"


class AskingAgain:
    """Clients that ask again and again, each in a thread of its own, until the body of `with` ends."""

    def __init__(self, url: str, count: int) -> None:
        self.url, self.over = url, threading.Event()
        self.threads = [threading.Thread(target=self._ask_again) for _ in range(count)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def _ask_again(self) -> None:
        with httpx2.Client(base_url=self.url, timeout=60) as client:
            while not self.over.is_set():
                self.ask(client)

    def ask(self, client: httpx2.Client) -> None:
        """Ask once, and note what came of it."""
        raise NotImplementedError


class Server(NamedTuple):
    """A server that listens, and what it is made of."""

    url: str
    catalogue: Catalogue
    worker: Worker


@contextlib.contextmanager
def started(*mixtures: str, **options: object) -> Iterator[Server]:
    """Serve mixtures, NAME=FOLDER each, until the `with` ends."""
    settings = from_flat(ServeSettings, {"mixtures": list(mixtures), "device": "cpu", "port": 0, **options})
    with contextlib.closing(listening(settings.address)) as listener, Worker() as worker:
        catalogue = Catalogue(settings)
        app = create_app(catalogue, worker, settings)
        worker.put(lambda: load(app)).result()
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", **SAME))
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", catalogue, worker)
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def server(run_folder: Path) -> Iterator[Server]:
    """The tiny mixture under the id `elrea`."""
    with started(f"elrea={run_folder}") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx2.Client]:
    """One that reads no certificates, which takes longer than most requests."""
    with httpx2.Client(base_url=server.url, timeout=60, verify=False) as http:
        yield http


@pytest.fixture
def breaking(server, monkeypatch):
    """Let the third step of the engine end what is being answered with an error."""

    def with_error(error: Exception) -> None:
        engine = server.catalogue.desks[0].engine
        step, taken = engine.step, itertools.count()

        def broken():
            found = step()
            if next(taken) != 3:
                return found
            handles = {one.request for one in found}
            for handle in handles:
                engine.cancel(handle)
            return [Failure(handle, error) for handle in handles]

        monkeypatch.setattr(engine, "step", broken)

    return with_error


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "elrea", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8, **fields}


def chat(client: httpx2.Client, **fields: Any) -> dict[str, Any]:
    """Ask the usual question."""
    answer = client.post("/v1/chat/completions", json=chat_body(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat_stream(client: httpx2.Client, **fields: Any) -> list[dict[str, Any]]:
    """Ask the usual question, and return the frames of the stream."""
    return frames_of(client.post("/v1/chat/completions", json=chat_body(stream=True, **fields)))


def frames_of(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
