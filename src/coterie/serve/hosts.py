"""Under which names the server may be asked, so that no page of a stranger takes this machine for its own.

By DNS rebinding a page lets its own name lead to an address in its visitor's network: to the browser the server there
has the page's origin then, and may be read. The `Host` that the browser sends still is the page's name.
"""

import ipaddress
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

from starlette.types import ASGIApp, Receive, Scope, Send

from coterie.errors import CoterieError, shortened
from coterie.serve.errors import ApiError, as_response


class HostGate:
    """Lets requests through that were sent to a name of this server: 421 for any other."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str] | None) -> None:
        """Stand before an app.

        Args:
            app: answers.
            allowed: names, `*` in them standing for anything; None for those that nobody can let lead here by DNS:
                addresses, and names without a dot.

        Raises:
            CoterieError: for what is no name.
        """
        for name in allowed or ():
            if not name.strip("[]") or "/" in name or hostname(name) != name.strip("[]"):
                raise CoterieError(f"--allowed-hosts {name!r} is no name; give it without scheme and port")
        self.app = app
        self.allowed = None if allowed is None else [name.strip("[]").lower() for name in allowed]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or all(self.lets_in(hostname(one)) for one in hosts_of(scope)):
            return await self.app(scope, receive, send)
        name = shortened(", ".join(hosts_of(scope)), 80)
        words = f"this server is not asked as {name!r}; start it with --allowed-hosts and that name if it is its own"
        return await as_response(ApiError(words, 421, code="unknown_host"))(scope, receive, send)

    def lets_in(self, name: str) -> bool:
        """Tell whether clients may ask under a name."""
        name = name.lower().removesuffix(".")
        if self.allowed is not None:
            return any(fnmatchcase(name, pattern) for pattern in self.allowed)
        return "." not in name or name.endswith(".localhost") or is_address(name)


def hosts_of(scope: Scope) -> list[str]:
    """Return the headers `Host` of a request; browsers send one."""
    return [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]


def hostname(host: str) -> str:
    """Return a host without its port, an address of version 6 without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def is_address(name: str) -> bool:
    """Tell whether a name is an address, as it is written."""
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return False
