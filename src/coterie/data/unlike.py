"""Requests unlike the training data: a small sample of many kinds that comes with this project, and rows joined."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from coterie.data.examples import Example

UNLIKE = Path(__file__).with_suffix(".jsonl")
"""56 rows that this project wrote: knowledge, languages, code, letters, poems, recipes, small talk, riddles."""
CROSSING = 48


def cross(labels: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """Draw `CROSSING` pairs of rows of different clusters, by their numbers; none where there is one cluster."""
    generator, numbers = random.Random(seed), range(len(labels))
    pairs: set[tuple[int, int]] = set()
    while len(set(labels)) > 1 and len(pairs) < min(CROSSING, len(labels)):
        one, other = generator.sample(numbers, 2)
        if labels[one] != labels[other]:
            pairs.add((one, other))
    return sorted(pairs)


def join(first: Example, second: Example) -> Example:
    """Return the first row, without its answer, that asks in its last turn for what the second one asks for, too."""
    *before, asked = first.prompt
    both = replace(asked, content=f"{asked.content}\n\n{second.instruction}")
    return Example(f"{first.id}+{second.id}", (*before, both), first.source)
