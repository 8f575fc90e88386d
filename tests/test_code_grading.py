"""Grading of generated code: what is read from a row, what is found in a text, and what passes."""

import ast
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import CoterieError
from coterie.grading.answers import Grade
from coterie.grading.code import CodeTests, code_tests, find_code, grade_code
from coterie.grading.sandbox import Limits
from helpers import table

DOUBLE = "def double(n):\n    return 2 * n"
IDENTITY = "def double(n):\n    return n"
TESTS = CodeTests("double", ("assert double(4) == 8", "assert double(-1) == -2"))

ROWS = [
    (
        "def shared(left, right):\n    return set(left) & set(right)",
        {"entry_point": "shared", "test_list": ["assert shared((1, 2), (2, 3)) == {2}"], "test_setup_code": ""},
    ),
    (
        "import math\n\ndef circle(radius):\n    return math.pi * radius**2",
        {"entry_point": "circle", "test_list": ["import math", "assert math.isclose(circle(1), math.pi)"]},
    ),
    (  # the set-up makes a tree of the solution's own class
        "class Tree:\n    def __init__(self, value):\n        self.value, self.left = value, None\n\n"
        "def depth(tree):\n    return 1 + depth(tree.left) if tree else 0",
        {
            "entry_point": "depth",
            "test_list": ["assert depth(root) == 2"],
            "test_setup_code": "root = Tree(1)\r\nroot.left = Tree(2)",
            "challenge_test_list": ["assert depth(None) == 1"],
        },
    ),
]


# --------------------------------------------------------------------------------------------------------- the rows


def test_a_row_is_read_and_its_challenge_tests_are_left_out():
    setup = "root = Tree(1)\r\nroot.left = Tree(2)"
    assert code_tests(ROWS[2][1]) == CodeTests("depth", ("assert depth(root) == 2",), setup)


def test_a_row_without_tests_has_none():
    assert code_tests(None) is None


@pytest.mark.parametrize("setup", [{}, {"test_setup_code": None}, {"test_setup_code": ""}])
def test_set_up_code_may_be_missing_or_empty(setup):
    assert code_tests({"entry_point": "f", "test_list": ["assert f()"], **setup}) == CodeTests("f", ("assert f()",))


@pytest.mark.parametrize(
    ("change", "field"),
    table(
        ("no entry point", {"entry_point": None}, "entry_point"),
        ("entry point that is code", {"entry_point": "f()"}, "entry_point"),
        ("no tests", {"test_list": None}, "test_list"),
        ("empty list", {"test_list": []}, "test_list"),
        ("one string", {"test_list": "assert f()"}, "test_list"),
        ("number among tests", {"test_list": ["assert f()", 3]}, "test_list"),
        ("empty test", {"test_list": [" "]}, "test_list"),
        ("set-up that is a list", {"test_setup_code": ["x = 1"]}, "test_setup_code"),
    ),
)
def test_a_bad_field_is_named_in_one_line(change, field):
    with pytest.raises(CoterieError, match=rf"^tests\.{field} must be .*got .*$") as caught:
        code_tests({"entry_point": "f", "test_list": ["assert f()"], **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["assert f()", ["assert f()"], 3])
def test_tests_that_are_no_object_are_refused_and_shown_shortened(value):
    with pytest.raises(CoterieError, match="the field 'tests' must be an object"):
        code_tests(value)
    with pytest.raises(CoterieError) as caught:
        code_tests([value] * 1000)
    assert len(str(caught.value)) < 200


# ----------------------------------------------------------------------------------------------------- code in texts


def fenced(code, mark="```", language="python"):
    return f"{mark}{language}\n{code}\n{mark}"


@pytest.mark.parametrize(
    "text",
    table(
        ("bare", DOUBLE),
        ("bare, then prose", f"{DOUBLE}\n\nThis doubles the number, as asked."),
        ("bare, then many lines of prose", DOUBLE + "\n\nAs you can see, it's right." * 200),
        ("bare, then one word", f"{DOUBLE}\n\nDone"),
        ("bare, then the mark of an end", f"{DOUBLE}\n[DONE]\n"),
        ("bare, then a fence", f"{DOUBLE}\n```\nIt's done."),
        ("bare, broken off in another function", f"{DOUBLE}\n\ndef triple(n):\n    return (3 *"),
        ("bare, broken off in a string", f'{DOUBLE}\n\ndef triple(n):\n    """Return'),
        ("prose before", f"Here's the function:\n\n{DOUBLE}"),
        ("prose before that looks like code", f"from the task, it's clear\nimport nothing else:\n{DOUBLE}"),
        ("fenced", f"Sure, it's here:\n\n{fenced(DOUBLE)}\n\nIt doubles."),
        ("fenced without a language", fenced(DOUBLE, language="")),
        ("fenced by tildes", fenced(DOUBLE, mark="~~~")),
        ("fenced by four", f"````py\n{DOUBLE}\n````"),
        ("fenced with line ends of Windows", fenced(DOUBLE).replace("\n", "\r\n")),
        ("fenced inside a list", "1. So:\n" + "".join(f"   {line}\n" for line in fenced(DOUBLE).splitlines())),
        ("fenced, broken off", f"Sure:\n```python\n{DOUBLE}\n\ndef triple(n):\n    return ("),
        ("fenced, use shown after", f"{fenced(DOUBLE)}\nUse it so:\n{fenced('print(double(3))')}"),
        ("fenced, shell before", f"{fenced('pip install numpy', language='sh')}\n{fenced(DOUBLE)}"),
        ("fenced, corrected", f"{fenced(IDENTITY)}\nNo, rather:\n{fenced(DOUBLE)}"),
        ("fenced after long thought", "so it's 2n. " * 10_000 + "\n" + fenced(DOUBLE)),
    ),
)
def test_the_code_is_found(text):
    assert find_code(text, "double") == DOUBLE


@pytest.mark.parametrize(
    "code",
    table(
        ("import first", f"import math\n\n{DOUBLE}"),
        ("helper after", f"{DOUBLE}\n\ndef triple(n):\n    return 3 * n"),
        ("lambda", "double = lambda n: 2 * n"),
        ("class", "class double(int):\n    pass"),
        ("decorated", f"from functools import cache\n\n@cache\n{DOUBLE}"),
        ("setting at the end", f"import sys\n{DOUBLE}\nsys.setrecursionlimit(2000)"),
        ("a text that holds a fence", f'{DOUBLE}\nhelp = """\n```\n"""'),
        ("old escape", f"{DOUBLE}\npattern = '\\d'"),
    ),
)
@pytest.mark.parametrize("form", ["{}", "It's so:\n\n````python\n{}\n````\n"], ids=["bare", "fenced"])
def test_code_is_kept_whole(code, form):
    assert find_code(form.format(code), "double") == code


@pytest.mark.parametrize(
    "text", ["", "\n\n", "I'm not able to.", "Sure", "```\n```", "```python\ndef (\n```", "\0", "\ud800"]
)
def test_a_text_without_code_has_none(text):
    assert find_code(text, "double") is None


def test_code_that_defines_something_else_is_still_what_was_found():
    assert find_code(fenced("def other():\n    return 1"), "double") == "def other():\n    return 1"


def longest_prefix(text):
    """The slow and obvious way: try every run of lines from the first, the longest first."""
    lines = text.split("\n")
    for end in range(len(lines), 0, -1):
        code = "\n".join(lines[:end])
        try:
            statements = ast.parse(code).body
        except SyntaxError:
            continue
        while statements and is_idle(statements[-1]):
            statements.pop()
        return "\n".join(lines[: statements[-1].end_lineno]) if statements else None
    return None


def is_idle(statement: ast.stmt) -> bool:
    """Whether a statement names things and does nothing."""
    return isinstance(statement, ast.Expr) and "Call(" not in ast.dump(statement)


LINES = """def double(n):
    return n
    if n:
        pass
x = 1
x = (1,
)
else:
'''
try:
f(
1 +

# note
@f""".split("\n")


@given(st.lists(st.sampled_from(LINES), max_size=12))
@settings(deadline=None, max_examples=300)
def test_cutting_at_the_error_finds_the_longest_prefix_that_parses(lines):
    text = "\n".join(["y = 0", *lines])
    assert find_code(text, "y") == longest_prefix(text)


@pytest.mark.parametrize(
    "text",
    table(
        ("decorators", "@a\n" * 20_000),
        ("fences", "```\n" * 20_000),
        ("decorators in fences", fenced("@a\n" * 5_000) * 30),
        ("backticks", "`" * 200_000),
        ("tildes", "~" * 200_000),
        ("tildes in lines", "~~~\n~~~~ ~\n" * 20_000),
        ("fences of growing length", "\n".join("`" * n for n in range(3, 600))),
        ("spaces", " " * 100_000),
        ("brackets", "(" * 100_000),
        ("signs", "-" * 100_000),
        ("attributes", "a." * 50_000),
        ("names", "x\n" * 50_000),
    ),
)
def test_long_nonsense_is_searched_in_bounded_time(text):
    start = time.monotonic()
    assert find_code(text, "double") is None
    assert time.monotonic() - start < 60  # about two seconds; without bounds it is minutes


# ------------------------------------------------------------------------------------------------------------- grades


@pytest.mark.parametrize(("solution", "row"), ROWS, ids=[row["entry_point"] for _, row in ROWS])
def test_a_right_solution_passes_bare_and_fenced(solution, row):
    tests = code_tests(row)
    assert grade_code(solution, tests) == Grade(True, solution)
    assert grade_code(f"So it's:\n{fenced(solution)}\nDone.", tests) == Grade(True, solution)


@pytest.mark.parametrize(
    "code",
    table(
        ("wrong value", "def double(n):\n    return n + 4"),
        ("right for the first test only", "def double(n):\n    return abs(2 * n)"),
        ("other name", "def twice(n):\n    return 2 * n"),
        ("leaves before the tests", f"import sys\n{DOUBLE}\nsys.exit(0)"),
        ("leaves within a test", "import os\ndef double(n):\n    os._exit(0)"),
        ("endless", "def double(n):\n    while True:\n        pass"),
    ),
)
def test_a_wrong_solution_fails_and_is_shown(code):
    assert grade_code(code, TESTS, Limits(cpu_seconds=1)) == Grade(False, code)


def test_a_text_without_code_is_wrong_and_nothing_is_run(monkeypatch):
    monkeypatch.setattr("coterie.grading.code.run_limited", None)
    assert grade_code("I'm sorry.", TESTS) == Grade(False, None)


def test_a_script_part_of_a_solution_does_not_run():
    code = f"{DOUBLE}\n\nif __name__ == '__main__':\n    print(double(int(input())))"
    assert grade_code(code, TESTS).correct
