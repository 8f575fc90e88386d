"""The whole application, from outside: who is let in, and what is refused before any model is asked."""

import asyncio

import pytest

from asgi import ask, scope_of
from coterie.errors import CoterieError
from coterie.serve.app import create_app
from coterie.serve.catalogue import Catalogue
from coterie.serve.worker import Worker
from coterie.settings.reading import from_flat
from coterie.settings.serving import ServeSettings

CHAT, PAGE, KEY = "/v1/chat/completions", "https://chat.example.org", "alice-000000000001"


def answered(scope, body=b"", **options):
    settings = from_flat(ServeSettings, {"mixtures": ["none"], **options})
    with Worker() as worker:
        return asyncio.run(ask(create_app(Catalogue(settings), worker, settings), scope, [body]))


def test_pages_of_other_origins_may_ask_only_where_they_are_named():
    headers = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    for options, allowed in (({}, None), ({"cors_origin": [PAGE]}, PAGE), ({"cors_origin": ["https://other"]}, None)):
        for method in ("OPTIONS", "GET"):
            answer = answered(scope_of("/health", headers, method), **options)
            assert answer.headers.get("access-control-allow-origin") == allowed


def test_every_refusal_has_an_id_and_openai_s_shape(tmp_path):
    (tmp_path / "keys").write_text(f"{KEY} per-minute=1\n")
    keys, bearer = {"api_key_file": str(tmp_path / "keys")}, {"Authorization": f"Bearer {KEY}"}
    for answer, status, code in (
        (answered(scope_of(CHAT), **keys), 401, "invalid_api_key"),
        (answered(scope_of("/v1/load_mixture", bearer), **keys), 403, "insufficient_role"),
        (answered(scope_of(CHAT), b"x" * 2000, max_body=0.001), 413, "request_too_large"),
        (answered(scope_of("/v1/load_mixture")), 403, "admin_key_required"),
    ):
        assert (answer.status, answer.code) == (status, code) and len(answer.headers["x-request-id"]) == 32


def test_a_file_of_keys_that_is_none_is_told_before_anything_is_loaded(tmp_path):
    for text in ("", "short\n"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(CoterieError, match="key"):
            answered(scope_of(CHAT), api_key_file=str(tmp_path / "keys"))
    with pytest.raises(CoterieError, match="does not exist"):
        answered(scope_of(CHAT), api_key_file=str(tmp_path / "none"))
