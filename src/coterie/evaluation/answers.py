"""Answers of methods to test rows, and their grades."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tqdm.auto import tqdm

from coterie.data.examples import Example
from coterie.mixture import Completion, Mixture
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
    order = sorted(range(len(tests)), key=lambda i: len(tests[i].asked.instruction))
    first = None if cell.reroutes else routing.take(order[:1])
    cell.generate(tests[order[0]].asked, routing=first, **{**sampling.model_dump(), "max_new_tokens": 1})
    started = time.perf_counter()
    found: dict[int, Completion] = {}
    with tqdm(total=len(order), desc=f"answers of {label}", unit="prompt") as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            asked = [tests[i].asked for i in numbers]
            weights = None if cell.reroutes else routing.take(numbers)
            own = cell.generate(asked, routing=weights, batch_size=batch_size, **sampling.model_dump())
            found |= dict(zip(numbers, own, strict=True))
            bar.update(len(numbers))
    return Answers([found[i] for i in range(len(tests))], time.perf_counter() - started)
