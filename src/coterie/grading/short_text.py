"""Whether a short text is the reference answer, and how many words the two share.

Where a row lists all accepted answers, they are compared as the official script of SQuAD 2.0 does (Rajpurkar et al.
2018, arXiv:1806.03822): it drops all ASCII punctuation, so that `C++` is `C#`. Against a single reference that would be
too little; there, decimal points, minus signs and other symbols count, and closing brackets can be the answer.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from coterie.grading.maths import unwrapped

# ---------------------------------------------------------------------------------------------- against one reference


def normalised(text: str) -> str:
    """Lower-case; drop LaTeX text wrappers, articles, punctuation (not inside numbers) and extra spaces.

    A text without a letter or digit is its symbols, such as closing brackets: only spaces and quotation marks go.
    """
    text = unwrapped(text).lower()
    if not re.search(r"\w", text):
        return re.sub(r"[\s\\`'\"“”.,;]", "", text) or text.strip()
    text = re.sub(r"(?<=\d)[.:](?=\d)|(?<![\w-])-(?=\d)|([-.,;:!?'\"()\[\]{}“”‘’«»…*_`$]+)", _drop_group, text)
    return " ".join(re.sub(r"\b(?:an?|the)\s+", "", text).split())


def _drop_group(match: re.Match[str]) -> str:
    return "" if match[1] else match[0]


# --------------------------------------------------------------------------------------------- against all references

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
    return SpanScore(False, 0.0 if refuses else max(_f1(words, got) for words in wanted))


def _f1(wanted: list[str], got: list[str]) -> float:
    shared = (Counter(wanted) & Counter(got)).total()
    return 2 * shared / (len(wanted) + len(got))
