"""Logs: a line of JSON a request, with ids, times and counts, and without a word of what was asked."""

import asyncio
import io
import json
import logging
import re

import pytest

from asgi import ask, echo, scope_of
from coterie.serve.logs import LOGGER, RequestLog, write_logs

CHAT = "/v1/chat/completions"


@pytest.fixture
def restored():
    loggers = [logging.getLogger(name) for name in ("coterie.serve", "uvicorn")]
    before = [(own.handlers, own.propagate, own.level) for own in loggers]
    yield
    for own, (handlers, propagate, level) in zip(loggers, before, strict=True):
        own.handlers, own.propagate = handlers, propagate
        own.setLevel(level)


@pytest.fixture
def stream(restored):
    stream = io.StringIO()
    write_logs(logging.StreamHandler(stream))
    return stream


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def passed(app, scope, body=(b"",)):
    ended = []
    log = RequestLog(app, lambda scope, status: ended.append((scope["path"], status)))
    return asyncio.run(ask(log, scope, body)), ended


def test_every_request_is_a_line_without_what_was_asked(stream):
    answer, ended = passed(echo, scope_of(CHAT, {"Authorization": "Bearer sk-secret"}), [b"tell me a secret"])
    (line,) = lines(stream)
    assert set(line) == {"time", "level", "logger", "event", "request_id", "method", "path", "status", "seconds"}
    assert (line["event"], line["method"], line["path"], line["status"]) == ("request", "POST", CHAT, 200)
    assert "secret" not in stream.getvalue() and answer.parts[0] == b"tell me a secret"
    assert ended == [(CHAT, 200)]


def test_what_the_app_notes_stands_in_the_line(stream):
    async def app(scope, receive, send):
        scope["state"]["key"] = "alice"
        scope["state"]["facts"] |= {"model": "elrea", "prompt_tokens": 3}
        await echo(scope, receive, send)

    passed(app, scope_of(CHAT))
    assert lines(stream)[0].items() >= {"key": "alice", "model": "elrea", "prompt_tokens": 3}.items()


@pytest.mark.parametrize("brought", ["abc-1.2:3_x", "x" * 128])
def test_an_id_that_a_client_brings_is_kept(stream, brought):
    answer, _ = passed(echo, scope_of(CHAT, {"X-Request-Id": brought}))
    assert answer.headers["x-request-id"] == lines(stream)[0]["request_id"] == brought


@pytest.mark.parametrize("brought", ["", "x" * 129, "a b", 'a"b', "a\nb", "\u00e9"])
def test_an_id_that_could_be_anything_else_is_replaced(stream, brought):
    answer, _ = passed(echo, scope_of(CHAT, {"X-Request-Id": brought}))
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert lines(stream)[0]["request_id"] == answer.headers["x-request-id"]


def test_no_two_requests_have_the_same_id(stream):
    assert len({passed(echo, scope_of(CHAT))[0].headers["x-request-id"] for _ in range(50)}) == 50


def test_an_error_is_told_by_kind_and_place_and_not_by_its_message(stream):
    async def app(scope, receive, send):
        raise ValueError("the prompt was: my password is hunter2")

    with pytest.raises(ValueError):
        passed(app, scope_of(CHAT))
    try:
        raise RuntimeError("hunter2")
    except RuntimeError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
    first, second = lines(stream)
    assert first["status"] == 500 and first["cut"] is True
    assert second["error"] == "RuntimeError" and "test_logs.py" in second["at"][-1]
    assert second["event"] == "Exception in ASGI application" and "hunter2" not in stream.getvalue()


def test_a_client_that_goes_is_told_from_an_answer(stream):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def silent(scope, receive, send):
        pass

    assert passed(app, scope_of(CHAT))[1] == [(CHAT, 200)]
    assert passed(silent, scope_of(CHAT))[1] == [(CHAT, 499)]
    assert [(line["status"], line["cut"]) for line in lines(stream)] == [(200, True), (499, True)]


def test_an_answer_passes_part_by_part(stream):
    seen = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"a", b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
            seen.append(part)
        await send({"type": "http.response.body", "body": b""})

    async def scene():
        received = []

        async def send(message):
            received.append((message.get("body"), list(seen)))

        async def receive():
            return {"type": "http.request", "body": b""}

        await RequestLog(app, lambda scope, status: None)(scope_of(CHAT), receive, send)
        return received

    assert asyncio.run(scene()) == [(None, []), (b"a", []), (b"b", [b"a"]), (b"", [b"a", b"b"])]


def test_no_line_holds_a_path_of_any_length_or_an_end_of_line(stream):
    passed(echo, scope_of("/" + "x" * 10_000 + "\n{}"))
    (line,) = lines(stream)
    assert len(line["path"]) == 200 and len(stream.getvalue().splitlines()) == 1


def test_a_terminal_shows_plain_lines_on_which_nothing_acts(restored):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    write_logs(logging.StreamHandler(terminal))
    LOGGER.info("ready", extra={"facts": {"url": "http://127.0.0.1:8000", "path": "/\x1b[31m"}})
    line = re.fullmatch(r"\d\d:\d\d:\d\d (.*)\n", terminal.getvalue())
    assert line and line[1] == "ready, url http://127.0.0.1:8000, path /\\u001b[31m"
