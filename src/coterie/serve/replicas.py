"""The same app as a Ray Serve deployment: replicas on one machine or many, behind Ray's own proxies.

A replica is a process that loads all that is served. Ray starts another one when it dies or says that its engine is
dead, and sends a request elsewhere that it had not taken yet.
"""

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Receive, Scope, Send

from coterie.cluster import Ray, joined, machines, share, work_in
from coterie.errors import CoterieError
from coterie.serve.logs import write_logs
from coterie.serve.worker import Worker
from coterie.settings.serving import AddressSettings, ServeSettings

logger = logging.getLogger(__name__)

APP = "coterie"
BESIDE = 64  # requests of a replica beside those that wait for a model: probes, lists, metrics
LOGS = {"log_level": "WARNING", "enable_access_log": False}
POLL = 0.1  # seconds

Build = Callable[[ServeSettings, Worker], FastAPI]
"""Makes the app, and loads what it serves."""


class Replica:
    """One process that answers, as Ray Serve wants it: what it is made of, how it is, and the app."""

    def __init__(self, folder: str, settings: ServeSettings, build: Build) -> None:
        """Load all that is served; relative paths begin in a folder.

        Raises:
            CoterieError: for what cannot be loaded.
        """
        work_in(folder)
        write_logs()
        self.worker = Worker().__enter__()
        try:
            self.served = build(settings, self.worker)
        except BaseException:
            self.worker.__exit__()
            raise
        self.served.state.told = self.told_by_all

    def __serve_build_asgi_app__(self) -> ASGIApp:  # noqa: PLW3201 - Ray's name
        """Return what answers; a fault of ours is logged as the server logs it, and goes no further into Ray's logs."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await self.served(scope, receive, send)
            except Exception:  # the client has its 500
                logger.exception("a request has failed")

        return answer

    def check_health(self) -> None:
        """Tell Ray whether anything is answered any more.

        Raises:
            RuntimeError: when the replica is to be started again.
        """
        if not self.worker.is_alive:
            raise RuntimeError("the engine has died")

    def page(self) -> tuple[str, bytes]:
        """Return the replica's name, and all that it has measured."""
        from ray import serve

        return serve.get_replica_context().replica_tag, self.served.state.metrics.page()[0]

    async def told_by_all(self, accept: str) -> tuple[bytes, str]:
        """Return what all replicas have measured, and its content type: a proxy asks any of them."""
        from ray import serve

        handle = serve.get_deployment_handle(Replica.__name__, APP)
        found = await handle.broadcast("page").results_async(return_exceptions=True)
        return beside_each_other([one for one in found if isinstance(one, tuple)]), CONTENT_TYPE_LATEST


def beside_each_other(pages: Sequence[tuple[str, bytes]]) -> bytes:
    """Join pages of metrics, each replica's values under its own label; one that has died has none."""
    families: dict[str, Metric] = {}
    for replica, page in pages:
        for own in text_string_to_metric_families(page.decode()):
            family = families.setdefault(own.name, Metric(own.name, own.documentation, own.type))
            family.samples += [one._replace(labels={**one.labels, "replica": replica}) for one in own.samples]
    registry = CollectorRegistry()
    registry.collect = lambda: iter(families.values())
    return generate_latest(registry)


def run_replicas(settings: ServeSettings, build: Build, listening: Callable[[AddressSettings], socket.socket]) -> None:
    """Serve until the process is told to stop, then let answers end that have begun.

    Args:
        settings: of the server, which every replica gets.
        build: makes a replica's app.
        listening: shows that the address is free on this machine; Ray's proxies listen there then.

    Raises:
        CoterieError: for what cannot be loaded, a cluster that cannot be joined or is too small, or one that serves
            mixtures already.
    """
    if settings.access.allow_folder:
        raise CoterieError(
            "--allow-folder loads into one process, and --ray has several that come and go; leave out one of them"
        )
    with closing(listening(settings.address)) as free:
        host, port = free.getsockname()[:2]
    write_logs()
    with joined() as ray:
        from ray import serve

        serve.start(http_options={"host": host, "port": port}, logging_config=LOGS)
        if APP in serve.status().applications:
            raise CoterieError(f"the Ray cluster serves {APP!r} already; stop that first")
        try:
            deploy(ray, settings, build)
            facts = {"url": f"http://{host}:{port}", "replicas": settings.replication.replicas}
            logger.info("ready", extra={"facts": facts})
            threading.Event().wait()
        except KeyboardInterrupt:
            logger.info("draining", extra={"facts": {}})
        finally:
            serve.delete(APP, _blocking=False)
            while APP in serve.status().applications:
                time.sleep(POLL)


def deploy(ray: Ray, settings: ServeSettings, build: Build) -> None:
    """Start the replicas, and return when all are ready.

    Raises:
        CoterieError: for what a replica cannot load, or more replicas than the cluster has room for.
    """
    from ray import serve

    count = settings.replication.replicas
    deployment: Any = serve.deployment(
        name=Replica.__name__,
        num_replicas=count,
        ray_actor_options=share(machines(ray), count, settings.placement.device),
        max_ongoing_requests=settings.limits.max_queue + BESIDE,
        graceful_shutdown_timeout_s=settings.operation.drain,
        graceful_shutdown_wait_loop_s=POLL,
        max_constructor_retry_count=1,
        logging_config=LOGS,
    )(serve.ingress()(Replica))
    try:
        serve.run(deployment.bind(os.getcwd(), settings, build), name=APP)
    except RuntimeError as error:  # which quotes what a replica raised, with all of its traceback
        told = re.findall(r"CoterieError: (.+)", str(error))
        raise CoterieError(told[-1] if told else f"the replicas cannot start: {error}") from error
