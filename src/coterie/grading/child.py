"""The two child processes of `sandbox`: one runs an answer's code and serves calls, the other runs the tests of it.

The tests and what they expect are in the second process alone. The answer sees the arguments of calls and nothing else.
"""

import ast
import builtins
import contextlib
import importlib
import json
import linecache
import os
import sys
import traceback
from io import BufferedIOBase
from types import ModuleType
from typing import Any, NoReturn

from coterie.grading.jail import confine
from coterie.grading.wire import LONGEST_ERROR, RemoteError, Wire, WireError

Request = dict[str, Any]


def main() -> NoReturn:
    """Read a request from standard input, and be what it asks for."""
    stdin = os.fdopen(os.dup(0), "rb")
    request = json.loads(stdin.readline())
    out, null = os.fdopen(os.dup(1), "wb"), os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # the three standard streams
        os.dup2(null, stream)
    os.close(null)
    os.environ.clear()
    sys.argv[:] = ["program.py"]
    if request["role"] == "answer":
        answer(request, stdin, out)
    else:
        examine(request, out)
    os._exit(0)


def answer(request: Request, stdin: BufferedIOBase, out: BufferedIOBase) -> None:
    """Run an answer's code, then do whatever the tests ask of it."""
    standing = confine(request["cpu_seconds"], request["memory_bytes"])
    wire = Wire(stdin, out, lambda *asked: True)  # there is nothing in this process to hide from the tests
    wire.send({"standing": standing})
    wire.send(wire.outcome(lambda: {"value": wire.write(run("program", request["program"]))}))
    with contextlib.suppress(WireError):  # the tests are done
        while True:
            wire.serve(wire.receive())


def examine(request: Request, out: BufferedIOBase) -> None:
    """Run tests against the answer in the other process, and report on them.

    The report is a line `started ...` that names the limits which stand in both processes, and one line of JSON: the
    verdict `passed`, `failed`, `out-of-memory` or `ended` (the answer's process did), and a detail.
    """
    wire = Wire(os.fdopen(request["reader"], "rb"), os.fdopen(request["writer"], "wb"), _is_open)
    answers_standing = wire.receive().get("standing", [])
    standing = confine(request["cpu_seconds"], request["memory_bytes"])
    out.write(" ".join(["started", *(name for name in standing if name in answers_standing)]).encode() + b"\n")
    out.flush()
    verdict, detail = "passed", ""
    try:
        solution = wire.result()[0]
        run("tests", request["program"], names_for(request["program"], request["entry_point"], solution))
    except MemoryError:
        verdict, detail = "out-of-memory", "MemoryError"  # there may be no room to build a text
    except BaseException as error:
        verdict, detail = "failed", described(error)
    if wire.broken:  # whatever the tests made of that
        verdict = "ended"
    out.write(json.dumps([verdict, detail]).encode() + b"\n")
    out.flush()


def _is_open(operation: str, target: Any, *values: Any) -> bool:
    """Tell whether an answer may do something with an object that the tests gave it.

    Attributes are open on instances of the tests' own classes, and only their public ones: those of a function or a
    generator lead to the tests.
    """
    if operation not in ("get", "set"):
        return True
    return type(target).__module__ == "tests" and isinstance(values[0], str) and not values[0].startswith("_")


def run(name: str, program: str, names: dict[str, Any] | None = None) -> ModuleType:
    """Run a program as a module of a name; what a script does only as `__main__` is not done."""
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = f"{name}.py"
    linecache.cache[module.__file__] = (len(program), None, program.splitlines(keepends=True), module.__file__)
    module.__dict__.update(names or {})
    try:
        exec(compile(program, module.__file__, "exec"), module.__dict__)  # noqa: S102 - in a process limited for it
    except Exception as error:
        if not str(error):  # as of `assert x == 2`
            error.args = (_line_of(error, module.__file__),)
        raise
    return module


def names_for(tests: str, entry_point: str, solution: Any) -> dict[str, Any]:
    """Return what the tests use but do not define: of the solution, or of the standard library.

    Python's own names are never the solution's, or it could say by `def set` what is equal. The tested function may
    have such a name.
    """
    names: dict[str, Any] = {}
    for name in sorted({node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)} | {entry_point}):
        if name != entry_point and (hasattr(builtins, name) or name.startswith("__")):
            continue
        if name != entry_point and name in sys.stdlib_module_names:
            names[name] = importlib.import_module(name)
        else:
            with contextlib.suppress(AttributeError):  # then using it says so
                names[name] = getattr(solution, name)
    return names


def described(error: BaseException) -> str:
    """Return one line: the kind of error, and its message or else the line of the program that raised it."""
    with contextlib.suppress(Exception):  # whatever the error's own methods do
        told = isinstance(error, RemoteError | WireError)
        text = str(error) if told else f"{type(error).__name__}: {str(error) or _line_of(error, 'tests.py')}"
        return " ".join(text.split())[:LONGEST_ERROR]
    return "an error that cannot be shown"


def _line_of(error: BaseException, file: str) -> str:
    lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return (lines or [""])[-1]
