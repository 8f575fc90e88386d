"""From the first probe to the last answer: a server lives while it loads, is ready, and finishes what it has begun."""

import logging
import signal
from types import FrameType
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from coterie.serve.errors import ApiError, as_response, come_again
from coterie.serve.keys import METRICS_PATH, is_open

logger = logging.getLogger(__name__)

SAME: Any = {"loop": "asyncio", "http": "h11"}
"""uvicorn's own parts, whatever other ones an extra has brought: what a broken request gets hangs on them."""
SOON = 5.0  # seconds after which a client may come again


class Lifetime:
    """What a server is at.

    Attributes:
        state: it loads what it serves, is ready to be asked, or finishes what it was asked and takes nothing more.
    """

    def __init__(self, state: Literal["loading", "ready", "draining"] = "ready") -> None:
        """Begin at a state."""
        self.state = state


class Doors:
    """Lets nobody in but probes while a server loads or drains: 503."""

    def __init__(self, app: ASGIApp, lifetime: Lifetime) -> None:
        """Stand before an app."""
        self.app = app
        self.lifetime = lifetime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        state, path = self.lifetime.state, scope.get("path", "")
        if scope["type"] != "http" or state == "ready" or is_open(path) or path == METRICS_PATH:
            return await self.app(scope, receive, send)
        words = "is still loading" if state == "loading" else "is shutting down"
        headers = {**come_again(SOON), **({"Connection": "close"} if state == "draining" else {})}
        error = ApiError(f"the server {words}; come again later", 503, code=state, headers=headers)
        return await as_response(error)(scope, receive, send)


KEEP_ALIVE = 75
"""Seconds that a connection may rest: longer than clients and proxies keep one (httpx 5, nginx and AWS 60), so that it
is they who close it, and nobody asks by one that is just being closed."""


class Server(uvicorn.Server):
    """uvicorn, told by the first signal to finish what it was asked, and by a second one to stop at once.

    While it drains it listens no more; what has not ended when its patience ends, is cut off.
    """

    def __init__(self, app: ASGIApp, lifetime: Lifetime, patience: int) -> None:
        """Get ready to serve an app; a signal is waited on for so many seconds."""
        told = {"timeout_graceful_shutdown": patience, "timeout_keep_alive": KEEP_ALIVE}
        config = uvicorn.Config(app, log_config=None, access_log=False, **told, **SAME)
        super().__init__(config)
        self._lifetime = lifetime

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; uvicorn does not learn of the signal, which it would raise again in the end."""
        self.force_exit = self.should_exit
        self._lifetime.state, self.should_exit = "draining", True
        logger.info("draining", extra={"facts": {"signal": signal.Signals(sig).name}})
