"""Clients that read slowly, or not at all, hold up nobody else, and nothing stays of them."""

import json
import socket
import time
from urllib.parse import urlsplit

from served import chat, chat_body


def test_a_client_that_reads_nothing_holds_up_nobody(server, client, mixture):
    """Its frames, some MB of log-probabilities, are more than the sockets between hold."""
    endless = {"logit_bias": {str(mixture.tokenizer.eos_token_id): -100}}
    body = chat_body(stream=True, max_tokens=150, n=8, temperature=1.0, logprobs=True, top_logprobs=20, **endless)
    raw = json.dumps(body).encode()
    address = urlsplit(server.url)
    engine = server.catalogue.desks[0].engine
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((address.hostname, address.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
        reader.sendall(head.encode() + raw)
        assert reader.recv(16).startswith(b"HTTP/1.1 200")
        assert chat(client, temperature=0)["usage"]["completion_tokens"] == 8
        assert client.get("/health").status_code == 200
    until = time.monotonic() + 60
    while not engine.is_idle and time.monotonic() < until:
        time.sleep(0.01)
    assert engine.is_idle and chat(client, temperature=0)["usage"]["completion_tokens"] == 8
