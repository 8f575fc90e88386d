r"""Exact match of a generated text with a reference answer.

Three kinds of answer are told apart: mathematics, one of the options that a prompt lists (`grading/options.py`), and
short text. Each has its own way to find the answer in a text and its own idea of "the same". A box wins over a sentence
"the answer is ...", and that over anything else; where there are several of one sort, the last one counts.

Where a row lists all accepted short texts, they are compared as SQuAD does (`grading/spans.py`), which drops all ASCII
punctuation. Against a single reference that would be too little; there, decimal points, minus signs and other symbols
count, and closing brackets can be the answer.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from coterie.errors import CoterieError
from coterie.grading.maths import same_expression
from coterie.grading.notation import LONGEST_EXPRESSION, is_expression, tidy, unwrapped
from coterie.grading.numbers import MAGNITUDES, from_words, plain, rational
from coterie.grading.options import Options, choice_of, find_option, listed_options, lone_letter
from coterie.grading.spans import is_no_answer, span_score, span_words
from coterie.grading.statements import BECAUSE, last_box, normalised, sentence_of, stated_in, without_bold
from coterie.grading.units import CURRENCIES, parse_unit

AnswerKind = Literal["maths", "choice", "text"]
SHORT_TEXT = 80  # characters of a text that may be an answer as it stands


class Grade(NamedTuple):
    """Whether a text answers correctly, and how that was seen.

    Attributes:
        correct: The answer matches the reference, or one of several.
        extracted: The part of the text that was taken for the answer; None if none was found.
        f1: F1 of the words that short text shares with the nearest reference, 0 to 1, as SQuAD counts it. Order does
            not matter to it. None for mathematics, options, and references without a word.
    """

    correct: bool
    extracted: str | None
    f1: float | None = None


def checkable(answer: str | None, answers: Sequence[str] = ()) -> bool:
    """Tell whether `grade` can grade an answer at all: it is there, and it is not a list of unit tests."""
    if answers:
        return True
    return answer is not None and bool(answer.strip()) and not answer.lstrip().startswith("assert ")


def answer_kind(answer: str, prompt: str = "") -> AnswerKind:
    r"""Infer what kind of answer a reference is.

    What names one of at least two options that the prompt lists is a choice: a letter, `answer3`, or the option's own
    text. A number, fraction, LaTeX expression or single variable is maths. All else is text: `yes`, `\text{Monday}`,
    `the 1990s`.
    """
    if _wanted_option(answer, listed_options(prompt)):
        return "choice"
    expression = tidy(answer)
    if re.search(r"[a-zA-Z]{3}", answer) and not re.search(r"\d|\\", answer):  # `two towers` are no number
        return "maths" if from_words(answer.strip(" .")) else "text"
    if not is_expression(answer) or re.fullmatch(r"[^\W\d_]{2,}", expression):
        return "text"
    return "maths" if re.search(r"\d|\\[a-zA-Z]|^\(?-?[^\W\d_]\)?$", expression) else "text"


def grade(
    text: str, answer: str, *, prompt: str = "", kind: AnswerKind | None = None, answers: Sequence[str] = ()
) -> Grade:
    r"""Find the answer in a generated text and compare it with the reference.

    Args:
        text: What the model wrote; any length, any content.
        answer: The reference, such as `72`, `\frac{1}{2}`, `B`, `(B)`, `answer3`, `yes` or `Paris`.
        prompt: What was asked. Its list of options tells choices apart, and limits which labels count.
        kind: How to compare; where None, text if there are several references, else inferred by `answer_kind`.
        answers: All accepted short texts, the nearest of which counts instead of `answer`; they are compared as SQuAD
            2.0 does. Only empty ones, or `unanswerable`, mean that the text must say that there is no answer.

    Raises:
        CoterieError: The reference is empty, or is asked to be a choice and is neither a letter nor a listed option.
    """
    kind = kind or ("text" if answers else answer_kind(answer, prompt))
    if not answer.strip() and not (answers and kind == "text"):
        raise CoterieError(f"the reference answer {answer!r} is empty; give null where a row has no answer to check")
    text = without_bold(text)
    if kind == "choice":
        options = listed_options(prompt)
        wanted = _wanted_option(answer, options) or lone_letter(tidy(answer))
        if wanted is None:
            raise CoterieError(f"the reference answer of a choice must be a letter or a listed option; got {answer!r}")
        choice = find_option(text, options)
        is_value = wanted.isdecimal() or options.label_of(answer) == wanted
        if choice or not is_value:
            label = choice.label if choice else None
            return Grade(label == wanted, label)
        kind = answer_kind(answer)
    if kind == "maths":
        found = _find_expression(text)
        return Grade(same_expression(answer, found), found[:LONGEST_EXPRESSION]) if found else Grade(False, None)
    if not answers and not is_no_answer(answer):
        return _grade_text(text, answer)
    scored = [(candidate, span_score(answers or (answer,), candidate)) for candidate in _text_candidates(text)]
    if not scored:
        return Grade(False, None, 0.0)
    best, score = max(scored, key=lambda pair: pair[1].exact)
    return Grade(score.exact, best[:LONGEST_EXPRESSION], score.f1)


def _wanted_option(answer: str, options: Options) -> str | None:
    """Return the label of the option that a reference names; None if it is no option."""
    letter = lone_letter(tidy(answer))
    if letter in options.letters:
        return letter
    choice = choice_of(unwrapped(answer).strip(), options)
    return choice.label if choice else None


def read_answer(text: str, prompt: str = "") -> str:
    """Find what a text answers where no reference tells what kind of answer is wanted, so that texts can vote.

    The label of an option where the prompt lists some; else what a box or "the answer is ..." holds, else a short text
    itself, else its last formula or number, else its last line; in a form in which equal answers are equal texts.
    Nothing read is an empty text.
    """
    text = without_bold(text)
    options = listed_options(prompt)
    choice = find_option(text, options) if options else None
    if choice or options.letters:
        return choice.label or "" if choice else ""
    box, stated = last_box(text), stated_in(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if box:
        found = box.content
    elif stated:
        found = _expression_in(stated[0]) or sentence_of(stated[0])
    elif len(lines) == 1 and len(lines[0]) <= SHORT_TEXT:
        found = lines[0]
    else:
        terms = _terms(text)
        found = _inside(terms[-1]) if terms else lines[-1] if lines else None
    if found and is_expression(found) and re.search(r"\d", tidy(found)):
        return _canonical(found.rpartition("=")[2])
    return normalised(found or "")


# ------------------------------------------------------------------------------------------------------------ maths

_INLINE = (  # what may stand between single dollars: no word, or two prices would enclose a formula
    r"(?:\\(?:begin|end)\{[a-z]+\}|\\[a-zA-Z]+|\\[^a-zA-Z\n]|[^$\n\\a-zA-Z]|(?<![a-zA-Z])[a-zA-Z]{1,2}(?![a-zA-Z])){1,300}"
)
_MAGNITUDE = rf"(?: ?(?:{'|'.join(MAGNITUDES)})s?\b){{1,3}}|[kKMB](?![\w])|bn\b"
_TIMES_TEN = r" ?(?:x|×|\*|\\times|\\cdot) ?10 ?\^ ?\{?[-+]?\d{1,3}\}?"
_TERM = re.compile(  # a formula between delimiters, a bare LaTeX fraction or root, or a number with its magnitude
    rf"\$\$([^$]{{1,500}})\$\$|(?<![\\$])\$(?=\S)(?=[^$\n]*[\d\\])({_INLINE})(?<=\S)\$(?!\d)"
    r"|\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]"
    r"|-?\d{0,20}\\[dtc]?frac\s*\{[^{}]{1,60}\}\s*\{[^{}]{1,60}\}|-?\d{0,20}\\sqrt\s*\{[^{}]{1,60}\}"
    rf"|(?<![\w.)}}\]])[-−]?\\?[{CURRENCIES}]?(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?"
    rf"(?:[eE][-+]?\d{{1,3}}(?!\w)|{_TIMES_TEN}|[¼-¾⅐-⅞]|[/:]\d+| [/:] \d+| ?\\pi| ?π|{_MAGNITUDE})?(?:\s?\\?%)?"
    r"|(?<![\w.)}\]])[-−]?(?:\.\d+|[¼-¾⅐-⅞])",
    re.DOTALL,
)
_UNIT_BEHIND = re.compile(
    r" ?(?:(?:square|cubic|sq|cu) ?\.? ?)?([^\W\d_]{1,20})(?: ?(?:/|per) ?[^\W\d_]{1,20})?(?:\^?\{?[23²³]\}?)?(?!\w)"
)
_BOUNDED = re.compile(  # what stands right before a number that is not the answer
    r"(?:\b(?:not|(?:more|less|fewer|greater|larger|smaller|higher|lower) than)|n't)\s+$", re.IGNORECASE
)
_OR = re.compile(r"[^.!?\n]{0,40}\b(?:or|between)\b[^.!?\n]{0,40}")


def _terms(text: str) -> list[re.Match[str]]:
    """Return the formulas and numbers of a text in order."""
    return list(_TERM.finditer(text))


def _inside(term: re.Match[str]) -> str:
    """Return a formula without its delimiters, or a number with the unit behind it, if it is a known one."""
    if formula := next(filter(None, term.groups()), None):
        return formula
    behind = _UNIT_BEHIND.match(term.string, term.end())
    is_known = behind and behind[1] != "are" and parse_unit(behind.group()).measures
    return term.group() + (behind.group() if behind and is_known else "")


def _is_bound(term: re.Match[str]) -> bool:
    """Tell whether a number is only what the answer is not, or lies above or below: `more than 5`, `5 or more`."""
    behind = re.match(r"(?: [a-z]+)? or (?:more|less|fewer)\b", term.string[term.end() : term.end() + 40])
    return bool(behind or _BOUNDED.search(term.string[max(term.start() - 20, 0) : term.start()]))


def _canonical(expression: str) -> str:
    """Write a number in one way however it was written: 1/2, 0.5 and a half; anything else as `tidy` does."""
    value = rational(tidy(expression))
    return tidy(expression) if value is None else plain(value)


def _expression_in(line: str) -> str | None:
    """Return the sentence that begins a line, without reasons, if it is an expression; else the one value in it.

    Two different values are no answer: then the whole sentence comes back, which equals nothing.
    """
    sentence = sentence_of(line)
    clause = BECAUSE.split(sentence, maxsplit=1)[0].rpartition("=")[2].strip() or sentence
    alternatives = re.split(r",?\sor\s", clause)
    if len(alternatives) > 1 and len(set(map(_canonical, alternatives))) == 1:  # `3/4 or 0.75`
        return alternatives[0]
    for whole in (sentence, clause):
        if re.search(r"[\d\\]|^\W*\w\W*$", tidy(whole)) and is_expression(whole):
            return whole
    found = _terms(clause) or _terms(line)[:1]
    terms = [_inside(term) for term in found]
    if len(set(map(_canonical, terms))) > 1 or re.search(r"\bnot\b|n't\b", clause) or any(map(_is_bound, found)):
        return sentence
    return terms[0] if terms else None


def _find_expression(text: str) -> str | None:
    box = last_box(text)
    if box:
        return box.content
    for line in stated_in(text):
        if expression := _expression_in(line):
            return expression
    line = text.strip()
    if "\n" not in line and len(line) <= LONGEST_EXPRESSION and is_expression(line):
        return sentence_of(line) or None
    if "\n" not in line and len(line) <= SHORT_TEXT and re.match(r"\W{0,3}\d", line):
        return _expression_in(line)
    terms = _terms(text)
    if len(terms) > 1 and _OR.fullmatch(text[terms[-2].end() : terms[-1].start()]):
        return text[terms[-2].start() : terms[-1].end()]  # one or the other is neither
    return _inside(terms[-1]) if terms and not _is_bound(terms[-1]) else None


# ------------------------------------------------------------------------------------------------------------- text

_VERDICTS = frozenset({"yes", "no", "true", "false"})
_EITHER = re.compile(r"\W*(yes|no|true|false)\W+(?:or|and)\W+(?!\1)(?:yes|no|true|false)\b", re.IGNORECASE)


def _text_candidates(text: str, *, symbols: bool = False) -> list[str]:
    """Return what may be meant as the answer, most likely first.

    Where it is `symbols`, such as closing brackets, these end a box at the last brace of its line.
    """
    if symbols:
        _, opened, rest = text.rpartition("\\boxed{")
        content, closed, _ = rest.partition("\n")[0].rpartition("}")
        if opened and closed:
            return [content]
    box = last_box(text)
    if box:
        return [box.content] if box.content else []
    stated = stated_in(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    candidates = [sentence_of(stated[0]), stated[0]] if stated else [*lines[:1], text.strip()]
    return list(dict.fromkeys(candidate for candidate in candidates if candidate))


def _grade_text(text: str, answer: str) -> Grade:
    """Compare with a single reference."""
    wanted = normalised(answer)
    candidates = _text_candidates(text, symbols=not re.search(r"\w", wanted))
    if wanted in _VERDICTS:
        words = [re.findall(r"\w+", candidate) for candidate in candidates if not _EITHER.match(candidate)]
        candidates = [own[0] for own in words if own]
    found = next((candidate for candidate in candidates if normalised(candidate) == wanted), None)
    best = found or next(iter(candidates), None)
    f1 = span_score((answer,), best or "").f1 if span_words(answer) else None
    return Grade(found is not None, best and best[:LONGEST_EXPRESSION], f1)
