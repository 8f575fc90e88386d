"""Every error in OpenAI's form: {"error": {"message", "type", "param", "code"}}, and nothing of this machine in it."""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coterie.errors import CoterieError, shortened
from coterie.serve.catalogue import UnknownModel
from coterie.serve.worker import WorkerDied

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}
"""What clients know the statuses by, where it is not the request that is wrong."""
WORDS = {
    400: "the body cannot be read as JSON",
    404: "nothing is served at this path",
    405: "this path takes no such method",
}
_FOLDERS = re.compile(r"(?<![\w/.:])~?/(?:[^\s/'\"<>]+/)+")


class ApiError(CoterieError):
    """What a client is told.

    Attributes:
        status: of HTTP.
        param: the field that it is about, if it is about one.
        code: a word that programs read.
        headers: such as Retry-After.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Store what is told."""
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """Return the object that is sent; of paths of this machine only the last part."""
        kind = TYPES.get(self.status, INVALID)
        message = _FOLDERS.sub("", str(self))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """Say what a client is told of any error; of a bug of ours nothing but that it is one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        message = WORDS.get(error.status_code, str(error.detail))
        return ApiError(message, error.status_code, headers=error.headers)
    if isinstance(error, UnknownModel):
        return ApiError(str(error), 404, param="model", code="model_not_found")
    if isinstance(error, WorkerDied):
        return ApiError(str(error), 503, code="worker_died")
    if isinstance(error, CoterieError):
        return ApiError(str(error))
    if isinstance(error, TimeoutError):
        return ApiError("the request took longer than it may here", 504, code="timeout")
    return ApiError("the server has failed at this request; its log says how", 500, code="internal_error")


def _of_validation(error: RequestValidationError) -> ApiError:
    """Tell the first thing that is wrong with a body: the field, what is wrong, and what was given."""
    found = error.errors()
    same_field = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
    first = max(
        same_field, key=lambda one: len(one["loc"])
    )  # of the forms that a field can have, the one that was meant
    if first["type"] == "json_invalid":
        return ApiError(f"the body is no JSON: {first['ctx']['error']}, at character {first['loc'][-1]}")
    place = [part for part in first["loc"][1:] if isinstance(part, int) or re.fullmatch(r"\w+", part)]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    if told := first.get("ctx", {}).get("param"):
        return ApiError(message, param=told, code=first["type"])
    if not param:
        return ApiError("the body is no JSON object", code=first["type"])
    if first["type"] == "missing":
        return ApiError(f"{param} is missing", param=param, code="missing")
    given = shortened(repr(first["input"]), 80)
    return ApiError(f"{param}: {message[:1].lower()}{message[1:]}, got {given}", param=param, code=first["type"])


class Failures:
    """Answers a bug of ours as a request's end like any other, so that its connection serves the next one.

    An error that reaches uvicorn has its connection cut, even where it was answered: a client that kept the connection
    would find it reset at its next request.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand before an app."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; what fails after its answer began can only be cut off, and is raised."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await (await answer_error(Request(scope), error))(scope, receive, send)


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with an error; one of ours is logged with all that is known of it."""
    told = as_api_error(error)
    if told.status == 500:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    response = as_response(told)
    response.headers["x-request-id"] = getattr(request.state, "request_id", "")  # before the app nothing adds it
    return response


def as_response(error: ApiError) -> JSONResponse:
    """Return what is sent, which is an ASGI application too."""
    return JSONResponse(error.body(), error.status, dict(error.headers or {}))


def come_again(seconds: float) -> dict[str, str]:
    """Return the header that says when to ask again."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def install(app: FastAPI) -> None:
    """Let an application answer every error so."""
    for kind in (CoterieError, TimeoutError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
