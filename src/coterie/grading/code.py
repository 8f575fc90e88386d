"""Grading of generated Python code by unit tests, in the manner of MBPP (Austin et al. 2021, arXiv:2108.07732).

A text is right if the code found in it, then the set-up of the tests, then all tests run to the end. This runs code
that a model wrote: `sandbox` says what it is kept from and what not, and whoever calls this has to ask the user first.
"""

import ast
import itertools
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.errors import CoterieError
from coterie.grading.answers import Grade
from coterie.grading.sandbox import Limits, run_limited

# Tested functions are far shorter than these bounds; parsers are slow on long nonsense.
LONGEST_CODE = 20_000  # characters
MOST_PARSED = 60_000  # characters, all attempts at one candidate together
MOST_CUTS = 30
MOST_BLOCKS = 10
MOST_BEGINNINGS = 5

# -------------------------------------------------------------------------------------------------------------- tests


@dataclass(frozen=True)
class CodeTests:
    """Unit tests of one function.

    Attributes:
        entry_point: name of the function (or class) that the tests call.
        tests: statements that raise an error where the function is wrong.
        setup: statements to run before the tests and *after* the solution, which they may use.
    """

    entry_point: str
    tests: tuple[str, ...]
    setup: str = ""


def code_tests(value: object) -> CodeTests | None:
    """Read the field `tests` of a data row; None where the row has none.

    Args:
        value: None, or a mapping with `entry_point`, `test_list` and perhaps `test_setup_code`. Other keys, such as
            MBPP's `challenge_test_list`, are no part of the grade.

    Raises:
        CoterieError: a field is missing or has the wrong form; the message names it.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise CoterieError(f"the field 'tests' must be an object with entry_point and test_list; got {_shown(value)}")
    entry_point, tests, setup = (value.get(key) for key in ("entry_point", "test_list", "test_setup_code"))
    if not (isinstance(entry_point, str) and entry_point.isidentifier()):
        raise CoterieError(f"tests.entry_point must be the name of a function; got {_shown(entry_point)}")
    if not (isinstance(tests, list) and tests and all(isinstance(test, str) and test.strip() for test in tests)):
        raise CoterieError(f"tests.test_list must be a list of one or more assert statements; got {_shown(tests)}")
    if not isinstance(setup, str | None):
        raise CoterieError(f"tests.test_setup_code must be Python code or left out; got {_shown(setup)}")
    return CodeTests(entry_point, tuple(tests), setup or "")


def _shown(value: Any) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" ...")


# --------------------------------------------------------------------------------------------------- code in a text

_FENCE = re.compile(r"[ \t]*(`{3,}(?=[^`]*$)|~{3,})")
_BEGINNING = re.compile(r"^(?:async def|def|class|import|from|@)\b|^@", re.MULTILINE)


def find_code(text: str, entry_point: str) -> str | None:
    """Find the Python code in a generated text; None if there is none that parses.

    The last fenced block that defines the entry point is taken, a block that the text breaks off in included. Without
    one it is the text itself, from its beginning or from the first line that looks like code, as far as it parses. If
    the entry point is defined nowhere, whatever code there is comes back, which tests will find wrong.
    """
    text = text.replace("\r\n", "\n")
    fenced = [textwrap.dedent(block[:LONGEST_CODE]) for block in reversed(_fenced_blocks(text)[-MOST_BLOCKS:])]
    beginnings = itertools.islice(_BEGINNING.finditer(text), MOST_BEGINNINGS)
    candidates = [*fenced, text, *(text[match.start() :] for match in beginnings)]
    first = None
    for candidate in candidates:  # most likely first
        code, body = _longest_code(candidate[:LONGEST_CODE])
        if _defines(body, entry_point):
            return code
        first = first or code
    return first


def _fenced_blocks(text: str) -> list[str]:
    """Return what stands between fences of three or more backticks or tildes; the last may lack its end."""
    blocks: list[list[str]] = []
    mark = None
    for line in text.split("\n"):
        if mark is None:
            if opening := _FENCE.match(line):
                mark = opening[1]
                blocks.append([])
        elif line.strip(" \t") == mark:
            mark = None
        else:
            blocks[-1].append(line)
    return ["\n".join(lines) for lines in blocks]


def _longest_code(text: str) -> tuple[str | None, list[ast.stmt]]:
    """Return the longest run of lines from the first that parses, without the names and constants at its end.

    The line of the error is where to cut: no longer run can parse. A cut may uncover an error further up.

    Returns:
        The code, None where nothing parses, and its statements.
    """
    lines = text.split("\n")
    for _ in range(min(MOST_CUTS, MOST_PARSED // max(1, len(text)))):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the escapes and comparisons of a stranger
                body = ast.parse("\n".join(lines)).body
        except SyntaxError as error:
            if not error.lineno:
                break
            del lines[min(error.lineno, len(lines)) - 1 :]
            continue
        except (ValueError, RecursionError, MemoryError):  # the parser itself gives up
            break
        # Statements that only name things, such as `[DONE]` or a word of prose.
        while body and isinstance(body[-1], ast.Expr) and not any(isinstance(n, ast.Call) for n in ast.walk(body[-1])):
            body.pop()
        return ("\n".join(lines[: body[-1].end_lineno]) if body else None), body
    return None, []


def _defines(body: Sequence[ast.stmt], name: str) -> bool:
    """Tell whether statements define a name at the top level, by def, class or assignment."""
    defined: set[str] = set()
    for statement in body:
        match statement:
            case ast.FunctionDef(name=own) | ast.AsyncFunctionDef(name=own) | ast.ClassDef(name=own):
                defined.add(own)
            case ast.Assign(targets=targets):
                defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    return name in defined


# -------------------------------------------------------------------------------------------------------------- grade


def grade_code(text: str, tests: CodeTests, limits: Limits | None = None) -> Grade:
    """Run the code found in a generated text against unit tests, in limited processes.

    The code and the tests run in processes of their own (`sandbox`): the code sees the arguments of calls only.

    Returns:
        Whether all tests passed, and the code that was run (None: no code was found and nothing was run).

    Raises:
        CoterieError: this system cannot limit a process, or the process does not start.
    """
    code = find_code(text, tests.entry_point)
    if code is None:
        return Grade(False, None)
    checks = "\n".join([tests.setup, *tests.tests, ""])
    return Grade(run_limited(code, checks, tests.entry_point, limits).status == "passed", code)
