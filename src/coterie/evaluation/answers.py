"""Answers of methods to test rows, and their grades."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from coterie.data.examples import Example
from coterie.mixture import Completion, Mixture
from coterie.progress import steps
from coterie.routers.base import Routing
from coterie.settings.groups import SamplingSettings


@dataclass(frozen=True)
class Answers:
    """One method's answers to all rows, and the seconds they took (routing not included)."""

    completions: list[Completion]
    seconds: float

    @property
    def mean_tokens(self) -> float:
        """Tokens of an answer, on average."""
        return sum(len(one.token_ids) for one in self.completions) / len(self.completions)


class TestRow(NamedTuple):
    """A test row: what is asked, which may hold solved examples, and the row as it stands in the data."""

    __test__ = False  # pytest need not look for tests in it

    asked: Example
    row: Example


def answer(
    cell: Mixture, tests: Sequence[TestRow], routing: Routing, label: str, batch_size: int, sampling: SamplingSettings
) -> Answers:
    """Let a method answer all rows, those of similar length together.

    What happens once, such as stacking experts, happens before the clock starts: the first method would pay for all.
    """
    weights = None if cell.reroutes else routing
    first = None if weights is None else weights.take([0])
    options: dict[str, Any] = sampling.model_dump()
    cell.generate(tests[0].asked, routing=first, **(options | {"max_new_tokens": 1}))
    started = time.perf_counter()
    with steps(f"answers of {label}", len(tests), "prompt") as done:
        asked = [test.asked for test in tests]
        found = cell.generate(asked, routing=weights, batch_size=batch_size, progress=done, **options)
    return Answers(found, time.perf_counter() - started)
