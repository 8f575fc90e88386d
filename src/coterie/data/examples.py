"""Examples in one form, whatever form their rows had."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError, first_line, missing_extra

ROLES = ("system", "user", "assistant")
FORMS = "instruction+response, prompt+completion, or messages"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


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
    source: str | Path | Iterable[Mapping[str, Any]], limit: int | None = None, *, need_response: bool = True
) -> list[Example]:
    """Load examples from a JSONL file, any `datasets` source, or rows in memory.

    A string that is no `.jsonl` file is given to the `datasets` library: a json, csv or parquet file, a folder made by
    `save_to_disk`, or a hub data set as `name` or `name:split` (`train` by default).

    Args:
        source: where the rows are; every row has one of the forms instruction+response, prompt+completion, messages,
            and optionally id, source, category, answer, answers, tests.
        limit: use only the first rows.
        need_response: whether a row without an answer is an error.

    Raises:
        CoterieError: naming the file and line of the first bad row, or telling that there are no rows.
    """
    return list(read_examples(source, limit, need_response=need_response))


def read_examples(
    source: str | Path | Iterable[Mapping[str, Any]], limit: int | None = None, *, need_response: bool = True
) -> Iterator[Example]:
    """Yield the examples of a source one by one; as `load_examples`, which holds them all.

    Raises:
        CoterieError: as `load_examples`.
    """
    rows: Iterable[tuple[str, Mapping[str, Any]]]  # each with the place to name in an error
    if not isinstance(source, (str, Path)):
        rows = ((f"row {number} of the data", row) for number, row in enumerate(source, start=1))
    elif str(source).endswith(".jsonl"):
        rows = _jsonl_rows(Path(source))
    else:
        loaded = _datasets_rows(str(source))
        rows = ((f"{source}, row {number}", row) for number, row in enumerate(loaded, start=1))
    number = -1
    for number, (place, row) in enumerate(islice(rows, limit)):
        yield _to_example(row, place, str(number), need_response)
    if number < 0:
        name = source if isinstance(source, (str, Path)) else "the data"
        raise CoterieError(f"{name} holds no examples; rows have the form {FORMS}")


def load_all(sources: Sequence[str], limit: int | None = None) -> list[Example]:
    """Load several sources one after the other, and make ids unique by numbering repeats.

    Raises:
        CoterieError: as `load_examples`.
    """
    counts: dict[str, int] = {}
    taken: set[str] = set()
    result = []
    for example in (example for source in sources for example in load_examples(source, limit)):
        name = example.id
        while name in taken:  # also when some row's own id looks like a numbered repeat
            counts[example.id] = counts.get(example.id, 1) + 1
            name = f"{example.id}#{counts[example.id]}"
        taken.add(name)
        result.append(replace(example, id=name))
    return result


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not path.is_file():
        raise CoterieError(f"{path} does not exist; give a JSONL file or a datasets source")
    with path.open("rb") as file:  # lines of bytes end at newlines only; wrong bytes are told with their line
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CoterieError(
                    f"{path}, line {number} is not valid JSON ({error}); mend or delete the line"
                ) from error
            if not isinstance(row, dict):
                raise CoterieError(f"{path}, line {number} holds a {type(row).__name__}, not an object with {FORMS}")
            yield f"{path}, line {number}", row


def _datasets_rows(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "data") from error
    path = Path(source)
    builders = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
    try:
        if path.is_dir():
            loaded: Any = datasets.load_from_disk(path)  # a Dataset, or a dict of them by split
            if isinstance(loaded, dict) and "train" not in loaded:
                raise ValueError(f"the folder has the splits {', '.join(loaded)} and no train; save one on its own")
            return loaded["train"] if isinstance(loaded, dict) else loaded
        if path.suffix in builders and path.is_file():
            return datasets.load_dataset(builders[path.suffix], data_files=str(path), split="train")
        name, _, split = source.partition(":")
        if path.suffix in builders or name.count("/") > 1 or name.startswith((".", "/")):
            raise FileNotFoundError(f"there is no such file or folder: {source}")
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises many kinds; all of them mean that the source cannot be had
        raise CoterieError(
            f"{source} cannot be loaded ({first_line(error)}); give a JSONL file or a datasets source"
        ) from error


def _to_example(row: Mapping[str, Any], place: str, default_id: str, need_response: bool) -> Example:
    """Take one row in any of its forms; `place` names it in an error."""
    messages = _messages(row, place)
    if messages[-1].role != "assistant" and need_response:
        raise CoterieError(f"{place} has no response; rows have the form {FORMS}")
    if not any(message.role == "user" for message in messages):
        raise CoterieError(f"{place} has no user message; rows have the form {FORMS}")
    for message in messages:
        if message.role != "system" and not message.content.strip():
            part = "response" if message.role == "assistant" else "prompt"
            raise CoterieError(f"{place} has an empty {part}; fill it in or delete the row")
    source, category, answer = (
        None if row.get(field) is None else str(row[field]) for field in ("source", "category", "answer")
    )
    example = Example(
        id=str(row["id"]) if row.get("id") is not None else default_id,
        messages=messages,
        source=source,
        category=category,
        answer=answer,
        answers=_answers(row, place),
        tests=_tests(row, place),
    )
    labels = (example.id, example.source, example.category, example.answer, *example.answers)
    _check_characters(place, *(message.content for message in messages), *(label or "" for label in labels))
    return example


def _check_characters(place: str, *texts: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer or file can take."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        raise CoterieError(f"{place} holds the half character {bad!r}; mend or delete it") from error


def _answers(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    value = row.get("answers")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise CoterieError(f"{place}: answers must be a list of texts, but is a {type(value).__name__}")
    for answer in value:
        if not isinstance(answer, str):
            raise CoterieError(f"{place}: answers must be a list of texts, but holds a {type(answer).__name__}")
    return tuple(value) or ("",)


def _tests(row: Mapping[str, Any], place: str) -> Mapping[str, Any] | None:
    value = row.get("tests")
    if value is None:
        return None
    if not isinstance(value, dict):
        raise CoterieError(f"{place}: tests must be an object, but is a {type(value).__name__}")
    try:
        _check_characters(place, json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:  # rows in memory and tables can hold what JSON cannot
        raise CoterieError(f"{place}: tests must hold plain JSON ({error}); give texts, numbers and lists") from error
    return value


def _messages(row: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    if row.get("messages") is not None:  # tables fill in what a row lacks with nulls
        return _turns(row["messages"], place)
    for question, reply in (("instruction", "response"), ("prompt", "completion")):
        if row.get(question) is None:
            continue
        turns: list[Message] = []
        for part, role in ((question, "user"), (reply, "assistant")):
            value = row.get(part)
            if isinstance(value, str):
                turns.append(Message(role, value))
            elif isinstance(value, list):  # of messages, as some prompt+completion data has it
                turns += _turns(value, place)
            elif value is not None:
                raise CoterieError(f"{place}: {part} must be a text, but is a {type(value).__name__}")
        return tuple(turns)
    filled = ", ".join(str(field) for field, value in row.items() if value is not None)
    raise CoterieError(f"{place} has the fields {filled or '(none)'}; rows have the form {FORMS}")


def _turns(value: object, place: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise CoterieError(f"{place}: messages must be a list of {{role, content}}, got {got}")
    turns = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise CoterieError(f"{place}: every message needs a role ({', '.join(ROLES)}) and a text as content")
        turns.append(Message(role, content))
    return tuple(turns)
