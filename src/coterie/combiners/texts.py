"""Experts meet in finished answers: several are sampled, and the one that most of them agree with wins."""

import random
from collections import Counter
from collections.abc import Sequence

from coterie.combiners.logits import LogitCombiner
from coterie.settings.groups import SamplingSettings

SAMPLES = 5
TEMPERATURE = 1.0


class TextCombiner(LogitCombiner):
    """Samples several answers from the combined logits and lets them vote (Self-Consistency, arXiv 2203.11171).

    ELREA's baseline draws 5 samples at temperature 1 and breaks ties at random; here ties fall by a seeded draw.
    """

    kind = "texts"
    finishes_answers = True

    def draws(self, settings: SamplingSettings) -> list[SamplingSettings]:
        """Return the settings of every sample: a seed of its own, temperature 1 unless another was asked for."""
        temperature = settings.temperature or TEMPERATURE
        first = settings.seed * SAMPLES
        return [
            settings.model_copy(update={"temperature": temperature, "seed": first + number})
            for number in range(SAMPLES)
        ]


def majority(votes: Sequence[str], seed: int = 0) -> int:
    """Return the place of the first vote for the most frequent value; several most frequent ones are drawn from.

    Raises:
        ValueError: when there is no vote.
    """
    if not votes:
        raise ValueError("no vote was cast")
    counts = Counter(votes)
    most = max(counts.values())
    leading = [value for value, count in counts.items() if count == most]
    return votes.index(random.Random(seed).choice(leading))
