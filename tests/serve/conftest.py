"""One server for the tests of a module: the tiny mixture behind real HTTP, in a thread, on a free port."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
import uvicorn

from coterie.serve.app import create_app, listening
from coterie.serve.catalogue import Catalogue
from coterie.serve.worker import Worker
from coterie.settings.reading import from_flat
from coterie.settings.serving import ServeSettings


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
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
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
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        yield http
