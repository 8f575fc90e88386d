"""Who may ask: keys read from a file, kept as hashes and compared in constant time, each with a role of its own.

A line of the file is a key, or `sha256:` and its hash in hex, and behind it what the key may do:

    sk-AbW3vK0sBq1cYw5n  name=alice
    sha256:9f86d081...   name=bob per-minute=60
    sk-q7GzR2mTt8HxLd4e  name=deploy role=admin
    sk-Zc1uNf6yPj3kVs9o  name=prometheus role=metrics
"""

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from starlette.types import ASGIApp, Receive, Scope, Send

from coterie.artifacts.reading import read_text
from coterie.errors import CoterieError
from coterie.serve.errors import ApiError, as_response, come_again

Role = Literal["user", "admin", "metrics"]
"""user: ask for answers; admin: also load and remove what is served; metrics: read /metrics and nothing else."""

SHORTEST = 16  # characters; what can be guessed is found from its hash too
HASHED = "sha256:"
MAX_FILE = 2**20  # bytes
FRESH_KEY = """python3 -c 'import secrets; print("sk-" + secrets.token_urlsafe(24))'"""
OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDER = "/playground/"
ADMIN_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/load_mixture", "/v1/unload_mixture")
METRICS_PATH = "/metrics"


@dataclass(frozen=True)
class Key:
    """A key of the file; the key itself is not kept.

    Attributes:
        name: tells in logs who asked.
        digest: the key's SHA-256.
        role: what it may do.
        per_minute: the most requests that it may make in a minute; None for any number.
    """

    name: str
    digest: bytes
    role: Role = "user"
    per_minute: int | None = None

    def may_ask(self, path: str) -> bool:
        """Tell whether the key's role is enough for a path."""
        if self.role == "admin" or path == METRICS_PATH:
            return True
        return self.role == "user" and path not in ADMIN_PATHS


class Keys:
    """All keys, and how many requests each has left."""

    def __init__(self, keys: tuple[Key, ...], clock: Callable[[], float] = time.monotonic) -> None:
        """Let every key begin with all of its requests."""
        self.keys = keys
        self._clock = clock
        self._left = {key: (float(key.per_minute or 0), clock()) for key in keys}

    def find(self, presented: str) -> Key | None:
        """Return the key that was presented; how long this takes tells nothing of it."""
        digest = hashlib.sha256(presented.encode()).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def wait(self, key: Key) -> float:
        """Count a request of a key; return the seconds until it may be made, and count nothing, where it is too early.

        Requests come back evenly: a key with 60 a minute has one more every second, and never more than 60.
        """
        if key.per_minute is None:
            return 0.0
        now, rate = self._clock(), key.per_minute / 60
        left, since = self._left[key]
        left = min(key.per_minute, left + (now - since) * rate)
        taken = left >= 1
        self._left[key] = (left - taken, now)
        return 0.0 if taken else (1 - left) / rate


def is_open(path: str) -> bool:
    """Tell whether everybody may ask this: probes, and the page, which asks everything else with a key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def read_keys(file: Path) -> Keys:
    """Read a file of keys, one a line; empty lines and those that begin with # count for nothing.

    Raises:
        CoterieError: naming the line, never the key in it, for one that is short or stands twice, or a word that says
            nothing.
    """
    lines = enumerate(read_text(file, MAX_FILE, "give a file with a key on every line").splitlines(), start=1)
    keys = tuple(
        _parse_key(line.split(), f"{file}, line {number}", number)
        for number, line in lines
        if line.strip() and not line.lstrip().startswith("#")
    )
    if not keys:
        raise CoterieError(f"{file} holds no key; write one a line, such as {FRESH_KEY} prints")
    for one in ("digest", "name"):
        values = [getattr(key, one) for key in keys]
        if twice := [key.name for key in keys if values.count(getattr(key, one)) > 1]:
            raise CoterieError(f"{file}: {', '.join(twice)} have the same {'key' if one == 'digest' else one}")
    return Keys(keys)


def _parse_key(words: list[str], place: str, number: int) -> Key:
    secret, *options = words
    if secret.startswith(HASHED):
        if not re.fullmatch("[0-9a-fA-F]{64}", secret.removeprefix(HASHED)):
            raise CoterieError(f"{place}: {HASHED} wants 64 hex digits behind it, as sha256sum prints them")
        digest = bytes.fromhex(secret.removeprefix(HASHED))
    elif len(secret) < SHORTEST:
        raise CoterieError(
            f"{place}: a key needs {SHORTEST} characters or more, got {len(secret)}; {FRESH_KEY} makes one"
        )
    else:
        digest = hashlib.sha256(secret.encode()).digest()
    said = {name: value for name, _, value in (word.partition("=") for word in options)}
    if unknown := sorted(said.keys() - {"name", "role", "per-minute"}) or len(said) < len(options):
        raise CoterieError(f"{place}: behind a key stand name=, role= and per-minute=, each once, got {unknown}")
    return Key(said.get("name") or f"line-{number}", digest, _role(said, place), _per_minute(said, place))


def _role(said: Mapping[str, str], place: str) -> Role:
    role = said.get("role", "user")
    if role not in get_args(Role):
        raise CoterieError(f"{place}: role={role} is none of {', '.join(get_args(Role))}")
    return role  # pyrefly: ignore[bad-return] - one of them


def _per_minute(said: Mapping[str, str], place: str) -> int | None:
    if (written := said.get("per-minute")) is None:
        return None
    if not (written.isascii() and written.isdigit() and 0 < int(written) < 10**6):
        raise CoterieError(f"{place}: per-minute={written} is no number of requests from 1 upwards")
    return int(written)


class KeyGate:
    """Lets requests through that have a key for what they ask; ASGI, so that answers pass as they are written."""

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        """Stand before an app; without keys everybody may ask for answers, and nobody may change what is served."""
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with the key's name in its state, or refuse it: 401, 403 or 429."""
        path = scope.get("path", "")
        if scope["type"] == "http" and not is_open(path):
            try:
                self._check(scope, path)
            except ApiError as error:
                return await as_response(error)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _check(self, scope: Scope, path: str) -> None:
        if self.keys is None:
            if path in ADMIN_PATHS:
                words = "this server has no admin key; start it with --api-key-file and a line with role=admin in it"
                raise ApiError(words, 403, code="admin_key_required")
            return
        key = self.keys.find(_bearer(scope))
        if key is None:
            words = "the request brings no key that is known here; send one as: Authorization: Bearer KEY"
            raise ApiError(words, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if not key.may_ask(path):
            words = f"the key {key.name!r} has the role {key.role}, which is not enough to ask this"
            raise ApiError(words, 403, code="insufficient_role")
        if wait := self.keys.wait(key):
            words = f"the key {key.name!r} may make {key.per_minute} requests a minute"
            raise ApiError(words, 429, code="rate_limit_exceeded", headers=come_again(wait))
        scope.setdefault("state", {})["key"] = key.name


def _bearer(scope: Scope) -> str:
    """Return the key that a request brings; an empty one where it brings none, or several."""
    brought = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, key = (brought[0] if len(brought) == 1 else b"").decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
