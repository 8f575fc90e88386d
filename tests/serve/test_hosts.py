"""Under which names a server may be asked."""

import asyncio

import pytest
from test_guard import CHAT, KEY, answered

from asgi import ask, echo, scope_of
from coterie.errors import CoterieError
from coterie.serve.hosts import HostGate

NOBODY_ELSES = [
    "localhost:8000", "LOCALHOST.", "127.0.0.1:8000", "192.168.0.7", "[::1]:8000", "[fe80::1]", "coterie:8000",
    "app.localhost:3000",
]  # fmt: skip
STRANGERS = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80", "1.2.3.4.5"]


def status(gate, *hosts):
    scope = scope_of("/")
    scope["headers"] = [(b"host", host.encode()) for host in hosts]
    return asyncio.run(ask(gate, scope)).status


@pytest.mark.parametrize("host", NOBODY_ELSES)
def test_a_name_that_no_stranger_can_let_lead_here_is_let_in(host):
    assert status(HostGate(echo, None), host) == 200


@pytest.mark.parametrize("host", STRANGERS)
def test_a_name_that_a_stranger_can_let_lead_here_is_refused(host):
    assert status(HostGate(echo, None), host) == 421
    assert status(HostGate(echo, None), "localhost", host) == 421


def test_names_that_are_given_are_let_in_and_no_others():
    gate = HostGate(echo, ["llm.example.org", "*.example.net", "[::1]"])
    for host in ("llm.example.org:443", "LLM.example.org.", "a.example.net", "a.b.example.net:1", "[::1]:8000"):
        assert status(gate, host) == 200
    for host in ("example.net", "example.org", "llm.example.org.evil.example", "localhost", "127.0.0.1"):
        assert status(gate, host) == 421
    assert {status(HostGate(echo, ["*"]), host) for host in [*NOBODY_ELSES, *STRANGERS]} == {200}


@pytest.mark.parametrize("name", ["http://llm.example.org", "llm.example.org:8000", "", "[]", "llm.example.org/v1"])
def test_what_is_no_name_is_refused_at_the_start(name):
    with pytest.raises(CoterieError, match="without scheme and port"):
        HostGate(echo, [name])


def test_a_page_that_has_let_its_name_lead_here_reaches_nothing(tmp_path):
    evil = {"Host": "evil.example:8000"}
    for path in ("/", CHAT, "/v1/models", "/health", "/metrics"):
        assert answered(scope_of(path, evil, "GET")).code == "unknown_host"
    (tmp_path / "keys").write_text(f"{KEY}\n")
    keys = {"api_key_file": str(tmp_path / "keys")}
    assert answered(scope_of("/health", evil, "GET"), **keys).status == 200  # it has no key, and cannot ask on
    assert answered(scope_of("/health", evil, "GET"), allowed_hosts=["evil.example"]).status == 200
    assert answered(scope_of("/health", evil, "GET"), **keys, allowed_hosts=["mine"]).code == "unknown_host"
