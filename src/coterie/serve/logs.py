"""A line for every request and every trouble: ids, times and counts, and never what was asked or answered."""

import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coterie.errors import shortened, shown

LOGGER = logging.getLogger("coterie.serve.requests")
ID_HEADER = "x-request-id"
LONGEST_PATH = 200  # characters
_GOOD_ID = re.compile("[A-Za-z0-9._:-]{1,128}")


class JsonLines(logging.Formatter):
    """Writes a record as one JSON object.

    Of an error it keeps the kind and the lines of code it came through: its message may quote what a client has sent.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage().strip(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line["error"] = type(error).__name__
            line["at"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
        return json.dumps(line, ensure_ascii=True, default=str)


class PlainLines(logging.Formatter):
    """Writes the same for somebody who looks on at a terminal, where nothing that clients sent acts."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        facts = json.loads(JsonLines().format(record))
        time, level, event = facts.pop("time")[11:19], facts.pop("level"), facts.pop("event")
        told = (f"{name} {value}" for name, value in facts.items() if name not in ("logger", "request_id"))
        trouble = "" if level == "info" else f"{level}: "
        return shown(", ".join([f"{time} {trouble}{event}", *told]))


def write_logs(handler: logging.Handler | None = None) -> None:
    """Send what the server and uvicorn tell to stderr, or a handler of one's own: as JSON, plainly to a terminal."""
    handler = handler or logging.StreamHandler()
    is_terminal = isinstance(handler, logging.StreamHandler) and handler.stream.isatty()
    handler.setFormatter(PlainLines() if is_terminal else JsonLines())
    for name in ("coterie.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


class RequestLog:
    """Gives every request an id, which the answer bears, and writes a line when it has ended."""

    def __init__(self, app: ASGIApp, ended: Callable[[Scope, int], None]) -> None:
        """Stand before an app, and before all else that may refuse a request.

        Args:
            app: answers. What it puts into `scope["state"]["facts"]` stands in the line.
            ended: is told of every request its status; 499 for a client that went before it got one.
        """
        self.app = app
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; the answer passes back as it is written."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        brought = Headers(scope=scope).get(ID_HEADER, "")
        state = scope.setdefault("state", {})
        state["request_id"] = brought if _GOOD_ID.fullmatch(brought) else uuid.uuid4().hex
        state["facts"] = {}
        started, status, is_whole = time.perf_counter(), 499, False

        async def named(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[ID_HEADER] = state["request_id"]
            elif message["type"] == "http.response.body":
                is_whole = not message.get("more_body", False)
            await send(message)

        try:
            return await self.app(scope, receive, named)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            spent = time.perf_counter() - started
            facts = {
                "request_id": state["request_id"],
                "method": scope["method"],
                "path": shortened(scope["path"], LONGEST_PATH),
                "status": status,
                "seconds": round(spent, 6),
                **({} if is_whole else {"cut": True}),
                **({"key": state["key"]} if "key" in state else {}),
                **state["facts"],
            }
            LOGGER.info("request", extra={"facts": facts})
            self.ended(scope, status)
