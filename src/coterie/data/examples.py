"""Examples in one form, whatever form their rows had."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

from coterie.data.columns import Columns
from coterie.data.files import rows_of
from coterie.data.forms import ASKS, FORMS, NAMED, REPLIES, Message, conversation_of, filled, is_missing
from coterie.data.spooled import Spooled
from coterie.errors import CoterieError
from coterie.settings.reading import from_flat
from coterie.settings.rows import READING, ReadingSettings

MAX_CHARACTERS = 4 * 2**20
"""The longest conversation: a million tokens, more than models read."""
MAX_DEPTH = 100
"""How deeply a row's tests may be nested."""

EMPTY = "{place} has an empty {part}; fill it in or delete the row"
ANSWER_MARK = re.compile(r"(?:^|\n)#### *([^\n]+)\s*$")
"""The last line of a whole solution that is called the answer, as GSM8K has it."""


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the answer to learn, or with the question to answer.

    Attributes:
        id: unique name of the row; its number where the data gives none.
        messages: turns; the last one is the assistant's, except in a prompt without an answer.
        source: data set the row comes from, if known.
        category: kind of row within its source, if known.
        answer: short checkable answer, if there is one.
        answers: all accepted short answers, where a row lists several; the one empty text `""` where its list is empty,
            which says that the question has no answer.
        tests: what a program must pass, as the row has it: an object of plain JSON.
    """

    id: str
    messages: tuple[Message, ...]
    source: str | None = None
    category: str | None = None
    answer: str | None = None
    answers: tuple[str, ...] = ()
    tests: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the final answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def instruction(self) -> str:
        """The last thing the user said."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")

    @property
    def response(self) -> str | None:
        """The final answer, if the example has one."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None


def from_prompt(text: str, number: int = 0) -> Example:
    """Make an example of one question.

    Raises:
        CoterieError: when the text is empty.
    """
    if not text.strip():
        raise CoterieError(f"prompt {number + 1} is empty; give some text")
    _check_characters(f"prompt {number + 1}", text)
    return Example(id=str(number), messages=(Message("user", text),))


def load_examples(
    source: str | Path | Iterable[Mapping[str, Any]],
    limit: int | None = None,
    *,
    need_response: bool = True,
    reading: ReadingSettings | None = None,
    **fields: Any,  # noqa: ANN401 - of ReadingSettings
) -> list[Example]:
    """Load examples from a file, any `datasets` source, or rows in memory.

    A string that names no `.jsonl`, `.ndjson`, `.json`, `.csv` or `.parquet` file (or one of them with `.gz` behind) is
    given to the `datasets` library: a folder made by `save_to_disk`, or a hub data set as `name` or `name:split`
    (`train` by default).

    Args:
        source: where the rows are; every row has one of the forms of `ROW_FORMS`, and optionally id, source, category,
            answer, answers, tests.
        limit: use only the first rows; no more are read.
        need_response: whether a row without an answer is an error.
        reading: which columns hold fields under other names, which are passed over, and how an input joins its
            instruction.
        **fields: the same by name: `map={"response": "output"}`, `ignore_fields`, `input_template`.

    Raises:
        CoterieError: naming the file and line of the first bad row, telling that there are no rows or that none has a
            column of the map, or for an unknown keyword.
    """
    how = from_flat(ReadingSettings, fields, ("limit", "need_response")) if reading is None else reading
    return list(read_all([source], limit, need_response=need_response, reading=how))


def read_all(
    sources: Sequence[str | Path | Iterable[Mapping[str, Any]]],
    limit: int | None = None,
    *,
    need_response: bool = True,
    reading: ReadingSettings = READING,
) -> Iterator[Example]:
    """Yield the examples of sources one by one, as `load_examples`, which holds all of one.

    A column of the map has to be in one of the sources.

    Raises:
        CoterieError: as `load_examples`.
    """
    columns = Columns(reading)
    names = [str(source) if isinstance(source, (str, Path)) else "the data" for source in sources]
    for name, source in zip(names, sources, strict=True):
        if isinstance(source, (str, Path)):
            rows = rows_of(source, limit)
        else:
            rows = ((f"row {number} of the data", row) for number, row in enumerate(source, start=1))
        number = -1
        for number, (place, row) in enumerate(islice(rows, limit)):
            try:
                yield _to_example(row, place, str(number), need_response, reading, columns)
            except CoterieError as error:
                raise CoterieError("; ".join(filter(None, [columns.lacks(), str(error)]))) from error
        if number < 0:
            raise CoterieError(f"{name} holds no examples; rows have the form {FORMS}")
    columns.check(", ".join(names))


def read_named(
    sources: Sequence[str], limit: int | None = None, reading: ReadingSettings = READING
) -> Iterator[Example]:
    """Yield the examples of several sources, one after the other, with ids made unique by numbering repeats.

    Raises:
        CoterieError: as `load_examples`.
    """
    counts: dict[str, int] = {}
    taken: set[str] = set()
    for example in read_all(sources, limit, reading=reading):
        name = example.id
        while name in taken:  # also when some row's own id looks like a numbered repeat
            counts[example.id] = counts.get(example.id, 1) + 1
            name = f"{example.id}#{counts[example.id]}"
        taken.add(name)
        yield replace(example, id=name)


def load_all(sources: Sequence[str], limit: int | None = None, reading: ReadingSettings = READING) -> list[Example]:
    """Load what `read_named` yields.

    Raises:
        CoterieError: as `load_examples`.
    """
    return list(read_named(sources, limit, reading))


def spool_all(
    sources: Sequence[str], limit: int | None = None, reading: ReadingSettings = READING
) -> Sequence[Example]:
    """Read what `read_named` yields into a sequence that may be larger than memory.

    Raises:
        CoterieError: as `load_examples`.
    """
    return Spooled(_packed, _unpacked, read_named(sources, limit, reading))


def _packed(example: Example) -> bytes:
    return json.dumps(asdict(example), ensure_ascii=False).encode()


def _unpacked(written: bytes) -> Example:
    fields: dict[str, Any] = json.loads(written)
    messages = tuple(Message(**message) for message in fields.pop("messages"))
    answers = tuple(fields.pop("answers"))
    return Example(messages=messages, answers=answers, **fields)


def _to_example(
    row: object, place: str, default_id: str, need_response: bool, reading: ReadingSettings, columns: Columns
) -> Example:
    """Take one row in any of its forms; `place` names it in an error."""
    if not isinstance(row, Mapping):
        raise CoterieError(f"{place} holds a {type(row).__name__}, not an object with {FORMS}")
    fields = columns.called(filled(row, place, reading.ignored), row, place)
    blank = {str(name).strip().lower() for name, value in row.items() if is_missing(value)}
    blank |= {field for field, column in reading.columns.items() if column in blank}
    labels = {name: _label(fields, name, place) for name in ("id", "source", "category", "answer")}
    if labels["answer"] is not None:
        fields["answer"] = labels["answer"]  # the whole of which can be the response
        marked = ANSWER_MARK.search(labels["answer"])
        labels["answer"] = marked[1] if marked else labels["answer"]
    if blank & ASKS and not fields.keys() & ASKS:
        raise CoterieError(EMPTY.format(place=place, part="prompt"))
    messages = conversation_of(fields, place, reading)
    if blank & REPLIES and messages[-1].role != "assistant" and need_response:
        raise CoterieError(EMPTY.format(place=place, part="response"))
    if messages[-1].role != "assistant" and need_response:
        raise CoterieError(f"{place} has no response among {', '.join(fields):.300}; rows have the form {FORMS}{NAMED}")
    if not any(message.role == "user" for message in messages):
        raise CoterieError(f"{place} has no user message; rows have the form {FORMS}")
    for message in messages:
        if message.role != "system" and not message.content.strip():
            part = "response" if message.role == "assistant" else "prompt"
            raise CoterieError(EMPTY.format(place=place, part=part))
    if sum(len(message.content) for message in messages) > MAX_CHARACTERS:
        raise CoterieError(f"{place} has more than {MAX_CHARACTERS} characters of text; split or delete the row")
    example = Example(
        id=labels["id"] if labels["id"] is not None else default_id,
        messages=messages,
        source=labels["source"],
        category=labels["category"],
        answer=labels["answer"],
        answers=_answers(fields, place),
        tests=_tests(fields, place),
    )
    texts = (example.id, example.source, example.category, example.answer, *example.answers)
    _check_characters(place, *(message.content for message in messages), *(text or "" for text in texts))
    return example


def _label(row: Mapping[str, Any], name: str, place: str) -> str | None:
    """Return a label as a text; a number is one, and all else is refused."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or abs(value) == math.inf:
        got = value if isinstance(value, Real) else f"a {type(value).__name__}"
        raise CoterieError(
            f"{place}: {name} must be a text or a number, but is {got}; mend it, or pass over it with "
            f"--ignore-fields {name}"
        )
    return str(value)


def _check_characters(place: str, *texts: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer or file can take."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        raise CoterieError(f"{place} holds the half character {bad!r}; mend or delete it") from error


def _answers(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    value, mend = row.get("answers"), "; mend it, or pass over it with --ignore-fields answers"
    if value is None:
        return ()
    if not isinstance(value, list):
        raise CoterieError(f"{place}: answers must be a list of texts, but is a {type(value).__name__}{mend}")
    for answer in value:
        if not isinstance(answer, str):
            raise CoterieError(f"{place}: answers must be a list of texts, but holds a {type(answer).__name__}{mend}")
    return tuple(value) or ("",)


def _tests(row: Mapping[str, Any], place: str) -> Mapping[str, Any] | None:
    value = row.get("tests")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise CoterieError(
            f"{place}: tests must be an object, but is a {type(value).__name__}; mend it, or pass over it with "
            "--ignore-fields tests"
        )
    try:
        _check_depth(value, MAX_DEPTH)
        _check_characters(place, json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError) as error:  # rows in memory and tables can hold what JSON cannot
        raise CoterieError(f"{place}: tests must hold plain JSON ({error}); give texts, numbers and lists") from error
    return value


def _check_depth(value: object, depth: int) -> None:
    if depth < 0:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, depth - 1)
