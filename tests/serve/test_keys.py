"""Keys: read from a file, hashed, found in constant time, each with a role and a rate of its own."""

import asyncio
import hashlib
import hmac

import pytest

from asgi import ask, echo, scope_of
from coterie.errors import CoterieError
from coterie.serve.keys import ADMIN_PATHS, Key, KeyGate, Keys, read_keys

ALICE, BOB, CAROL, SCRAPER = "alice-000000000001", "bob-00000000000002", "carol-000000000003", "scraper-0000000004"
CHAT = "/v1/chat/completions"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text(
        f"# who may ask\n\n{ALICE}\nsha256:{digest(BOB)} name=bob per-minute=2\n"
        f"{CAROL} role=admin name=carol\n{SCRAPER}  role=metrics  name=prometheus\n"
    )
    return file


def asked(keys, path, key=None, **headers):
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return asyncio.run(ask(KeyGate(echo, keys), scope_of(path, headers)))


def test_a_file_of_keys_is_read_line_by_line(file):
    keys = read_keys(file)
    assert [(key.name, key.role, key.per_minute) for key in keys.keys] == [
        ("line-3", "user", None),
        ("bob", "user", 2),
        ("carol", "admin", None),
        ("prometheus", "metrics", None),
    ]
    assert [keys.find(key) for key in (ALICE, BOB, CAROL, SCRAPER)] == list(keys.keys)
    assert keys.find("alice-000000000002") is keys.find("") is keys.find(digest(BOB)) is None


def test_no_key_is_kept_only_its_hash(file):
    keys = read_keys(file)
    assert ALICE not in repr(vars(keys)) and keys.keys[0].digest.hex() == digest(ALICE)


def test_every_key_is_compared_in_constant_time_whichever_it_is(file, monkeypatch):
    keys, compared, real = read_keys(file), [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for presented in (ALICE, SCRAPER, "nobody"):
        compared.clear()
        keys.find(presented)
        assert compared == [key.digest for key in keys.keys]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# nothing\n", "holds no key"),
        ("short\n", "line 1: a key needs 16 characters or more, got 5"),
        ("sha256:abc\n", "line 1: sha256: wants 64 hex digits"),
        (f"{ALICE} rate=5\n", "line 1: behind a key stand name=, role= and per-minute=, each once, got ['rate']"),
        (f"{ALICE} name=a name=b\n", "each once"),
        (f"{ALICE} role=root\n", "role=root is none of user, admin, metrics"),
        (f"{ALICE} per-minute=0\n", "per-minute=0 is no number of requests from 1 upwards"),
        (f"{ALICE}\nsha256:{digest(ALICE)}\n", "line-1, line-2 have the same key"),
        (f"{ALICE} name=a\n{BOB} name=a\n", "a, a have the same name"),
    ],
)
def test_what_is_wrong_with_a_file_of_keys_is_said_without_a_key(tmp_path, text, said):
    (tmp_path / "keys.txt").write_text(text)
    with pytest.raises(CoterieError) as error:
        read_keys(tmp_path / "keys.txt")
    assert said in str(error.value) and ALICE not in str(error.value)


def test_who_has_no_key_gets_401_wherever_a_key_is_wanted(file):
    keys = read_keys(file)
    for path in (CHAT, "/v1/models", "/metrics", "/openapi.json", "/v1/nothing", *ADMIN_PATHS):
        answer = asked(keys, path)
        assert (answer.status, answer.code) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/ready", "/playground/page.js"):
        assert asked(keys, path).status == 200
    assert asked(keys, CHAT, "wrong-0000000000000").status == 401
    assert asked(keys, CHAT, Authorization=f"Basic {ALICE}").status == 401
    assert asked(keys, CHAT, Authorization=ALICE).status == 401
    assert asked(keys, CHAT, Authorization=f"bearer  {ALICE}").status == 200
    doubled = scope_of(CHAT, {"Authorization": f"Bearer {ALICE}"})
    doubled["headers"].append((b"authorization", b"Bearer x"))
    assert asyncio.run(ask(KeyGate(echo, keys), doubled)).status == 401


@pytest.mark.parametrize(
    ("key", "allowed"),
    [(ALICE, {CHAT, "/metrics"}), (CAROL, {CHAT, "/metrics", *ADMIN_PATHS}), (SCRAPER, {"/metrics"})],
)
def test_a_key_may_ask_what_its_role_allows_and_nothing_else(file, key, allowed):
    keys = read_keys(file)
    for path in (CHAT, "/metrics", *ADMIN_PATHS):
        answer = asked(keys, path, key)
        assert answer.status == (200 if path in allowed else 403)
        assert path in allowed or answer.code == "insufficient_role"


def test_without_keys_everybody_may_ask_and_nobody_may_change_what_is_served():
    assert asked(None, CHAT).status == 200
    assert [asked(None, path).code for path in ADMIN_PATHS] == ["admin_key_required"] * 4


def test_a_rate_is_kept_to_and_comes_back_evenly_for_each_key_alone():
    now = [0.0]
    keys = Keys((Key("bob", b"b" * 32, per_minute=2), Key("eve", b"e" * 32, per_minute=2)), lambda: now[0])
    bob, eve = keys.keys
    assert [keys.wait(bob) for _ in range(3)] == [0, 0, 30]
    assert keys.wait(eve) == 0
    now[0] = 29.0
    assert keys.wait(bob) == pytest.approx(1)
    now[0] = 30.0
    assert [keys.wait(bob), keys.wait(bob)] == [0, pytest.approx(30)]
    now[0] = 3600.0
    assert [keys.wait(bob) for _ in range(3)] == [0, 0, 30]


def test_one_too_many_is_told_when_to_come_again(file):
    keys = read_keys(file)
    answers = [asked(keys, CHAT, BOB) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[2].code == "rate_limit_exceeded" and answers[2].headers["retry-after"] == "30"
    assert asked(keys, CHAT, ALICE).status == 200


def test_the_app_learns_who_asks_and_not_by_which_key(file):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["state"])
        await echo(scope, receive, send)

    asyncio.run(ask(KeyGate(app, read_keys(file)), scope_of(CHAT, {"Authorization": f"Bearer {BOB}"})))
    assert seen == [{"key": "bob"}]
