"""A small OpenAI-compatible server in a thread, which does what a test tells it to."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Sent(NamedTuple):
    """What the server sends back: status, body (an object, or raw bytes) and further headers.

    It begins after `delay` seconds; with `drip`, the body comes byte by byte, so many seconds apart.
    """

    status: int = 200
    body: object = None
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0
    drip: float = 0.0


class Got(NamedTuple):
    """A request that came in."""

    path: str
    key: str | None
    body: dict[str, Any]
    moment: float

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"]


def completion(text: str, reason: str = "stop") -> Sent:
    """The usual answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return Sent(200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


class Stub:
    """The server's address, the requests it got, and the most that were under way at one time."""

    def __init__(self, respond: Callable[[Got], Sent]) -> None:
        self.respond = respond
        self.requests: list[Got] = []
        self.most_at_once = 0
        self._open = 0
        self._lock = threading.Lock()
        self.url = ""

    def handle(self, got: Got) -> Sent:
        with self._lock:
            self.requests.append(got)
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            sent = self.respond(got)
            time.sleep(sent.delay)
            return sent
        finally:
            with self._lock:
                self._open -= 1


@contextmanager
def serving(respond: Callable[[Got], Sent]) -> Iterator[Stub]:
    """Run a server until the `with` ends."""
    stub = Stub(respond)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got = Got(self.path, self.headers.get("Authorization"), body, time.monotonic())
            sent = stub.handle(got)
            content = sent.body if isinstance(sent.body, bytes) else json.dumps(sent.body).encode()
            try:
                self.send_response(sent.status)
                for name, value in sent.headers:
                    self.send_header(name, value)
                self.end_headers()
                for part in [content] if not sent.drip else [content[n : n + 1] for n in range(len(content))]:
                    self.wfile.write(part)
                    time.sleep(sent.drip)
            except (BrokenPipeError, ConnectionResetError):  # the client waits no longer
                pass

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # the usual 5 would reset connections of busy clients

    server = Server(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hostile(speak: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server on bare sockets, which answers every request by what `speak` does, and closes; give its address."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # the client waits no longer
            connection.settimeout(20)
            connection.recv(2**16)
            speak(connection)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(2**16):  # closing with something unread would reset what was said
                pass

    def accept() -> None:
        with suppress(OSError):  # closed below
            while True:
                threading.Thread(target=serve, args=listening.accept()[:1], daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        listening.shutdown(socket.SHUT_RDWR)  # closing alone would wake nobody who waits for a connection
        thread.join()
        listening.close()
