"""The server as a FastAPI application, and how `coterie serve` runs it."""

import socket
from contextlib import closing
from functools import partial

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from coterie.artifacts import as_path
from coterie.engine.request import Load
from coterie.errors import CoterieError
from coterie.serve import chat, completions, errors, health, models
from coterie.serve.catalogue import Catalogue
from coterie.serve.keys import KeyGate, read_keys
from coterie.serve.limits import AnyTypeIsJson, BodyLimit, QueueLimit
from coterie.serve.logs import RequestLog, write_logs
from coterie.serve.metrics import Metrics
from coterie.serve.playground import pages
from coterie.serve.upstream.opening import open_upstream
from coterie.serve.worker import Worker
from coterie.settings.keywords import takes_fields
from coterie.settings.serving import AddressSettings, ServeSettings

MIB = 2**20
ASKING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/route"})
"""Where models are asked, which takes time."""


def create_app(catalogue: Catalogue, worker: Worker, settings: ServeSettings) -> FastAPI:
    """Put the routes together; what they share lies in the application's state."""
    app = FastAPI(title="Coterie", summary="LoRA experts, mixed for every request", docs_url=None, redoc_url=None)
    app.state.catalogue, app.state.worker, app.state.settings = catalogue, worker, settings
    app.state.upstream = open_upstream(settings.upstream, [desk.grid.mixture for desk in catalogue.desks], worker)

    def loads() -> dict[str, Load]:
        return {desk.name: desk.engine.load for desk in catalogue.desks}

    app.state.metrics = metrics = Metrics(loads, settings.operation.metrics_names)
    metrics.set_up({name: str(value) for name, value in settings.capacity})
    worker.stepped = partial(metrics.add, "iteration_tokens_total")
    errors.install(app)
    for part in (chat, completions, models, health, pages):
        app.include_router(part.routes)
    guard(app, settings)
    return app


def guard(app: FastAPI, settings: ServeSettings) -> None:
    """Put before an app what logs, lets in and limits; each sees what those that are added after it let through.

    Raises:
        CoterieError: as `read_keys`.
    """
    access, limits = settings.access, settings.limits
    keys = None if access.api_key_file is None else read_keys(as_path(access.api_key_file))
    app.add_middleware(AnyTypeIsJson)
    app.add_middleware(BodyLimit, most=int(limits.max_body * MIB))
    app.add_middleware(QueueLimit, paths=ASKING, most=limits.max_queue)
    app.add_middleware(KeyGate, keys=keys)
    if access.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=access.cors_origin, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestLog, ended=app.state.metrics.answered)


@takes_fields(ServeSettings)
def run_server(settings: ServeSettings) -> None:
    """Serve mixtures over HTTP until the process is told to stop.

    Raises:
        CoterieError: for an address that cannot be listened at, or mixtures that cannot be loaded.
    """
    with closing(listening(settings.address)) as listener, Worker() as worker:
        catalogue = Catalogue(settings)
        catalogue.load_all()
        app = create_app(catalogue, worker, settings)
        write_logs()
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run([listener])


def listening(address: AddressSettings) -> socket.socket:
    """Return a socket that listens, before anything costly is done.

    Raises:
        CoterieError: when the address is taken, or not of this machine.
    """
    try:
        return socket.create_server((address.host, address.port))
    except OSError as error:
        raise CoterieError(
            f"cannot listen at {address.host}:{address.port}: {error.strerror}; give another --host or --port"
        ) from error
