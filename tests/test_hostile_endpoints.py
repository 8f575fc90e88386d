"""Servers that want to hold us up, fill our memory or make us stumble: every one costs a line, and no more time."""

import gzip
import json
import socket
import threading
import time
import tracemalloc

import pytest

from coterie.data.examples import from_prompt
from coterie.errors import CoterieError
from coterie.experts import endpoints
from coterie.experts.answering import Question, Reply
from coterie.experts.endpoints import LARGEST_ANSWER, Endpoint, EndpointAnswerer, check_address
from coterie.settings.groups import ExpertServingSettings, SamplingSettings
from helpers import table
from stub_server import hostile

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ANSWER = json.dumps({"choices": [{"message": {"content": "four"}, "finish_reason": "stop"}]}).encode()
TIMEOUT = 0.4
SOON = 8  # seconds: less than any of the slow servers takes by itself, more than a busy machine


def ask(url: str, count: int = 1, **work: object) -> list[Reply]:
    settings = ExpertServingSettings(**{"retries": 0, "timeout": TIMEOUT, **work})
    answerer = EndpointAnswerer(Endpoint("big", url, "m"), settings, first_pause=0.01)
    found: dict[int, Reply] = {}
    question = Question("big", from_prompt("2+2?").messages, SamplingSettings())
    answerer.answer([question] * count, found.__setitem__)
    return [found[number] for number in range(count)]


def sent(content: bytes):
    return lambda connection: connection.sendall(content)


def dripping(start: bytes, content: bytes, pause: float = 0.05):
    def speak(connection: socket.socket) -> None:
        connection.sendall(start)
        for byte in content:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    return speak


def silent(start: bytes = b""):
    """Say that much, and nothing more until the client has gone."""

    def speak(connection: socket.socket) -> None:
        connection.sendall(start)
        while connection.recv(2**16):
            pass

    return speak


def endless(start: bytes, content: bytes):
    def speak(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(content)

    return speak


# ---------------------------------------------------------------------------------------------------- one deadline

SLOW = {
    "silence": silent(),
    "a status line that drips": dripping(b"", OK * 4),
    "headers that drip": dripping(b"HTTP/1.1 200 OK\r\n", b"X-Slow: yes\r\n" * 20),
    "a body that drips": dripping(OK + b"Content-Length: 200\r\n\r\n", b" " * 200),
    "chunks that drip": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 50),
    "a body that never ends": silent(OK + b"Content-Length: 99\r\n\r\n"),
    "go on, go on": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_connecting_headers_and_body_have_one_deadline(kind):
    with hostile(SLOW[kind]) as url:
        started = time.monotonic()
        (reply,) = ask(url)
    assert reply.error == f"{url} does not answer (no whole answer within {TIMEOUT} s)"
    assert TIMEOUT <= time.monotonic() - started < SOON


def test_an_error_that_drips_in_is_told_at_the_deadline():
    with hostile(dripping(b"HTTP/1.1 503 Busy\r\nContent-Length: 200\r\n\r\n", b" " * 200)) as url:
        started = time.monotonic()
        (reply,) = ask(url)
    assert reply.error == f"{url} answered 503 (Busy)"
    assert time.monotonic() - started < SOON


def test_a_server_that_takes_no_connection_has_the_same_deadline():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        address = listening.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        started = time.monotonic()
        (reply,) = ask(f"http://127.0.0.1:{address[1]}/v1")
        for one in waiting:
            one.close()
    assert "no whole answer within 0.4 s" in reply.error and time.monotonic() - started < SOON


def test_a_handshake_that_never_ends_has_the_same_deadline():
    with hostile(silent()) as url:
        started = time.monotonic()
        (reply,) = ask(url.replace("http:", "https:"))
    assert "no whole answer within 0.4 s" in reply.error and time.monotonic() - started < SOON


def test_a_look_up_of_a_name_that_hangs_has_the_same_deadline(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: released.wait(60) and [])
    started = time.monotonic()
    (reply,) = ask("http://somewhere.invalid/v1")
    took = time.monotonic() - started
    released.set()
    assert "no whole answer within 0.4 s" in reply.error and took < SOON


# -------------------------------------------------------------------------------------------------- one clear line

NESTED = b"[" * 50_000 + b"]" * 50_000
DEEP_ERROR = b'{"error": {"message": ' + b'{"message": ' * 300 + b'"x"' + b"}" * 300 + b"}}"


def plain(content: bytes, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    head = b"HTTP/1.1 " + status + b"\r\nContent-Length: " + str(len(content)).encode() + b"\r\n" + more
    return head + b"\r\n" + content


BOMB = gzip.compress(b" " * 50_000_000)


@pytest.mark.parametrize(
    ("content", "wanted"),
    table(
        ("nothing", b"", "does not answer ("),
        ("no http", b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer ("),
        ("half a body", OK + b"Content-Length: 90\r\n\r\n{", "does not answer (peer closed connection"),
        ("no chunk's length", OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n", "does not answer (illegal chunk"),
        ("negative length", OK + b"Content-Length: -5\r\n\r\n", "does not answer (bad Content-Length"),
        ("two lengths", OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", "does not answer (conflicting"),
        ("a header of 1 MB", OK + b"X: " + b"y" * 2**20, "does not answer ("),
        ("invalid utf-8", plain(b"\xff\xfe" * 9), "no chat completion (\ufffd"),
        ("nested lists", plain(NESTED), "no chat completion ([[[["),
        ("huge number", plain(b'{"choices": ' + b"9" * 5000 + b"}"), "no chat completion ("),
        (
            "terminal's codes",
            plain(b"\x1b[2J\x1b]0;owned\x07"),
            "(\\u001b[2J\\u001b]0;owned\\u0007)",
        ),
        ("nested error", plain(DEEP_ERROR, b"400 No"), "answered 400"),
        ("error nested deeper", plain(NESTED, b"400 No"), "answered 400 ([[[["),
        ("error that is no text", plain(b'{"error": {"message": [1, {"a": 2}]}}', b"400 No"), "answered 400"),
        ("error of a proxy", plain(b"<html><body>Bad gateway", b"502 Bad Gateway"), "answered 502 (Bad Gateway)"),
        ("terminal's codes in it", plain(b'{"error": "a\\u001b[31mb"}', b"400 No"), "answered 400 (a\\u001b[31mb)"),
        ("compressed", plain(BOMB, more=b"Content-Encoding: gzip\r\n"), "compressed, which was not asked for (gzip)"),
        ("compressed error", plain(BOMB, b"400 No", b"Content-Encoding: gzip\r\n"), "answered 400 ("),
        ("other protocol", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "does not answer ("),
        ("nothing said", b"HTTP/1.1 204 No Content\r\n\r\n", "no chat completion"),
    ),
)
def test_a_broken_answer_costs_one_line(content, wanted):
    with hostile(sent(content)) as url:
        (reply,) = ask(url, timeout=60.0)
    assert reply.error is not None and wanted in reply.error
    assert reply.error.isprintable() and len(reply.error) < 400


@pytest.mark.parametrize("count", [str(10**400), "-3", "2.5", "true", '"7"', "null", "[]", str(10**12)])
def test_a_count_that_is_none_is_estimated(count):
    body = b'{"choices": [{"message": {"content": "12345678"}}], "usage": {"completion_tokens": %s}}' % count.encode()
    with hostile(sent(plain(body))) as url:
        (reply,) = ask(url, timeout=60.0)
    assert (reply.text, reply.tokens, reply.prompt_tokens) == ("12345678", 2, 1)


@pytest.mark.parametrize("start", [OK + b"\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n"], ids=["plain", "chunked"])
def test_eight_endless_answers_are_cut_off_in_little_memory(start):
    piece = b"x" * 2**16
    piece = b"10000\r\n" + piece + b"\r\n" if b"chunked" in start else piece
    with hostile(endless(start, piece)) as url:
        tracemalloc.start()
        replies = ask(url, 8, timeout=60.0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert {reply.error for reply in replies} == {f"the answer has more than {LARGEST_ANSWER:,} bytes"}
    assert peak < 8 * 3 * LARGEST_ANSWER


def test_an_endless_error_is_told_by_its_status():
    with hostile(endless(b"HTTP/1.1 400 No\r\n\r\n", b"x" * 2**16)) as url:
        (reply,) = ask(url, timeout=60.0)
    assert "answered 400 (xxx" in reply.error and len(reply.error) < 300


def test_the_largest_answer_is_read(monkeypatch):
    monkeypatch.setattr(endpoints, "LARGEST_ANSWER", len(ANSWER))
    with hostile(sent(plain(ANSWER))) as url:
        assert ask(url, timeout=60.0)[0].text == "four"
    with hostile(sent(plain(ANSWER + b" "))) as url:
        assert "more than" in ask(url, timeout=60.0)[0].error


# --------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://",
        "http:///v1",
        "http://:80/v1",
        "http://h:99999/v1",
        "http://h:0/v1",
        "http://h:x/v1",
        "ftp://h/v1",
        "h/v1",
        "",
        "http://a..b/v1",
        "http://" + "a" * 70 + ".org/v1",
        "http://\udc80/v1",
        "http://a b/v1",
        "http://h/\x1b[2J",
        "http://ex\u00a0ample/v1",
        "http://999.1.1.1/v1",
        "http://h/v1#m",
        "http://" + "h" * 70_000,
    ],
)
def test_what_is_no_address_is_refused_in_one_line(url):
    with pytest.raises(CoterieError) as error:
        check_address("big", url)
    assert str(error.value).isprintable() and len(str(error.value)) < 300
    with pytest.raises(CoterieError, match=r"http://HOST/v1#MODEL"):
        EndpointAnswerer(Endpoint("big", url, "m"), ExpertServingSettings())


@pytest.mark.parametrize("url", ["http://u:p@h/v1", "http://u@h/v1", "http://h/v1?key=3"])
def test_an_address_with_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(CoterieError, match="put the key into the environment") as error:
        check_address("big", url)
    assert "key=3" not in str(error.value) and "u:p" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://müller.example/v1", "http://[::1]:80/v1", "https://例え.jp", "http://127.0.0.1"]
)
def test_addresses_beyond_ascii_and_of_numbers_are_taken(url):
    check_address("big", url)


def test_a_host_beyond_ascii_is_looked_up_in_its_idna_form(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    (reply,) = ask("http://müller.example/v1")
    assert {name if isinstance(name, str) else name.decode() for name in asked} == {"xn--mller-kva.example"}
    assert "does not answer" in reply.error
