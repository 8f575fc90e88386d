"""Short texts against all accepted answers, as the official script of SQuAD 2.0 compares them.

Rajpurkar et al. (2018, arXiv:1806.03822); it drops all ASCII punctuation, so that `C++` is `C#`.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from coterie.grading.notation import unwrapped

_NO_ANSWER = re.compile(
    r"(?:(?:it|this|question|this question) )?(?:is )?"
    r"(?:unanswerable|not answerable|(?:cannot|can not|cant) be answered(?: (?:from|by|with) .*)?)"
    r"|(?:there is )?no answer(?: (?:is|was) given)?"
)
_REASON = re.compile(r"[.,;:(\n]|\s(?:because|since|as)\s")


class SpanScore(NamedTuple):
    """How a candidate compares with the nearest of several references: exact match, and F1 of the words (0 to 1)."""

    exact: bool
    f1: float


def span_words(text: str) -> list[str]:
    """Split a text into words as SQuAD's script does: lower case, no ASCII punctuation, no articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(?:a|an|the)\b", " ", plain).split()


def is_no_answer(text: str) -> bool:
    """Tell whether a text says nothing but that there is no answer: `Unanswerable.`, `There is no answer`.

    An empty text does not say so, and neither does `none`, which can be a span of a passage.
    """
    return bool(_NO_ANSWER.fullmatch(" ".join(span_words(text))))


def span_score(answers: Sequence[str], candidate: str) -> SpanScore:
    """Compare a candidate with all accepted answers; the nearest one counts.

    References without a word, and those that say that there is no answer, are ignored beside others. Where nothing else
    is left the question has no answer, and only a candidate that says so, with or without a reason, is right.
    """
    wanted = [words for answer in answers if (words := span_words(answer)) and not is_no_answer(answer)]
    got = span_words(unwrapped(candidate))
    refuses = is_no_answer(_REASON.split(unwrapped(candidate), maxsplit=1)[0])
    if not wanted:
        return SpanScore(refuses, float(refuses))
    if got in wanted:
        return SpanScore(True, 1.0)
    shared = (2 * (Counter(words) & Counter(got)).total() / (len(words) + len(got)) for words in wanted)
    return SpanScore(False, 0.0 if refuses else max(shared))
