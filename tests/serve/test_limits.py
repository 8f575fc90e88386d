"""Limits on bodies and on how many wait."""

import asyncio

from asgi import ask, echo, scope_of
from coterie.serve.limits import BodyLimit, QueueLimit

CHAT = "/v1/chat/completions"


def sent(pieces, headers=None, most=10, seconds=5.0, pause=0.0):
    return asyncio.run(ask(BodyLimit(echo, most, seconds), scope_of(CHAT, headers), pieces, pause))


def test_a_body_passes_as_it_was_sent_up_to_the_limit():
    for pieces in ([b""], [b"0123456789"], [b"01", b"", b"23456789"], [b"0123456789", b""]):
        answer = sent(pieces)
        assert (answer.status, b"".join(answer.parts)) == (200, b"".join(pieces))


def test_a_body_that_says_that_it_is_too_long_is_refused_before_it_is_read():
    read = []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": b"0123456789", "more_body": True}

    answers = []

    async def send(message):
        answers.append(message)

    asyncio.run(BodyLimit(echo, 10)(scope_of(CHAT, {"Content-Length": "11"}), receive, send))
    assert answers[0]["status"] == 413 and not read
    assert (b"connection", b"close") in answers[0]["headers"]


def test_bytes_are_counted_whatever_the_header_says():
    for headers in ({}, {"Content-Length": "5"}, {"Content-Length": "no number"}):
        answer = sent([b"012345", b"6789!", b"x" * 100], headers)
        assert (answer.status, answer.code) == (413, "request_too_large")


def test_a_body_that_trickles_is_refused():
    answer = sent([b"0", b"1", b"2"], seconds=0.05, pause=0.04)
    assert (answer.status, answer.code) == (408, "request_timeout")


def test_a_client_that_goes_while_it_sends_is_not_answered():
    reached = []

    async def app(*args):
        reached.append(args)

    async def receive():
        return {"type": "http.disconnect"}

    asyncio.run(BodyLimit(app, 10)(scope_of(CHAT), receive, app))
    assert not reached


def test_the_app_still_learns_that_the_client_has_gone():
    async def app(scope, receive, send):
        assert (await receive())["body"] == b"body"
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 204, "headers": []})

    messages = [{"type": "http.request", "body": b"body"}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    started = []

    async def send(message):
        started.append(message["status"])

    asyncio.run(BodyLimit(app, 10)(scope_of(CHAT), receive, send))
    assert started == [204]


def test_so_many_wait_and_the_next_is_told_when_to_come_again():
    async def scene():
        release = asyncio.Event()

        async def slow(scope, receive, send):
            await release.wait()
            await echo(scope, receive, send)

        limit = QueueLimit(slow, frozenset({CHAT}), most=3)
        waiting = [asyncio.create_task(ask(limit, scope_of(CHAT))) for _ in range(3)]
        await asyncio.sleep(0)
        refused = await ask(limit, scope_of(CHAT))
        other = asyncio.create_task(ask(limit, scope_of("/v1/models")))
        release.set()
        answers = [*await asyncio.gather(*waiting), await other]
        return refused, [answer.status for answer in answers], (await ask(limit, scope_of(CHAT))).status, limit

    refused, statuses, later, limit = asyncio.run(scene())
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (429, "queue_full", "1")
    assert statuses == [200] * 4 and later == 200 and limit.inside == 0


def test_a_request_that_breaks_or_whose_client_goes_gives_its_place_back():
    async def broken(scope, receive, send):
        raise ValueError

    async def endless(scope, receive, send):
        await asyncio.Event().wait()

    async def scene():
        limits = [QueueLimit(app, frozenset({CHAT}), most=1) for app in (broken, endless)]
        tasks = [asyncio.create_task(ask(limit, scope_of(CHAT))) for limit in limits]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [limit.inside for limit in limits]

    assert asyncio.run(scene()) == [0, 0]


def test_when_to_come_again_follows_how_long_requests_take():
    limit = QueueLimit(echo, frozenset({CHAT}), most=0)
    limit.usual = 7.2
    assert asyncio.run(ask(limit, scope_of(CHAT))).headers["retry-after"] == "8"
