"""Options that a prompt lists, and the one that a text chooses.

Published sets write options as `(A) bed`, `A. bed`, `a ) bed`, `Answer1: bed`, `Option 1: bed`, `1. bed`, `- bed` or
`- Sentence A: bed`, one a line or in a row; texts choose by the label, by the option's own text, or by both.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from coterie.grading.notation import unwrapped
from coterie.grading.statements import BECAUSE, last_box, normalised, sentence_of, stated_in

_WORD = r"(?i:answer|option|choice|solution|ending|alternative|completion)"
LONGEST_OPTION = 1000  # characters of an option's own text that are read
LISTS = 64  # lists of one form that are looked at, the last ones

# ------------------------------------------------------------------------------------------------ listed in a prompt

_FORMS = tuple(  # of labels; a list keeps to one
    re.compile(pattern)
    for pattern in (
        rf"(?<!\w)(?P<word>{_WORD})[ _#]?(?P<label>\d{{1,2}}|[A-Za-z])(?: ?[:.)]| - )",
        r"(?<!\w)\((?P<label>[A-Za-z]|\d{1,2})\)",
        r"(?<![\w(])(?P<label>[A-Za-z]|\d{1,2}) ?\)",
        r"(?<![\w.])(?P<label>[A-Za-z]|\d{1,2})\.(?=\s)",
        r"(?<!\w)(?P<label>[A-Za-z]|\d{1,2}):(?=\s)",
    )
)
_LETTER = re.compile(r"\(([A-Z])\)|^[ \t]*([A-Z])[.):][ \t]", re.MULTILINE)
_BULLET = re.compile(r"[ \t]*[-*•][ \t]*(\S.*)")
_CALLED = re.compile(r"([^\W\d_]+)[ _#]?([A-Za-z]|\d{1,2})[:.)]\s*(\S.*)")
_HEADING = re.compile(r"(?<!\w)(?:options|choices|alternatives|answers)[ \t]?:\s*$", re.IGNORECASE)
_BULLETS = re.compile(r"^(?:.{0,40}\s)?(?:options|choices)[ \t]?:[ \t]*\n", re.IGNORECASE | re.MULTILINE)
_JOINT = re.compile(r"(?:[,;]|\s)\s*(?:or|and)\s*$|[,;.\s]+$")


@dataclass(frozen=True, eq=False)
class Options:
    """What a prompt offers.

    Attributes:
        texts: every option's own text by its label: `B`, `answer3`, `2`, or where it has none the text itself.
        letters: the letters among the labels, and all others that the prompt has in brackets or at the start of a line.
        word: what numbers are written behind, such as `answer`.
        called: another word that this prompt calls its options by, such as `sentence`.
    """

    texts: Mapping[str, str]
    letters: frozenset[str]
    word: str = ""
    called: str = ""

    def __bool__(self) -> bool:
        return bool(self.texts or self.letters)

    @cached_property
    def own(self) -> Mapping[str, str | None]:
        """The labels by their own texts, as written and as short texts; one that two options share tells none."""
        found: dict[str, str | None] = {}
        for form in (normalised, _bare):
            forms = [form(text) for text in self.texts.values()]
            count = Counter(forms)
            found |= {own: label if count[own] == 1 else None for own, label in zip(forms, self.texts, strict=True)}
        return found

    def label_of(self, text: str) -> str | None:
        """Return the label of the option whose own text this is."""
        return self.own.get(_bare(text)) or self.own.get(normalised(text))

    @cached_property
    def longest(self) -> int:
        """Characters above which a line is more than an option."""
        return 2 * max(map(len, self.texts.values()), default=0) + 40

    def called_options(self, text: str) -> str:
        """Call the options of a text so, where the prompt calls them by another word."""
        return re.sub(rf"\b{self.called}\s+(?=(?:[a-z]|\d+)\b)", "Option ", text, flags=re.I) if self.called else text

    def label(self, mark: str) -> str | None:
        """Return the label that a letter or number stands for, if there is one."""
        if mark.isdecimal():
            return name if (name := f"{self.word}{int(mark)}") in self.texts else None
        return mark.upper() if mark.upper() in self.letters or not self else None


def _bare(text: str) -> str:
    return unwrapped(text).strip().rstrip(".")


class _List(NamedTuple):
    """Labels of one form that follow each other from A, 0 or 1 on, and the prompt that they stand in."""

    prompt: str
    marks: list[re.Match[str]]

    @property
    def texts(self) -> dict[str, str]:
        """What follows each label, up to the next one or the end of its line."""
        ends = [*(mark.start() for mark in self.marks[1:]), len(self.prompt)]
        between = [
            self.prompt[mark.end() : min(end, mark.end() + LONGEST_OPTION)].strip().partition("\n")[0]
            for mark, end in zip(self.marks, ends, strict=True)
        ]
        return {mark["label"]: _JOINT.sub("", text).strip() for mark, text in zip(self.marks, between, strict=True)}

    def before(self, mark: re.Match[str]) -> str:
        """Return what stands before a label; dashes and stars of a list are left out."""
        return self.prompt[max(0, mark.start() - 60) : mark.start()].rstrip(" \t-*•")

    @property
    def has_lines(self) -> bool:
        """Every label begins a line."""
        return all(self.before(mark).endswith("\n") for mark in self.marks)

    @property
    def is_offered(self) -> bool:
        """Labels have texts and stand where a list can begin; numbers alone are options only behind a question."""
        first = self.marks[0]
        before = self.before(first)
        if first["label"].isdecimal() and "word" not in first.groupdict():
            begins = before.rstrip().endswith(("?", "_")) or bool(_HEADING.search(before))
        else:
            begins = first.group()[0] == "(" or not before or before[-1] in "\n?:.!_"
        return begins and all(self.texts.values())


def _lists(prompt: str, form: re.Pattern[str]) -> list[_List]:
    """Return where labels of one form follow each other; an option may itself speak of (A) and (B)."""
    lists: list[_List] = []
    waiting: dict[str, list[_List]] = {}
    for mark in form.finditer(prompt):
        label = mark["label"]
        if waiting.get(label):
            found = waiting[label].pop()
            found.marks.append(mark)
        elif label in ("A", "a", "0", "1"):
            found = _List(prompt, [mark])
            lists.append(found)
        else:
            continue
        following = str(int(label) + 1) if label.isdecimal() else chr(ord(label) + 1)
        waiting.setdefault(following, []).append(found)
    return [found for found in lists if len(found.marks) > 1][-LISTS:]


def _called(bullets: list[str], letters: frozenset[str]) -> Options:
    """Return the options of bullets: their texts, or where each is called by one word, `Sentence A: ...`, so."""
    marks = [_CALLED.fullmatch(text) for text in bullets]
    words = {mark[1].lower() for mark in marks if mark}
    following = [chr(ord("A") + n) for n in range(len(marks))], [str(n) for n in range(1, len(marks) + 1)]
    found = [mark[2].upper() if mark else "" for mark in marks]
    if found not in following or len(words) != 1:
        plain = dict.fromkeys(map(normalised, bullets))
        return Options({text: text for text in plain} if len(plain) > 1 else {}, letters)
    word = words.pop()
    labels = [f"{word}{label}" if label.isdecimal() else label for label in found]
    texts = {label: mark[3] for label, mark in zip(labels, marks, strict=True) if mark}
    is_numbered = found[0].isdecimal()
    return Options(texts, letters if is_numbered else letters.union(texts), word if is_numbered else "", word)


def _bulleted(prompt: str) -> list[str]:
    """Return the lines behind the last `Options:` that begin with a dash or star."""
    heading = next(reversed(list(_BULLETS.finditer(prompt))), None)
    texts: list[str] = []
    for line in prompt[heading.end() :].splitlines() if heading else ():
        if not (bullet := _BULLET.fullmatch(line)):
            break
        texts.append(bullet[1])
    return texts


@lru_cache(maxsize=64)
def listed_options(prompt: str) -> Options:
    """Find the options of a prompt: those of its last list; one that gives each option a line comes before others."""
    letters = frozenset(letter for both in _LETTER.findall(prompt) for letter in both if letter)
    letters = letters if len(letters) > 1 else frozenset()
    lists = [found for form in _FORMS for found in _lists(prompt, form) if found.is_offered]
    if not lists:
        return _called(_bulleted(prompt), letters)
    last = max(lists, key=lambda found: (found.has_lines, found.marks[0].start()))
    if last.marks[0]["label"].isdecimal():
        word = (last.marks[0].groupdict().get("word") or "").lower()
        return Options({f"{word}{int(number)}": text for number, text in last.texts.items()}, letters, word)
    texts = {letter.upper(): text for letter, text in last.texts.items()}
    return Options(texts, letters.union(texts))


# -------------------------------------------------------------------------------------------------- chosen by a text

_LONE = re.compile(r"\(?\s*([A-Za-z])\s*[).:]?\.?")
_NAMED = rf"(?:(?:{_WORD}|[Ll]etter)\s+)?(?:\(\s*([A-Za-z])\s*\)|([A-Z])(?![\w'’-]))|{_WORD}[ _#]?(\d{{1,2}})(?!\w)"
_NAMED_FIRST = re.compile(_NAMED)
_FURTHER = re.compile(rf"\s*(?:/|&|\b(?:or|and)\b)\s*(?:{_NAMED})")
_BRACKETED = re.compile(
    rf"(?<!\w)(?:\(\s*([A-Za-z])\s*\)|(?i:option|choice)\s([A-Z])(?![\w'’-])|{_WORD}[ _#]?(\d{{1,2}})(?!\w))"
)
_LEADING = re.compile(r"\W*(?:[Oo]ption\s+|[Cc]hoice\s+)?([A-Z])\s*(?:[).:]|$)", re.MULTILINE)
_LABELLED = re.compile(  # a label at the start of a line, and what parts it from a text behind it
    rf"[\s(\[\"'“‘*_`#]{{0,5}}(?:(?:{_WORD}|[Ll]etter)[ _#]{{0,2}})?[(\[]?([A-Za-z]|\d{{1,2}})(?![\w'’]|[.,/]\d)"
    r"((?:[\s\"”*_`)\]:.,;]|[–—-](?=\s))*)"
)


class Choice(NamedTuple):
    """What was chosen; no label where it is two different options."""

    label: str | None


def lone_letter(answer: str) -> str | None:
    """Return the letter that an answer is, with or without brackets, as a capital."""
    match = _LONE.fullmatch(answer)
    return match[1].upper() if match else None


def choice_of(line: str, options: Options) -> Choice | None:
    """Return the option that a line names and nothing else: by its label, its own text, or both; None if it does not.

    The label of one and the own text of another are no choice.
    """
    line = options.called_options(line)
    if not options.texts or len(line) > options.longest:
        return None
    start = _LABELLED.match(line)
    label = options.label(start[1]) if start else None
    behind = line[start.end() :] if start else ""
    if label and not behind:
        return Choice(label)
    if not start or not label or options.own.get(_bare(line)):
        own = options.label_of(line)
        return Choice(own) if own else None
    own = options.label_of(behind)
    if own == label or (own is None and normalised(behind) == normalised(options.texts.get(label, ""))):
        return Choice(label)
    if own and re.search(r"[:.)\]]", start[2]):  # `A. cat`, but not `A cat`
        return Choice(None)
    own = options.label_of(line)
    return Choice(own) if own else None


def _stated_choice(line: str, options: Options) -> Choice | None:
    """Return the option that a stated answer names, reasons left out, or begins with."""
    sentence = sentence_of(line)
    for part in (line, sentence, BECAUSE.split(sentence, maxsplit=1)[0]):
        if part.strip() and (choice := choice_of(part, options)):
            return choice
    match = _NAMED_FIRST.match(line)
    if not match:
        return None
    further = _FURTHER.match(line, match.end())
    if further and _mark(further) != _mark(match):
        return Choice(None)
    # A stated (F) is the answer, and wrong, also where the options end at (E); a stated (x) is a variable.
    is_beyond = match[1] and match[1].isupper()
    label = match[1] if is_beyond else options.label(_mark(match))
    return Choice(label) if label else None


def _mark(match: re.Match[str]) -> str:
    return next(filter(None, match.groups())).upper()


def _own_line(text: str, options: Options) -> Choice | None:
    """Return the option that the first or last line names, if no other line names another one."""
    lines = list(dict.fromkeys(stripped for line in text.splitlines() if (stripped := line.strip())))
    if not any(choice_of(line, options) for line in (*lines[:1], *lines[-1:])):
        return None
    choices = {choice for line in lines if (choice := choice_of(line, options))}
    return choices.pop() if len(choices) == 1 else None


def find_option(text: str, options: Options) -> Choice | None:
    """Return the option that a text chooses; None where it speaks of none.

    What a box or "the answer is ..." names comes first, then a first or last line that is an option, the last label in
    brackets or behind `option`, and a letter at the start. One option or another is none.
    """
    text = options.called_options(unwrapped(text))
    box = last_box(text)
    if box:
        return find_option(box.content, options) if box.content else None
    choices: Iterable[Choice | None] = (_stated_choice(line, options) for line in stated_in(text, of_options=True))
    if choice := next(filter(None, choices), None) or _own_line(text, options):
        return choice
    named = list(_BRACKETED.finditer(text))
    labels = [label for match in named if (label := options.label(_mark(match)))]
    further = _FURTHER.match(text, named[-2].end()) if len(named) > 1 else None
    if (further and _mark(further) != _mark(named[-2])) or (options.word and len(set(labels)) > 1):
        return Choice(None)
    leading = _LEADING.match(text)
    marks = filter(None, [leading and leading[1], lone_letter(text)])
    label = next(filter(None, [*labels[-1:], *map(options.label, marks)]), None)
    return Choice(label) if label else None
