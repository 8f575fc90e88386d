"""What a request may take before the model sees it: bytes, seconds to send them, and a place among those that wait."""

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coterie.serve.errors import ApiError, as_response, come_again

BODY_SECONDS = 30.0
"""How long a request may take to send its body; a client that trickles holds no more than this."""
CLOSE = {"Connection": "close"}
"""What is said where bytes of a body were not read, behind which no further request can be found."""


class BodyLimit:
    """Reads the body of a request before the app does, as far as it is allowed to go: 413 and 408 beyond."""

    def __init__(self, app: ASGIApp, most: int, seconds: float = BODY_SECONDS) -> None:
        """Stand before an app.

        Args:
            app: gets the body as if nobody had read it.
            most: bytes that a body may have, counted as they come, whatever its header says.
            seconds: how long it may take to come.
        """
        self.app = app
        self.most = most
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with all of its body, or refuse it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                more = not said.isdigit() or int(said) <= self.most
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False) and len(body) <= self.most
        except TimeoutError:
            words = f"the body did not come within {self.seconds:g} seconds"
            return await as_response(ApiError(words, 408, code="request_timeout", headers=CLOSE))(scope, receive, send)
        if len(body) > self.most or (said.isdigit() and int(said) > self.most):
            words = f"the body has more than the {self.most:,} bytes that this server takes"
            error = ApiError(words, 413, code="request_too_large", headers=CLOSE)
            return await as_response(error)(scope, receive, send)
        return await self.app(scope, _replaying(bytes(body), receive), send)


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read once more, and then what comes behind it: that the client has gone."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


class AnyTypeIsJson:
    """Takes a body for JSON whatever type it is said to have, as `curl -d` says the wrong one.

    Not from a page in a browser, which always names its origin: other sites could ask for answers by plain forms then.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand before an app."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on under the type that its body has."""
        if scope["type"] == "http" and not any(name == b"origin" for name, _ in scope["headers"]):
            headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope["headers"] = [*headers, (b"content-type", b"application/json")]
        await self.app(scope, receive, send)


class QueueLimit:
    """Lets only so many requests wait for the model; those beyond get 429 and are told when to come again."""

    def __init__(self, app: ASGIApp, paths: frozenset[str], most: int) -> None:
        """Stand before an app.

        Args:
            app: answers.
            paths: where the model is asked.
            most: requests that are answered or wait at once.
        """
        self.app = app
        self.paths = paths
        self.most = most
        self.inside = 0
        self.usual = 1.0  # seconds that a request takes from its arrival to its end, as the last ones did

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count it until its answer has ended, or refuse it."""
        if scope["type"] != "http" or scope["path"] not in self.paths:
            return await self.app(scope, receive, send)
        if self.inside >= self.most:
            words = f"{self.inside} requests are being answered or wait, and no more may; come again later"
            error = ApiError(words, 429, code="queue_full", headers=come_again(self.usual))
            return await as_response(error)(scope, receive, send)
        self.inside += 1
        started = time.monotonic()
        try:
            return await self.app(scope, receive, send)
        finally:
            self.inside -= 1
            self.usual += (time.monotonic() - started - self.usual) / 8
