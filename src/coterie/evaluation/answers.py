"""Answers of methods to test rows, and their grades."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from coterie.combiners.texts import majority
from coterie.data.examples import Example
from coterie.grading.answers import checkable
from coterie.grading.grade import graded_text
from coterie.mixture import Completion, Mixture
from coterie.routers.base import Routing
from coterie.settings.groups import SamplingSettings


@dataclass(frozen=True)
class Answers:
    """One method's answers to all rows, and the seconds they took (routing not included)."""

    completions: list[Completion]
    seconds: float


class TestRow(NamedTuple):
    """A test row: what is asked, which may hold solved examples, and the row as it stands in the data."""

    __test__ = False  # pytest need not look for tests in it

    asked: Example
    row: Example


def answer(
    cell: Mixture, tests: Sequence[TestRow], routing: Routing, label: str, batch_size: int, sampling: SamplingSettings
) -> Answers:
    """Let a method answer all rows, those of similar length together."""
    started = time.perf_counter()
    order = sorted(range(len(tests)), key=lambda i: len(tests[i].asked.instruction))
    found: dict[int, Completion] = {}
    with tqdm(total=len(order), desc=f"answers of {label}", unit="prompt") as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            asked = [tests[i].asked for i in numbers]
            options: dict[str, Any] = {"batch_size": len(numbers), **sampling.model_dump()}
            if cell.combiner.finishes_answers:
                drawn = cell.drawn(asked, routing=routing.take(numbers), **options)
                own = [_elected(tests[i].row, many, sampling.seed) for i, many in zip(numbers, drawn, strict=True)]
            else:
                own = cell.generate(asked, routing=routing.take(numbers), **options)
            found |= dict(zip(numbers, own, strict=True))
            bar.update(len(numbers))
    return Answers([found[i] for i in range(len(tests))], time.perf_counter() - started)


def _elected(row: Example, answers: Sequence[Completion], seed: int) -> Completion:
    """Let answers vote by what the grader reads in them; one in which it reads nothing votes by its whole text."""
    readable = row.tests is None and checkable(row.answer, row.answers)
    readings = [graded_text(answer.text, row).extracted if readable else None for answer in answers]
    votes = [reading or answer.text.strip() for reading, answer in zip(readings, answers, strict=True)]
    return answers[majority(votes, seed)]
