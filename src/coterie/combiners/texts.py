"""Experts meet in finished answers: several are sampled, and the one that most of them agree with wins."""

import random
from collections import Counter
from collections.abc import Sequence

from coterie.combiners.logits import LogitCombiner
from coterie.errors import CoterieError
from coterie.settings.groups import SamplingSettings

SAMPLES = 5
TEMPERATURE = 1.0


class TextCombiner(LogitCombiner):
    """Samples answers from the combined logits; what is read in them votes (Self-Consistency, arXiv 2203.11171).

    ELREA's baseline draws 5 samples at temperature 1 and breaks ties at random; here ties fall by a seeded draw.
    """

    kind = "texts"
    finishes_answers = True

    def draws(self, settings: SamplingSettings, n: int = 1) -> list[SamplingSettings]:
        """Return the settings of every sample, at temperature 1 unless another was asked for.

        Raises:
            CoterieError: when several answers are wanted.
        """
        if n > 1:
            raise CoterieError(f"combiner 'texts' makes one answer of {SAMPLES} samples, not {n}; leave n out")
        sampled = settings.model_copy(update={"temperature": settings.temperature or TEMPERATURE})
        return super().draws(sampled, SAMPLES)


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
