"""Few-shot prompts: solved examples of the same task before the question, as many as fit.

ELREA (arXiv 2502.00089) shows up to 3 examples of the same task for BIG-Bench Hard, in prompts of at most 1200 tokens,
and 5 of the same subject for MMLU, in at most 1800; examples are dropped until the prompt fits. The paper does not
print its template. Here one user turn holds each shot's question and answer and then the real question, all separated
by blank lines.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from coterie.data.examples import Example, Message
from coterie.data.streaming import same_words
from coterie.errors import CoterieError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FewShot:
    """An example whose last question has solved examples before it.

    Attributes:
        example: what to ask; its response and everything else are those of the original. Grade with the original: the
            options of a multiple choice are those it lists, not those of the shots.
        kept: number of shots in the prompt.
        fits: whether the prompt is within the limit; only a prompt without any shots can be beyond it.
    """

    example: Example
    kept: int
    fits: bool


def with_shots(
    examples: Sequence[Example], shots: Sequence[Example], *, count: int, length: Callable[[Example], int], longest: int
) -> list[FewShot]:
    """Put up to `count` solved examples of the same source and category before every example's question.

    An example's shots are the first ones in the order given, without the example itself: the same id or the same
    instruction, whatever its letter case and white space. Where the prompt is too long the last shot is dropped first,
    so that the shots left are the same first ones in every prompt of a category. The counts are logged.

    Args:
        examples: What to ask, each within its own conversation.
        shots: Solved examples, all with a response; of a conversation only the last question and answer are shown.
        count: The most shots a prompt may get.
        length: Measures the prompt of an example, in tokens.
        longest: The most tokens a prompt with shots may have. An example that is longer by itself stays, without shots.

    Raises:
        CoterieError: `count` is negative, or a shot has no response.
    """
    if count < 0:
        raise CoterieError(f"the number of shots cannot be {count}; give 0 or more")
    by_task: dict[tuple[str | None, str | None], list[tuple[Example, str]]] = {}
    for shot in shots:
        if shot.response is None:
            raise CoterieError(f"the shot {shot.id} has no response; give solved examples only")
        by_task.setdefault((shot.source, shot.category), []).append((shot, same_words(shot.instruction)))
    rows = []
    for example in examples:
        same_task = by_task.get((example.source, example.category), [])
        asked = same_words(example.instruction)
        others = [shot for shot, question in same_task if shot.id != example.id and question != asked]
        rows.append(_fitted(example, others[:count], length, longest))
    counts = sorted(Counter(row.kept for row in rows).items(), reverse=True)
    logger.info("shots in a prompt: %s", ", ".join(f"{kept} in {number} rows" for kept, number in counts))
    if too_long := sum(not row.fits for row in rows):
        logger.warning("%d of %d prompts are longer than %d tokens even without shots", too_long, len(rows), longest)
    return rows


def _fitted(example: Example, shots: Sequence[Example], length: Callable[[Example], int], longest: int) -> FewShot:
    """Keep the most shots with which the prompt fits, in the last user turn; none where it never does."""
    question, messages = example.instruction, list(example.messages)
    place = max(number for number, message in enumerate(messages) if message.role == "user")
    for kept in range(len(shots), -1, -1):
        solved = [part for shot in shots[:kept] for part in (shot.instruction, shot.response or "")]
        messages[place] = Message("user", "\n\n".join([*solved, question]))
        asked = replace(example, messages=tuple(messages))
        if length(asked) <= longest:
            return FewShot(asked, kept, True)
    return FewShot(example, 0, False)
