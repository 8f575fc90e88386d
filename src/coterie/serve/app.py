"""The server as a FastAPI application, and how `coterie serve` runs it."""

import logging
import os
import socket
from concurrent.futures import Future
from contextlib import closing
from functools import partial

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from coterie.artifacts import as_path
from coterie.engine.request import Load
from coterie.errors import CoterieError
from coterie.serve import admin, chat, completions, errors, health, models, responses
from coterie.serve.catalogue import Catalogue
from coterie.serve.hosts import HostGate
from coterie.serve.keys import KeyGate, read_keys
from coterie.serve.lifetime import Doors, Lifetime, Server
from coterie.serve.limits import AnyTypeIsJson, BodyLimit, QueueLimit
from coterie.serve.logs import RequestLog, write_logs
from coterie.serve.metrics import Metrics
from coterie.serve.playground import pages
from coterie.serve.replicas import run_replicas
from coterie.serve.upstream.opening import open_upstream
from coterie.serve.worker import Worker
from coterie.settings.keywords import takes_fields
from coterie.settings.serving import AddressSettings, ServeSettings

logger = logging.getLogger(__name__)

MIB = 2**20
ASKING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/route"})
"""Where models are asked, which takes time."""


def create_app(
    catalogue: Catalogue, worker: Worker, settings: ServeSettings, lifetime: Lifetime | None = None
) -> FastAPI:
    """Put the routes together; what they share lies in the application's state.

    Args:
        catalogue: what answers.
        worker: owns the models.
        settings: of the server.
        lifetime: says when requests are taken; always, if none is given.

    Raises:
        CoterieError: for a file of keys that is not one.
    """
    app = FastAPI(title="Coterie", summary="LoRA experts, mixed for every request", docs_url=None, redoc_url=None)
    app.state.catalogue, app.state.worker, app.state.settings = catalogue, worker, settings
    app.state.lifetime = lifetime or Lifetime()
    app.state.upstream = None

    def loads() -> dict[str, Load]:
        recruiting = {cell.desk.name: cell.desk.shelf.load for cell in catalogue.recruits}
        return recruiting | {desk.name: desk.engine.load for desk in catalogue.desks}

    app.state.metrics = metrics = Metrics(loads, settings.operation.metrics_names)

    async def told(accept: str) -> tuple[bytes, str]:
        return metrics.page(accept)

    app.state.told = told
    metrics.set_up({name: str(value) for name, value in settings.capacity})
    worker.stepped = partial(metrics.add, "iteration_tokens_total")
    errors.install(app)
    for part in (chat, responses, completions, models, health, admin, pages):
        app.include_router(part.routes)
    guard(app, settings)
    return app


def guard(app: FastAPI, settings: ServeSettings) -> None:
    """Put before an app what logs, lets in and limits; each sees what those that are added after it let through."""
    access, limits = settings.access, settings.limits
    keys = None if access.api_key_file is None else read_keys(as_path(access.api_key_file))
    app.add_middleware(errors.Failures)
    app.add_middleware(AnyTypeIsJson)
    app.add_middleware(BodyLimit, most=int(limits.max_body * MIB))
    app.add_middleware(QueueLimit, paths=ASKING, most=limits.max_queue)
    app.add_middleware(KeyGate, keys=keys)
    app.add_middleware(Doors, lifetime=app.state.lifetime)
    if access.cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=access.cors_origin, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(HostGate, allowed=access.allowed_hosts or (["*"] if keys else None))
    app.add_middleware(RequestLog, ended=app.state.metrics.answered)


def load(app: FastAPI) -> None:
    """Load all that is served, where base models may be run.

    Raises:
        CoterieError: for mixtures that cannot be loaded, or another server that cannot answer for them.
    """
    server = app.state
    server.catalogue.load_all()
    mixtures = [desk.grid.mixture for desk in server.catalogue.desks]
    server.upstream = open_upstream(server.settings.upstream, mixtures, server.worker)


def opened(settings: ServeSettings, worker: Worker) -> FastAPI:
    """Return an app that has loaded what it serves.

    Raises:
        CoterieError: as `create_app` and `load`.
    """
    app = create_app(Catalogue(settings), worker, settings)
    worker.put(lambda: load(app)).result()
    return app


@takes_fields(ServeSettings)
def run_server(settings: ServeSettings) -> None:
    """Serve mixtures over HTTP until the process is told to stop.

    Raises:
        CoterieError: for an address that cannot be listened at, or mixtures that cannot be loaded.
    """
    Catalogue(settings).check()
    if settings.replication.ray:
        return run_replicas(settings, opened, listening)
    with closing(listening(settings.address)) as listener, Worker() as worker:
        catalogue, lifetime = Catalogue(settings), Lifetime("loading")
        app = create_app(catalogue, worker, settings, lifetime)
        write_logs()
        server = Server(app, lifetime, settings.operation.drain)
        loading = worker.put(lambda: load(app))

        def loaded(future: Future[None]) -> None:
            server.should_exit |= future.exception() is not None
            if lifetime.state == "loading" and not server.should_exit:
                lifetime.state = "ready"
                url = "http://{}:{}".format(*listener.getsockname()[:2])
                models = [cell.id for cell in catalogue.listed]
                logger.info("ready", extra={"facts": {"url": url, "models": models}})

        loading.add_done_callback(loaded)
        server.run([listener])
        if loading.done():
            loading.result()
    if worker.is_busy:  # with something that took too long to wait for, in torch, which does not end well by itself
        logging.shutdown()
        os._exit(0)


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
