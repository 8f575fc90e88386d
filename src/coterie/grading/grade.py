"""Verdicts on whole answers: a row tells by its answer or its tests whether a text is right."""

import re
from collections.abc import Sequence

from coterie.data.examples import Example
from coterie.errors import CoterieError
from coterie.grading.answers import Grade, checkable, grade
from coterie.grading.code import code_tests, grade_code
from coterie.grading.sandbox import protection


def graded(text: str, row: Example, *, run_code: bool) -> Grade | None:
    """Grade an answer; None where the row has nothing to grade it by."""
    if (tests := code_tests(row.tests)) is not None:
        return grade_code(text, tests) if run_code else None
    if not checkable(row.answer, row.answers):
        return None
    return grade(text, row.answer or "", prompt=row.instruction, answers=row.answers)


def is_right(text: str, row: Example) -> bool | None:
    """Tell whether an answer is right, its thinking left out; None where the row has nothing to tell it by.

    No code is run.
    """
    verdict = graded(after_thinking(text), row, run_code=False)
    return None if verdict is None else verdict.correct


def after_thinking(text: str) -> str:
    """Return the text after the last closing think tag; nothing if the thinking was never closed."""
    _, closed, rest = text.rpartition("</think>")
    return re.sub(r"<think>.*", "", rest if closed else text, flags=re.DOTALL).strip()


def code_notes(rows: Sequence[Example], *, run_code: bool) -> list[str]:
    """Say how code was graded, and what this machine could not keep it from."""
    count = sum(row.tests is not None for row in rows)
    if not count:
        return []
    if not run_code:
        return [f"{count} rows bring tests of code, which was not run: they are not graded."]
    open_ways = [name for name, is_closed in protection()._asdict().items() if not is_closed]
    lacking = f"; this machine cannot keep it from {', '.join(open_ways)}" if open_ways else ""
    return [f"Code that answers {count} rows was run in a limited child process{lacking}."]


def check_code_execution(rows: Sequence[Example], allowed: bool | None) -> None:
    """Refuse to go on while it is not said whether code that a model writes may be run.

    Raises:
        CoterieError: when rows bring tests and `allowed` is None, or tests are not in the form that can be run.
    """
    count = sum(code_tests(row.tests) is not None for row in rows)
    if count and allowed is None:
        raise CoterieError(
            f"{count} rows are graded by running the code that the methods write; add --allow-code-execution to run it "
            "in a limited child process, or --no-allow-code-execution to leave them ungraded"
        )
