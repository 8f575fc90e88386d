"""The records of an evaluation, read from its folder and checked; everything the page shows comes from here."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError

FORMAT = 1
OVERALL = "all"  # the source name of a table row that averages over all sources

# Control characters, text-direction overrides and halves of surrogate pairs: a page cannot show them, some disturb it.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_INFINITE = 1e300  # a whole number in JSON may be longer than any float
_COMMAND = "coterie eval MIXTURE --data test.jsonl --output"


@dataclass(frozen=True)
class Difference:
    """A method's paired difference to the control and its 95% interval, both in the measure's own unit."""

    value: float
    interval: tuple[float, float] | None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True)
class Score:
    """One method on one source, or on all rows: accuracy as a share of 1, NLL in nats a token."""

    method: str
    source: str
    rows: int
    graded: int
    accuracy: float | None
    accuracy_difference: Difference | None
    nll: float | None
    nll_difference: Difference | None


@dataclass(frozen=True)
class Answer:
    """What one method wrote for one row, and how it was graded (`correct` is None where it was not)."""

    method: str
    text: str | None
    correct: bool | None
    extracted: str | None
    nll: float | None
    cut: bool


@dataclass(frozen=True)
class Row:
    """One test row with every method's answer."""

    identifier: str
    source: str
    prompt: str
    reference: str
    weights: dict[str, float]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Evaluation:
    """The whole evaluation; names keep the order of the records."""

    mixture: str
    data: str
    control: str
    subject: str | None  # the method the mixture stands for, where the records tell
    methods: tuple[str, ...]
    experts: tuple[str, ...]
    sources: tuple[str, ...]
    base_model: dict[str, str]
    settings: dict[str, str]
    hardware: dict[str, str]
    clusters: dict[str, dict[str, float]]
    adjusted_rand_index: float | None
    routing: dict[str, dict[str, float]]
    seconds: dict[str, dict[str, float]]
    table: tuple[Score, ...]
    rows: tuple[Row, ...]

    def score(self, method: str, source: str = OVERALL) -> Score | None:
        """Find a table row; None where the records have none."""
        return next((row for row in self.table if (row.method, row.source) == (method, source)), None)


@dataclass(frozen=True)
class _Object:
    """A JSON object that knows where it stands, so that a bad field is reported with its place."""

    fields: dict[str, Any]
    place: str
    folder: Path

    def wrong(self, key: str, wanted: str) -> CoterieError:
        got = json.dumps(self.fields[key])[:60] if key in self.fields else "nothing"
        return _unusable(f"{self.place}: {key!r} should be {wanted}, got {got}", self.folder)

    def text(self, key: str) -> str:
        if not isinstance(self.fields.get(key), str):
            raise self.wrong(key, "a text")
        return self.fields[key]

    def text_or_none(self, key: str) -> str | None:
        return None if self.fields.get(key) is None else self.text(key)

    def count(self, key: str) -> int:
        value = self.fields.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(key, "a whole number")
        return value

    def number(self, key: str) -> float | None:
        value = self.fields.get(key)
        if value is None:
            return None
        if _is_number(value):
            return float(value) if _is_finite(value) else None
        raise self.wrong(key, "a number or null")

    def verdict(self, key: str) -> bool | None:
        value = self.fields.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.wrong(key, "true, false or null")

    def difference(self, measure: str) -> Difference | None:
        value, ends = self.number(f"{measure}_difference"), self.fields.get(f"{measure}_interval")
        if ends is None or value is None:
            return None if value is None else Difference(value, None)
        if not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_finite, ends)) and ends[0] <= ends[1]):
            raise self.wrong(f"{measure}_interval", "two numbers in order, or null")
        return Difference(value, (float(ends[0]), float(ends[1])))

    def names(self, key: str) -> tuple[str, ...]:
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "a list of names")
        return tuple(dict.fromkeys(value))

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.fields.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def inner(self, key: str) -> "_Object":
        return _Object(self.mapping(key), f"{self.place}, {key!r}", self.folder)

    def numbers(self, key: str) -> dict[str, float]:
        value = {name: 0 if number is None else number for name, number in self.mapping(key).items()}
        if not all(_is_finite(number) and number >= 0 for number in value.values()):
            raise self.wrong(key, "an object of numbers from 0 upwards")
        return {name: float(number) for name, number in value.items()}

    def grid(self, key: str) -> dict[str, dict[str, float]]:
        inner = self.inner(key)
        return {name: inner.numbers(name) for name in inner.fields}

    def facts(self, key: str) -> dict[str, str]:
        values = self.mapping(key).items()
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values}

    def objects(self, key: str) -> list["_Object"]:
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.wrong(key, "a list of objects")
        return [
            _Object(item, f"{self.place}, {key} {number}", self.folder) for number, item in enumerate(value, start=1)
        ]


def read_evaluation(folder: Path) -> Evaluation:
    """Read and check `evaluation.json` and `rows.jsonl` of an evaluation's folder.

    The mixture's own method is the one named `routed`; records without that entry are read as `_subject` says.

    Raises:
        CoterieError: when the folder or a file is missing, broken or of another format, or the two do not fit.
    """
    record = _read_head(folder)
    rows = tuple(_read_row(row) for row in _read_lines(folder))
    table = tuple(_read_score(row) for row in record.objects("table"))
    methods, control, mixture = record.names("methods"), record.text("control"), record.text("mixture")
    _check_that_all_fits(record, rows, [(control, "as control"), *((score.method, "in 'table'") for score in table)])
    return Evaluation(
        mixture=mixture,
        data=record.text("data"),
        control=control,
        subject=_subject(record.text_or_none("routed"), mixture, methods, control),
        methods=methods,
        experts=record.names("experts"),
        sources=record.names("sources"),
        base_model=record.facts("base_model"),
        settings=record.facts("settings"),
        hardware=record.facts("hardware"),
        clusters=record.grid("clusters"),
        adjusted_rand_index=record.inner("clustering").number("adjusted_rand_index"),
        routing=record.grid("routing"),
        seconds=record.grid("seconds"),
        table=table,
        rows=rows,
    )


def _check_that_all_fits(record: _Object, rows: Sequence[Row], named: Sequence[tuple[str, str]]) -> None:
    told, methods = record.count("rows"), record.names("methods")
    if told != len(rows):
        raise _unusable(
            f"{record.folder}/rows.jsonl holds {len(rows)} rows, evaluation.json tells of {told}", record.folder
        )
    for name, place in named:
        if name not in methods:
            raise _unusable(f"{record.place} names {name!r} {place}, but not in 'methods'", record.folder)


def _unusable(trouble: str, folder: Path) -> CoterieError:
    return CoterieError(f"{trouble}; make the records again with: {_COMMAND} {folder}")


def _subject(routed: str | None, mixture: str, methods: tuple[str, ...], control: str) -> str | None:
    """Tell which method the mixture stands for: as recorded, by its folder's name, or the only one there is."""
    others = [name for name in methods if name != control]
    folder_name = mixture.rstrip("/").rpartition("/")[2]
    only = others[0] if len(others) == 1 else None
    return next((name for name in (routed, folder_name, only) if name in others), None)


def _read_head(folder: Path) -> _Object:
    path = folder / "evaluation.json"
    record = _Object(_parse(_read_file(path), str(path), folder), str(path), folder)
    found = record.fields.get("format")
    if found != FORMAT or isinstance(found, bool):
        raise record.wrong("format", str(FORMAT))
    return record


def _read_lines(folder: Path) -> Iterator[_Object]:
    path = folder / "rows.jsonl"
    for number, line in enumerate(_read_file(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield _Object(_parse(line, place, folder), place, folder)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CoterieError(f"{path.parent} holds no {path.name}; make one with: {_COMMAND} {path.parent}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(f"{path} cannot be read: {error}", path.parent) from error


def _parse(text: str, place: str, folder: Path) -> dict[str, Any]:
    try:
        value = _printable(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise _unusable(f"{place}: this is not JSON ({error})", folder) from error
    if not isinstance(value, dict):
        raise _unusable(f"{place}: a JSON object is wanted, got {type(value).__name__}", folder)
    return value


def _printable(value: object) -> object:
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return value


def _read_score(row: _Object) -> Score:
    return Score(
        method=row.text("method"),
        source=row.text("source"),
        rows=row.count("rows"),
        graded=row.count("graded"),
        accuracy=row.number("accuracy"),
        accuracy_difference=row.difference("accuracy"),
        nll=row.number("nll"),
        nll_difference=row.difference("nll"),
    )


def _read_row(row: _Object) -> Row:
    answers = _Object(row.mapping("methods"), row.place, row.folder)
    return Row(
        identifier=row.text_or_none("id") or "",
        source=row.text_or_none("source") or "",
        prompt=row.text("prompt"),
        reference=row.text_or_none("reference") or "",
        weights=row.numbers("weights"),
        answers=tuple(_read_answer(name, answers) for name in answers.fields),
    )


def _read_answer(method: str, answers: _Object) -> Answer:
    record = answers.inner(method)
    return Answer(
        method=method,
        text=record.text_or_none("text"),
        correct=record.verdict("correct"),
        extracted=record.text_or_none("extracted"),
        nll=record.number("nll"),
        cut=record.text_or_none("finish_reason") == "length",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and _is_number(value) and abs(value) < _INFINITE
