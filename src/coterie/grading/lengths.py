"""How long an answer may be where nobody says: as long as answers of its task are.

The lengths are those that lm-evaluation-harness gives its tasks: 256 tokens for all that may be reasoned about (the
usual value of its `max_gen_toks`, with which gsm8k, MATH and MMLU with reasoning run), 1024 for programs (humaneval).
Short texts, which its tasks end at the first line or full stop, have 64.
"""

from collections import Counter
from collections.abc import Iterable

from coterie.data.examples import Example
from coterie.grading.answers import SHORT_TEXT, answer_kind, checkable
from coterie.settings.groups import SamplingSettings

ANSWER_TOKENS = 256
SHORT_TOKENS = 64
CODE_TOKENS = 1024


def answer_tokens(row: Example) -> int:
    """Return the most tokens that an answer to a row may take, by what it is graded by.

    A program has the most, a short text the fewest, unless the row's own response reasons before it comes to one.
    Numbers, formulas, options and all that is not graded lie between.
    """
    if row.tests is not None:
        return CODE_TOKENS
    if not checkable(row.answer, row.answers) or len(row.response or "") > SHORT_TEXT:
        return ANSWER_TOKENS
    is_short = bool(row.answers) or answer_kind(row.answer or "", row.instruction) == "text"
    return SHORT_TOKENS if is_short else ANSWER_TOKENS


def longest_answer(sampling: SamplingSettings, row: Example) -> int:
    """Return the most tokens that the answer to a row may take: as asked, else as its task wants."""
    return sampling.max_new_tokens or answer_tokens(row)


def with_length(sampling: SamplingSettings, row: Example) -> SamplingSettings:
    """Return the settings with the length that the answer to a row may have written into them."""
    return sampling.model_copy(update={"max_new_tokens": longest_answer(sampling, row)})


def lengths_in_words(sampling: SamplingSettings, rows: Iterable[Example]) -> int | str:
    """Return how long answers could be, as records tell it: the number that was asked for, else what the rows got."""
    if sampling.max_new_tokens is not None:
        return sampling.max_new_tokens
    counts = sorted(Counter(answer_tokens(row) for row in rows).items())
    if len(counts) == 1:
        return f"{counts[0][0]}, as the task wants"
    total = sum(count for _, count in counts)
    return f"{', '.join(f'{tokens} ({count} of {total} rows)' for tokens, count in counts)}, as their tasks want"
