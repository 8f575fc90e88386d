"""Run code of unknown intent, and the tests of it, for a moment in two child processes, and tell how that ended.

The answer's code runs in one process, the tests in another; calls and results cross as plain data (`wire`). The answer
cannot find what is expected of it, since that is not in its process, and cannot compare in its own favour, since
comparing is done in the other. Both processes put limits on themselves first (`jail`).

What this protects from, on Linux: forged verdicts, endless loops, memory hogs, floods of output, fork bombs and
daemons, filled disks and lost files, the network, signals to other processes, and reading the user's files.
`protection` tells how much of this the machine's kernel can do; on macOS it is limits of time and file size, and a
daemon may escape.

What it does not protect from: an answer can hold as much memory and time as the limits say, in every worker. Where
tests ask the answer's own objects or its other functions for the truth, it is their word that counts. And nothing here
stops an attack on the kernel itself: to run code from a source you distrust, use a virtual machine as well.
"""

import contextlib
import functools
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import coterie
from coterie.errors import CoterieError
from coterie.grading.wire import LONGEST_ERROR

Status = Literal["passed", "failed", "timeout", "out-of-memory", "killed"]

SECONDS_TO_START = 120.0
SECONDS_TO_END = 1.0  # for a process that has closed its streams
LONGEST_REPORT = 8192  # bytes; an honest one is far shorter
_START = "import sys; sys.path.insert(0, sys.argv[1]); from coterie.grading.child import main; main()"


@dataclass(frozen=True)
class Limits:
    """What a program may use, and the tests of it likewise.

    CPU time is the limit that counts, since it does not depend on what else the machine does; the wall clock catches
    programs that wait.

    Attributes:
        seconds: by the wall clock, once both interpreters are up.
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
    """How a program and its tests ended, and one line about it ("" if they passed).

    `passed`: both ran to their end. `failed`: one raised an error, or left before its end. `timeout`: the time was
    over. `out-of-memory`: a MemoryError ended it. `killed`: a signal did, as after a segmentation fault.
    """

    status: Status
    detail: str


class Protection(NamedTuple):
    """What this machine can keep a tested program from: starting processes, the network, reading and changing files."""

    processes: bool
    network: bool
    files: bool


def run_limited(program: str, tests: str = "", entry_point: str = "", limits: Limits | None = None) -> Outcome:
    """Run a Python program in a limited process, and tests that call its function in another.

    Both are fresh interpreters with the caller's installed packages. Hashes of strings are the same in every run, so
    that the order of a set, and with it the outcome, can be repeated. The program's `__name__` is not `__main__`: what
    a script does only under that name, such as asking for input, is not done.

    Args:
        program: source text; whatever it prints is thrown away.
        tests: source text that raises an error where the program is wrong. Names that it uses and does not define are
            those of the standard library, or else of the program.
        entry_point: the tested function, which may have the name of one of Python's own.
        limits: what each may use; `Limits()` where None.

    Raises:
        CoterieError: the system is Windows, or a process does not start.
    """
    limits = limits or Limits()
    reply = _run(program, tests, entry_point, limits)
    if reply.overran:
        return Outcome("timeout", "the time by the wall clock was over")
    if reply.code == -signal.SIGXCPU:
        return Outcome("timeout", "the CPU time was over")
    if reply.code < 0:
        name = str(-reply.code)
        with contextlib.suppress(ValueError):
            name = signal.Signals(-reply.code).name
        return Outcome("killed", f"ended by the signal {name}")
    if not reply.verdict:
        return Outcome("failed", f"the program left with status {reply.code} before its end")
    status, detail = reply.verdict
    return Outcome(status, "".join(letter if letter.isprintable() else " " for letter in detail[:LONGEST_ERROR]))


@functools.cache
def protection() -> Protection:
    """Tell what this machine can keep a tested program from, by running an empty one.

    Raises:
        CoterieError: the system is Windows, or a process does not start.
    """
    standing = _run("", "", "", Limits()).standing
    filtered = "seccomp" in standing
    return Protection(processes=filtered, network=filtered or "namespaces" in standing, files="landlock" in standing)


# -------------------------------------------------------------------------------------------------------- the children


class _Reply(NamedTuple):
    """How both ended.

    Attributes:
        standing: names of the limits that stood in both processes.
        verdict: status and detail by the tests; None where a process left before its end.
        code: exit code of the process that did (negative: a signal), else 0.
        overran: whether the time was over.
    """

    standing: list[str]
    verdict: tuple[Status, str] | None
    code: int
    overran: bool


def _run(program: str, tests: str, entry_point: str, limits: Limits) -> _Reply:
    if sys.platform == "win32":
        raise CoterieError("generated code is run on Linux and macOS only, where a process can be limited; use WSL")
    shared = {"cpu_seconds": limits.cpu_seconds, "memory_bytes": limits.memory_bytes}
    with _child({"role": "answer", "program": program, **shared}) as answer:
        assert answer.stdin and answer.stdout, "children are started with pipes"
        wire = (answer.stdout.fileno(), answer.stdin.fileno())
        request = {"role": "tests", "program": tests, "entry_point": entry_point, **shared}
        with _child({**request, "reader": wire[0], "writer": wire[1]}, wire) as examiner:
            assert examiner.stdout, "children are started with pipes"
            # The examiner alone holds the wire now, so that each of the two sees the other end.
            _close(answer)
            report, overran = _read(examiner.stdout.fileno(), limits.seconds)
            started, _, rest = report.decode(errors="replace").partition("\n")
            verdict = json.loads(rest) if rest.endswith("\n") else None
            if not started.startswith("started"):
                code = _ended(answer) or _ended(examiner)
                raise CoterieError(
                    f"the process for generated code does not start (status {code}); try: {sys.executable} -c pass"
                )
            left = answer if verdict and verdict[0] == "ended" else None if verdict else examiner
            code = _ended(left) if left and not overran else 0
    known = None if verdict is None or verdict[0] == "ended" else (verdict[0], verdict[1])
    return _Reply(started.split()[1:], known, code, overran)


@contextlib.contextmanager
def _child(request: dict[str, Any], descriptors: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process group in an empty folder, hand it a request, and leave nothing of the group alive."""
    with tempfile.TemporaryDirectory(prefix="coterie-", ignore_cleanup_errors=True) as folder:
        # Not -I: it would ignore the seed of hashes. The environment is ours, so nothing else is there to ignore.
        command = [sys.executable, "-P", "-s", "-B", "-c", _START, str(Path(coterie.__file__).parents[1])]
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
        )
        try:
            assert child.stdin, "the child is started with pipes"
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
            yield child
        finally:
            _kill(child)
            _close(child)


def _close(child: subprocess.Popen[bytes]) -> None:
    for stream in (child.stdin, child.stdout):
        with contextlib.suppress(BrokenPipeError):  # of a request that nobody read
            if stream:
                stream.close()


def _kill(child: subprocess.Popen[bytes]) -> None:
    # Before the child is waited for: until then its number cannot pass to another group.
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _ended(child: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a process that is about to end; it is killed if it only closed its streams."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(SECONDS_TO_END)
    _kill(child)
    return child.returncode


def _read(descriptor: int, seconds: float) -> tuple[bytes, bool]:
    """Read the two lines of a report, or what there is of them, and tell whether the time was over before that.

    The time runs from the report's first line, so that a busy machine's slow start is not taken from it.
    """
    report, deadline = b"", time.monotonic() + SECONDS_TO_START
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(report) < LONGEST_REPORT and selector.select(max(0, deadline - time.monotonic())):
            part = os.read(descriptor, LONGEST_REPORT)
            if not report:
                deadline = time.monotonic() + seconds
            report += part
            if not part or report.count(b"\n") > 1:
                return report, False
    return report, len(report) < LONGEST_REPORT
