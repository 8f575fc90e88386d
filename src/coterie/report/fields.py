"""Fields of a record from a stranger: each is checked when it is read, and a wrong one is reported with its place."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.report.records import Difference

COMMAND = "coterie eval MIXTURE --data test.jsonl --output"
_INFINITE = 1e300  # a whole number in JSON may be longer than any float


def unusable(trouble: str, folder: Path) -> CoterieError:
    """Make the error that names the trouble and the command that writes the records anew."""
    return CoterieError(f"{trouble}; make the records again with: {COMMAND} {folder}")


@dataclass(frozen=True)
class Record:
    """A JSON object that knows where it stands, so that a bad field is reported with its place.

    Every reading method raises CoterieError when the field is not of its kind.
    """

    fields: dict[str, Any]
    place: str
    folder: Path

    def wrong(self, key: str, wanted: str) -> CoterieError:
        """Make the error that says what a field should be and what it is."""
        got = json.dumps(self.fields[key])[:60] if key in self.fields else "nothing"
        return unusable(f"{self.place}: {key!r} should be {wanted}, got {got}", self.folder)

    def text(self, key: str) -> str:
        """Read a text."""
        if not isinstance(self.fields.get(key), str):
            raise self.wrong(key, "a text")
        return self.fields[key]

    def text_or_none(self, key: str) -> str | None:
        """Read a text that may be missing."""
        return None if self.fields.get(key) is None else self.text(key)

    def count(self, key: str) -> int:
        """Read a whole number from 0 upwards."""
        value = self.fields.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(key, "a whole number")
        return value

    def number(self, key: str) -> float | None:
        """Read a number; a missing, infinite or undefined one is None."""
        value = self.fields.get(key)
        if value is None:
            return None
        if _is_number(value):
            return float(value) if _is_finite(value) else None
        raise self.wrong(key, "a number or null")

    def count_or_none(self, key: str) -> int | None:
        """Read a whole number from 0 upwards that may be missing."""
        return None if self.fields.get(key) is None else self.count(key)

    def position(self, key: str) -> float:
        """Read a number that has to be there."""
        if (value := self.number(key)) is None:
            raise self.wrong(key, "a number")
        return value

    def verdict(self, key: str) -> bool | None:
        """Read true, false or nothing."""
        value = self.fields.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self.wrong(key, "true, false or null")

    def interval(self, key: str) -> tuple[float, float] | None:
        """Read the two ends of an interval, or nothing."""
        ends = self.fields.get(key)
        if ends is None:
            return None
        if not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_finite, ends)) and ends[0] <= ends[1]):
            raise self.wrong(key, "two numbers in order, or null")
        return float(ends[0]), float(ends[1])

    def difference(self, measure: str) -> Difference | None:
        """Read the difference of a measure to the control, with its interval and adjusted p where there are any."""
        value = self.number(f"{measure}_difference")
        interval, p = self.interval(f"{measure}_interval"), self.number(f"{measure}_p")
        return None if value is None else Difference(value, interval, p)

    def names(self, key: str) -> tuple[str, ...]:
        """Read a list of names, each once."""
        return tuple(dict.fromkeys(self.texts(key)))

    def texts(self, key: str) -> tuple[str, ...]:
        """Read a list of texts."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "a list of names")
        return tuple(value)

    def labels(self, key: str) -> tuple[str, ...]:
        """Read a list of labels, which are texts or whole numbers."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(label, str | int) for label in value):
            raise self.wrong(key, "a list of labels")
        return tuple(map(str, value))

    def numbers_or_none(self, key: str) -> tuple[float | None, ...]:
        """Read a list of numbers, of which some may be missing."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(number is None or _is_number(number) for number in value):
            raise self.wrong(key, "a list of numbers")
        return tuple(float(number) if _is_finite(number) else None for number in value)

    def number_rows(self, key: str, width: int) -> tuple[tuple[float, ...], ...]:
        """Read a list of rows of `width` numbers from 0 upwards."""
        rows = self.fields.get(key)
        if not isinstance(rows, list) or not all(_is_row(row, width) for row in rows):
            raise self.wrong(key, f"a list of rows of {width} numbers from 0 upwards")
        return tuple(tuple(map(float, row)) for row in rows)

    def number_row(self, key: str, width: int) -> tuple[float, ...]:
        """Read a list of `width` numbers from 0 upwards."""
        row = self.fields.get(key)
        if not isinstance(row, list) or not _is_row(row, width):
            raise self.wrong(key, f"a list of {width} numbers from 0 upwards")
        return tuple(map(float, row))

    def mapping(self, key: str) -> dict[str, Any]:
        """Read an object; a missing one is empty."""
        value = self.fields.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value

    def inner(self, key: str) -> "Record":
        """Read an object as a record of its own."""
        return Record(self.mapping(key), f"{self.place}, {key!r}", self.folder)

    def numbers(self, key: str) -> dict[str, float]:
        """Read an object of numbers from 0 upwards; a missing number is 0."""
        value = {name: 0 if number is None else number for name, number in self.mapping(key).items()}
        if not all(_is_finite(number) and number >= 0 for number in value.values()):
            raise self.wrong(key, "an object of numbers from 0 upwards")
        return {name: float(number) for name, number in value.items()}

    def known_numbers(self, key: str) -> dict[str, float]:
        """Read an object of numbers from 0 upwards and leave out the missing ones."""
        given = self.mapping(key)
        return {name: number for name, number in self.numbers(key).items() if given[name] is not None}

    def numbers_among(self, key: str) -> dict[str, float]:
        """Read the numbers of an object that holds other things too."""
        return {name: float(value) for name, value in self.mapping(key).items() if _is_finite(value)}

    def grid(self, key: str) -> dict[str, dict[str, float]]:
        """Read an object of objects of numbers."""
        inner = self.inner(key)
        return {name: inner.numbers(name) for name in inner.fields}

    def facts(self, key: str) -> dict[str, str]:
        """Read an object, each value written as one text."""
        values = self.mapping(key).items()
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values}

    def objects(self, key: str) -> list["Record"]:
        """Read a list of objects as records of their own."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.wrong(key, "a list of objects")
        return [
            Record(item, f"{self.place}, {key} {number}", self.folder) for number, item in enumerate(value, start=1)
        ]

    def objects_if_any(self, key: str) -> list["Record"]:
        """Read a list of objects; a missing one is empty."""
        return self.objects(key) if self.has(key) else []

    def has(self, key: str) -> bool:
        """Tell whether the field is there and not null."""
        return self.fields.get(key) is not None


def _is_row(value: object, width: int) -> bool:
    return isinstance(value, list) and len(value) == width and all(_is_finite(n) and n >= 0 for n in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and _is_number(value) and abs(value) < _INFINITE
