"""Finished answers of several experts become one: by a vote, by a weighted vote, or by a model that writes a synthesis.

The aggregator's task is that of Symbolic-MoE (Chen et al. 2025): the numbered answers, then the question; some answers
may be wrong.
"""

import random
from collections.abc import Sequence

from coterie.combiners.texts import majority

MAJORITY = "majority"
WEIGHTED = "weighted-vote"
VOTES = (MAJORITY, WEIGHTED)
"""Aggregators that cost nothing."""

_SYNTHESIS = """Several experts have answered the question below. Judge their answers critically: some may be wrong or
biased. Do not just repeat one of them; weigh them against each other and write one correct and complete answer.

{answers}

Question:
{question}

End with the final answer in the form that the question asks for, as "The answer is ..."."""


def synthesis_request(question: str, answers: Sequence[str]) -> str:
    """Return the prompt that asks a model to make one answer of several."""
    numbered = "\n\n".join(f"Answer {number}:\n{text}" for number, text in enumerate(answers, start=1))
    return _SYNTHESIS.format(answers=numbered, question=question)


def elect(aggregator: str, readings: Sequence[str], weights: Sequence[float], seed: str) -> int:
    """Return the place of the answer that a vote elects: the first one with the winning reading.

    Answers in which nothing was read do not vote, unless there are no others. Ties fall by a seeded draw.

    Args:
        aggregator: majority, where every answer counts once; or weighted-vote.
        readings: what was read in every answer.
        weights: of the answers, such as the relevance of the experts that gave them.
        seed: of the draw between equals.
    """
    voters = [place for place, reading in enumerate(readings) if reading] or list(range(len(readings)))
    generator = random.Random(seed)
    if aggregator == MAJORITY:
        return voters[majority([readings[place] for place in voters], generator.randrange(2**32))]
    totals: dict[str, float] = {}
    for place in voters:
        totals[readings[place]] = totals.get(readings[place], 0.0) + weights[place]
    most = max(totals.values())
    leading = [reading for reading, total in totals.items() if total >= most - 1e-6 * max(1.0, abs(most))]
    return readings.index(generator.choice(leading))
