"""Where a text states its answer - in a box, behind "the answer is" - and one form for short texts."""

import re
from typing import NamedTuple

from coterie.grading.notation import LONGEST_EXPRESSION, unwrapped

BECAUSE = re.compile(r"[(;]|,?\s(?:because|since|as|given|where|which|when|if|so|while)\s")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def _announcement(nouns: str) -> re.Pattern[str]:
    verbs = r"(?:(?:is|was|would be|should be|must be)\b\s*:?|:|=)"
    return re.compile(
        rf"\b{nouns}(?:\s+to\s[^.\n]{{0,80}}?)?\s*{verbs}\s*|^[ \t]*####\s*", re.IGNORECASE | re.MULTILINE
    )


_STATED = _announcement("answer")
_STATED_OPTION = _announcement("(?:answer|option|choice|solution|ending)")


def without_bold(text: str) -> str:
    """Drop Markdown's double stars, but not those between two operands (`2**3`)."""
    return re.sub(r"(?<![\w)}])\*\*|\*\*(?![\w({-])", "", text)


class Box(NamedTuple):
    """What stands in a box; `content` is None where the text breaks off inside it."""

    content: str | None


def last_box(text: str) -> Box | None:
    r"""Return the last `\boxed{...}`, braces balanced, None if there is none; one pass over the text."""
    opened: list[tuple[bool, int]] = []
    last, span = -1, (-1, -1)
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "}" and opened:
            is_box, start = opened.pop()
            span = (start, match.start()) if is_box and start > span[0] else span
        elif token == "{":
            opened.append((False, match.end()))
        elif token.startswith(("\\boxed", "\\fbox")):
            last = match.end()
            opened.append((True, last))
    if last < 0:
        return None
    return Box(text[slice(*span)].strip() if span[0] == last else None)


def stated_in(text: str, *, of_options: bool = False) -> list[str]:
    """Return what follows "the answer is" - of options "the best choice is" too - on its line, the last one first.

    No more than eight.
    """
    starts = [match.end() for match in (_STATED_OPTION if of_options else _STATED).finditer(text)][-8:]
    lines = (text[start : start + 2 * LONGEST_EXPRESSION].partition("\n")[0].strip() for start in reversed(starts))
    return [line for line in lines if line]


def sentence_of(line: str) -> str:
    """Return the first sentence of a line, without its full stop."""
    return re.split(r"(?<=[^\s\\])(?<!\b[Rr]s)(?<!\bsq)[.!?](?=\s|$)", line, maxsplit=1)[0].strip()


def normalised(text: str) -> str:
    """Lower-case; drop LaTeX text wrappers, articles, punctuation (not inside numbers) and extra spaces.

    A text without a letter or digit is its symbols, such as closing brackets: only spaces and quotation marks go.
    """
    text = unwrapped(text).lower()
    if not re.search(r"\w", text):
        return re.sub(r"[\s\\`'\"“”.,;]", "", text) or text.strip()
    text = re.sub(r"((?<=\d)[.:](?=\d)|(?<![\w-])-(?=\d))|[-.,;:!?'\"()\[\]{}“”‘’«»…*_`$]+", r"\1", text)
    return " ".join(re.sub(r"\b(?:an?|the)\s+", "", text).split())
