"""Answers of methods to test rows, and their grades."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from coterie.combiners.texts import majority
from coterie.data.examples import Example
from coterie.grading.answers import checkable
from coterie.grading.grade import graded_text
from coterie.mixture import Completion, Mixture, Trace
from coterie.routers.base import Routing
from coterie.settings.groups import SamplingSettings


class Answers(NamedTuple):
    """One method's answers to all rows, and the seconds they took (routing not included)."""

    completions: list[Completion]
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return both as plain values."""
        return {"completions": [asdict(given) for given in self.completions], "seconds": self.seconds}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Answers":
        """Build from what `record` gave."""
        return cls([_completion(row) for row in record["completions"]], record["seconds"])


def _completion(record: Mapping[str, Any]) -> Completion:
    tuples = {name: tuple(record[name]) for name in ("token_ids", "logprobs")}
    trace = Trace.from_record(record["trace"]) if record.get("trace") else None
    fields: dict[str, Any] = {**record, **tuples, "trace": trace}
    return Completion(**fields)


class Task(NamedTuple):
    """A test row: what is asked, which may hold solved examples, and the row as it stands in the data."""

    asked: Example
    row: Example


def answer(
    cell: Mixture, tasks: Sequence[Task], routing: Routing, label: str, batch_size: int, sampling: SamplingSettings
) -> Answers:
    """Let a method answer all tasks, those of similar length together."""
    started = time.perf_counter()
    order = sorted(range(len(tasks)), key=lambda i: len(tasks[i].asked.instruction))
    found: dict[int, Completion] = {}
    with tqdm(total=len(order), desc=f"answers of {label}", unit="prompt") as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            found |= dict(zip(numbers, _batch(cell, tasks, routing, numbers, sampling), strict=True))
            bar.update(len(numbers))
    return Answers([found[i] for i in range(len(tasks))], time.perf_counter() - started)


def _batch(
    cell: Mixture, tasks: Sequence[Task], routing: Routing, numbers: Sequence[int], sampling: SamplingSettings
) -> list[Completion]:
    options: dict[str, Any] = {"batch_size": len(numbers), **sampling.model_dump()}
    if not cell.combiner.finishes_answers:
        return cell.generate([tasks[i].asked for i in numbers], routing=routing.take(numbers), **options)
    drawn = cell.drawn([tasks[i].asked for i in numbers], routing=routing.take(numbers), **options)
    return [_elected(tasks[i].row, answers, sampling.seed) for i, answers in zip(numbers, drawn, strict=True)]


def _elected(row: Example, answers: Sequence[Completion], seed: int) -> Completion:
    """Let answers vote by what the grader reads in them; one in which it reads nothing votes by its whole text."""
    readable = row.tests is None and checkable(row.answer, row.answers)
    readings = [graded_text(answer.text, row).extracted if readable else None for answer in answers]
    votes = [reading or answer.text.strip() for reading, answer in zip(readings, answers, strict=True)]
    return answers[majority(votes, seed)]
