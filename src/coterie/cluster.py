"""Ray: a cluster that is joined or started, and tasks on it whose results are what one process gets.

Ray places processes on machines, starts tasks again whose worker died, and keeps strangers out by its own token. What
goes to a worker is the name of a function of this package and its arguments; all machines have the same paths.
"""

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from coterie.errors import CoterieError, first_line, missing_extra
from coterie.progress import part

logger = logging.getLogger(__name__)

Ray = Any
"""The module of that name, which only this extra brings."""

Cache = Callable[[str, Callable[[], Any]], Any]
"""Gives a value by its name, computing it where it is not known yet."""

ADDRESS, TOKEN_MODE, TOKEN = "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"  # variables that Ray itself reads
ALONE = "local"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
"""Nobody else is told that Ray is used, and no line of a log is left out because another one is like it."""
WAIT = 10.0  # seconds
RETRIES = 3
"""How often a task is started again whose worker died."""


@contextmanager
def joined() -> Iterator[Ray]:
    """Join the cluster that RAY_ADDRESS names, or start one of this machine alone; then leave.

    One that is started asks everybody for a token, made for it alone, which stands in no file. In a program that has
    joined a cluster by itself, that one is used and left to it.

    Raises:
        CoterieError: without the extra, or when the cluster cannot be reached or wants another token.
    """
    os.environ |= {name: value for name, value in QUIET.items() if name not in os.environ}
    try:
        import ray
    except ImportError as error:
        raise missing_extra("ray", "ray") from error
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get(ADDRESS, ALONE)
    if address == ALONE:
        os.environ.setdefault(TOKEN, secrets.token_hex(32))
    elif "://" not in address:
        _check_reachable(address)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # that a token is wanted is no trouble
    try:
        with _own_signals():
            ray.init(address, include_dashboard=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise _cannot_join(address, error) from error
    if os.environ.get(TOKEN_MODE, "").lower() != "token":
        logger.warning(
            "the Ray cluster asks for no token, so whoever reaches it runs code there; start it and this command with "
            "%s=token",
            TOKEN_MODE,
        )
    try:
        yield ray
    finally:
        ray.shutdown()


def _cannot_join(address: str, error: Exception) -> CoterieError:
    return CoterieError(
        f"the Ray cluster {address!r} cannot be joined: {first_line(error)}; mend {ADDRESS}, or leave it out"
    )


def _check_reachable(address: str) -> None:
    """Refuse an address where nobody listens, which Ray tries for two minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=WAIT).close()
    except (OSError, ValueError) as error:
        raise _cannot_join(address, error) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what a signal does here: Ray would let SIGTERM exit with another code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def share(nodes: Sequence[Mapping[str, float | int]], processes: int, device: str = "auto") -> dict[str, int]:
    """Say what each of several processes gets: a GPU, or as many cores as let all of them fit on the machines.

    Args:
        nodes: what every machine has, as Ray calls it: CPU and GPU.
        processes: that are to run at once.
        device: that they compute on; cpu takes no GPU where there are some.

    Raises:
        CoterieError: when there are more processes than cores or GPUs.
    """
    kind = "GPU" if device != "cpu" and any(node.get("GPU", 0) for node in nodes) else "CPU"
    counts = [int(node.get(kind, 0)) for node in nodes]
    if sum(counts) < processes:
        raise CoterieError(
            f"{processes} processes want a {kind} each, and the Ray cluster has {sum(counts)}; ask for fewer"
        )
    if kind == "GPU":
        return {"num_cpus": 1, "num_gpus": 1}
    sizes = range(max(counts), 0, -1)
    return {"num_cpus": next(size for size in sizes if sum(count // size for count in counts) >= processes)}


def machines(ray: Ray) -> list[dict[str, float]]:
    """Return what every machine of the cluster has, as `share` takes it."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def done_by_workers(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, workers: int, device: str = "auto"
) -> Iterator[tuple[int, Any]]:
    """Yield the place of every call and what a function returns for it, as workers finish, so many at once.

    A worker that dies costs a retry of what it was at.

    Args:
        function: a module's own, so that workers find it by its name.
        calls: its arguments, a tuple for each call.
        workers: calls that are under way at once, each in a process of its own.
        device: that they compute on.

    Raises:
        CoterieError: as the function, without the extra, or for a call whose worker dies again and again.
    """
    with joined() as ray:
        own = share(machines(ray), workers, device)
        task = ray.remote(max_retries=RETRIES, max_calls=0, **own)(function)
        waiting = list(enumerate(calls))[::-1]
        under_way: dict[Any, int] = {}
        try:
            while waiting or under_way:
                while waiting and len(under_way) < workers:
                    place, arguments = waiting.pop()
                    under_way[task.remote(*arguments)] = place
                ready = ray.wait(list(under_way))[0][0]
                place = under_way.pop(ready)  # first, for to cancel what has ended with an error may abort this process
                yield place, ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise CoterieError(
                f"a worker of {function.__name__} died {RETRIES + 1} times ({first_line(error)}); Ray's logs in "
                "/tmp/ray tell why, often too little memory: ask for fewer workers"
            ) from error
        finally:
            for reference in under_way:
                ray.cancel(reference, force=True)


def work_in(folder: str) -> None:
    """Make a folder the one that relative paths begin in, as it is where the command was typed (runs in a worker).

    Raises:
        CoterieError: when this machine does not have it.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise CoterieError(
            f"{socket.gethostname()} has no folder {folder}; all machines of a cluster need the same paths, as on a "
            "shared file system"
        ) from error


# ------------------------------------------------------------------------------------------------ named values


class Call(NamedTuple):
    """How a value is computed: by a module's own function, of what was opened for it and its arguments.

    Attributes:
        part: of the whole, as progress shows it.
        function: is called.
        arguments: behind what was opened.
    """

    part: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class Elsewhere(NamedTuple):
    """How workers open what functions of calls get first; the last thing that one has opened stays open in it.

    Attributes:
        workers: that work at once.
        device: that they compute on.
        open: a module's own function.
        arguments: what it opens, told by plain values.
    """

    workers: int
    device: str
    open: Callable[..., Any]
    arguments: tuple[Any, ...]


def named_values(
    calls: Mapping[str, Call], here: Any, cached: Cache, elsewhere: Elsewhere | None = None
) -> dict[str, Any]:
    """Compute values that are not known yet, one after another in this process, or at once by workers.

    Args:
        calls: by the name under which the value is kept.
        here: what functions get first in this process.
        cached: gives a value by its name, computing and keeping it where it is not known.
        elsewhere: says how workers open the same.

    Raises:
        CoterieError: as the functions, and `done_by_workers`.
    """
    values: dict[str, Any] = {}
    if elsewhere is not None:
        missing = [name for name in calls if not _is_known(name, cached)]
        asked = [(calls[name].function, calls[name].arguments) for name in missing]
        for place, found in done_elsewhere(asked, elsewhere):
            name = missing[place]
            with part(calls[name].part):
                values[name] = cached(name, lambda found=found: found)
    for name, call in calls.items():
        if name not in values:
            with part(call.part):
                values[name] = cached(name, lambda call=call: call.function(here, *call.arguments))
    return values


def done_elsewhere(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], elsewhere: Elsewhere
) -> Iterator[tuple[int, Any]]:
    """Yield the place of every call, a function and its arguments, and what it returns, as `done_by_workers`."""
    asked = [(os.getcwd(), elsewhere.open, elsewhere.arguments, *call) for call in calls]
    return done_by_workers(opened_call, asked, workers=elsewhere.workers, device=elsewhere.device)


class _Unknown(Exception):
    """A value is not known."""


def _is_known(name: str, cached: Cache) -> bool:
    def unknown() -> None:
        raise _Unknown

    try:
        cached(name, unknown)
    except _Unknown:
        return False
    return True


_OPEN: list[tuple[Any, Any]] = []  # what a worker has opened last, and what that is


def opened_call(
    folder: str, open: Callable[..., Any], what: tuple[Any, ...], function: Callable[..., Any], arguments: tuple
) -> Any:
    """Call a function of what is open in this worker, or is opened now (runs in a worker)."""
    work_in(folder)
    if not _OPEN or _OPEN[0][0] != (open, what):
        _OPEN.clear()  # before anything else takes memory
        _OPEN.append(((open, what), open(*what)))
    return function(_OPEN[0][1], *arguments)
