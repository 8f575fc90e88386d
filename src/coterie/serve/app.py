"""The server as a FastAPI application, and how `coterie serve` runs it."""

import socket
from contextlib import closing

import uvicorn
from fastapi import FastAPI

from coterie.errors import CoterieError
from coterie.serve import chat, completions, errors
from coterie.serve.catalogue import Catalogue
from coterie.serve.playground import pages
from coterie.serve.worker import Worker
from coterie.settings.keywords import takes_fields
from coterie.settings.serving import AddressSettings, ServeSettings


def create_app(catalogue: Catalogue, worker: Worker, settings: ServeSettings) -> FastAPI:
    """Put the routes together; what they share lies in the application's state."""
    app = FastAPI(title="Coterie", summary="LoRA experts, mixed for every request", docs_url=None, redoc_url=None)
    app.state.catalogue, app.state.worker, app.state.settings = catalogue, worker, settings
    errors.install(app)
    for part in (chat, completions, pages):
        app.include_router(part.routes)
    return app


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
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])


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
