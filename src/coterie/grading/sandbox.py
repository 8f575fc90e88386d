"""Run a program of unknown intent for a moment in a child process, and tell how it ended.

What this protects from, on Linux: endless loops, memory hogs, floods of output, fork bombs and daemons (no process can
be started), filled disks and lost files (nothing is written, changed or removed, not even in the working folder), the
network (no socket can be opened), signals to other processes, and programs that leave before their tests have run. The
environment is empty, standard input is closed, and output is thrown away. `protection` tells how much of this the
machine's kernel can do; on macOS it is limits of time and file size, and a daemon may escape.

What it does not protect from: the program can read every file that the user can read, and what it read may stand in
`Outcome.detail`. It can hold as much memory and time as the limits say, in every worker. A program that searches its
own interpreter can find the secret that stands for success: this grades wrong code and does not hold an adversary. And
nothing here stops an attack on the kernel itself. To run code from a source you distrust, use a virtual
machine as well.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from coterie.errors import CoterieError
from coterie.grading import jail

Status = Literal["passed", "failed", "timeout", "out-of-memory", "killed"]

SECONDS_TO_START = 120.0
LONGEST_REPORT = 8192  # bytes; an honest one is far shorter


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    CPU time is the limit that counts, since it does not depend on what else the machine does; the wall clock catches
    programs that wait.

    Attributes:
        seconds: by the wall clock, once the interpreter is up.
        cpu_seconds: of all threads together.
        memory_bytes: address space, the interpreter's own 30 MB included; macOS cannot limit it.

    Raises:
        CoterieError: a limit is not above 0.
    """

    seconds: float = 30.0
    cpu_seconds: int = 5
    memory_bytes: int = 2**30

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise CoterieError(f"the limit {field.name} must be a number above 0; got {value}")


class Outcome(NamedTuple):
    """How a program ended, and one line about it ("" if it passed).

    `passed`: it ran to its end. `failed`: it raised an error, or left before its end. `timeout`: its time was over.
    `out-of-memory`: a MemoryError ended it. `killed`: a signal did, as after a segmentation fault.
    """

    status: Status
    detail: str


class Protection(NamedTuple):
    """What this machine can keep a tested program from: starting processes, the network, changing files."""

    processes: bool
    network: bool
    files: bool


def run_limited(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program in a limited child process of its own.

    The child is a fresh interpreter with the caller's installed packages. Hashes of strings are the same in every run,
    so that the order of a set, and with it the outcome, can be repeated. The program's `__name__` is not `__main__`:
    what a script does only under that name, such as asking for input, is not done.

    Args:
        program: source text; whatever it prints is thrown away.
        limits: what it may use; `Limits()` where None.

    Raises:
        CoterieError: the system is Windows, or the child does not start.
    """
    secret = secrets.token_hex(16)
    reply = _run(program, secret, limits or Limits())
    last = reply.lines[-1]
    if last == secret:
        return Outcome("passed", "")
    if reply.overran:
        return Outcome("timeout", "the time by the wall clock was over")
    if reply.code == -signal.SIGXCPU:
        return Outcome("timeout", "the CPU time was over")
    if reply.code < 0:
        name = str(-reply.code)
        with contextlib.suppress(ValueError):
            name = signal.Signals(-reply.code).name
        return Outcome("killed", f"ended by the signal {name}")
    if len(reply.lines) == 1:
        return Outcome("failed", f"the program left with status {reply.code} before its end")
    shown = "".join(letter if letter.isprintable() else " " for letter in last[: jail.LONGEST_DETAIL])
    return Outcome("out-of-memory" if last == "MemoryError" else "failed", shown)


@functools.cache
def protection() -> Protection:
    """Tell what this machine can keep a tested program from, by running an empty one.

    Raises:
        CoterieError: the system is Windows, or the child does not start.
    """
    standing = _run("", "", Limits()).lines[0].split()
    filtered = "seccomp" in standing
    return Protection(processes=filtered, network=filtered, files="landlock" in standing)


# -------------------------------------------------------------------------------------------------------- the child


class _Reply(NamedTuple):
    """What came from the child: the lines of its report, its exit code (negative: a signal), was its time over."""

    lines: list[str]
    code: int
    overran: bool


def _run(program: str, secret: str, limits: Limits) -> _Reply:
    if sys.platform == "win32":
        raise CoterieError("generated code is run on Linux and macOS only, where a process can be limited; use WSL")
    request = {"secret": secret, "cpu_seconds": limits.cpu_seconds, "memory_bytes": limits.memory_bytes}
    with tempfile.TemporaryDirectory(prefix="coterie-", ignore_cleanup_errors=True) as folder:
        Path(folder, jail.PROGRAM).write_bytes(program.encode(errors="surrogatepass"))
        # Not -I: it would ignore the seed of hashes. The environment is ours, so nothing else is there to ignore.
        command = [sys.executable, "-P", "-s", "-B", jail.__file__]
        reply = _converse(command, folder, json.dumps(request).encode(), limits.seconds)
    if not reply.lines[0].startswith("started"):
        raise CoterieError(
            f"the process for generated code does not start (status {reply.code}); try: {sys.executable} -c pass"
        )
    return reply


def _converse(command: list[str], folder: str, request: bytes, seconds: float) -> _Reply:
    """Start a process group, hand it a request, take its report, and leave nothing of the group alive."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env={"PYTHONHASHSEED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as child:
        try:
            assert child.stdin and child.stdout, "the child is started with pipes"
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(request)
            report, overran = _read(child.stdout.fileno(), seconds)
        finally:
            # Before the child is waited for: until then its number cannot pass to another group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
    return _Reply(report.decode(errors="replace").splitlines() or [""], child.returncode, overran)


def _read(descriptor: int, seconds: float) -> tuple[bytes, bool]:
    """Read a report until it ends or is too long to be one, and tell whether the time was over before that.

    The time runs from the report's first line, so that a busy machine's slow start is not taken from it.
    """
    report, deadline = b"", time.monotonic() + SECONDS_TO_START
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(report) < LONGEST_REPORT and selector.select(max(0, deadline - time.monotonic())):
            part = os.read(descriptor, LONGEST_REPORT)
            if not part:
                return report, False
            if not report:
                deadline = time.monotonic() + seconds
            report += part
    return report, len(report) < LONGEST_REPORT
