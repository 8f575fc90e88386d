"""What all records share: frozen pydantic models with strict fields; an error in one line names file and place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictStr,
    ValidationError,
    model_validator,
)

from coterie.artifacts import read_json
from coterie.errors import CoterieError

_LARGEST = 1e300  # a whole number in JSON may be longer than any float


class Record(BaseModel):
    """An object of a record's file.

    Readers build it from JSON: a field that is null has its default, and unknown fields are passed over. Writers build
    it field by field, and only what they set is written.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        filled = {
            name for name, field in cls.model_fields.items() if not field.is_required() and field.default is not None
        }
        return {name: value for name, value in values.items() if value is not None or name not in filled}

    def plain(self) -> dict[str, Any]:
        """Return the fields that were set, as plain values."""
        return self.model_dump(mode="json", exclude_unset=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse(kind: type[AnyRecord], values: object, place: str, advice: str) -> AnyRecord:
    """Build a record from the values of a file.

    Args:
        kind: what to build.
        values: as JSON gives them.
        place: names the file, and the line where it has several records.
        advice: what to do about a broken record.

    Raises:
        CoterieError: for the first wrong field, naming its place, what is wanted, and what it is.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f" {key + 1}" if isinstance(key, int) else f", {key!r}" for key in first["loc"])
        wanted = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        lacks = first["type"] == "missing"
        got = "got nothing" if lacks else f"got {json.dumps(first['input'], default=repr)[:60]}"
        raise CoterieError(f"{place}{where}: {'is missing' if lacks else wanted}, {got}; {advice}") from error


def read(kind: type[AnyRecord], path: Path, advice: str) -> AnyRecord:
    """Read a JSON file that holds one record.

    Raises:
        CoterieError: when it is missing or broken; see `parse`.
    """
    return parse(kind, read_json(path), str(path), advice)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError("should be a number or null")
    if value is not None and not abs(value) < _LARGEST:
        raise ValueError("should be a finite number or null")
    return None if value is None else float(value)


def _position(value: object) -> float:
    if (number := _number(value)) is None:
        raise ValueError("should be a number")
    return number


def _weight(value: object) -> float:
    if (number := _number(value)) is None or number < 0:
        raise ValueError("should be a number from 0 upwards")
    return number


def _amount(value: object) -> float:
    return _weight(0 if value is None else value)


def _interval(value: object) -> tuple[float, float]:
    low, high = map(_position, value) if isinstance(value, list | tuple) and len(value) == 2 else (1.0, 0.0)
    if low > high:
        raise ValueError("should be two numbers in order, or null")
    return low, high


def _without_nulls(value: object) -> object:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


Count = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float | None, BeforeValidator(_number)]
"""A number, None where it is not known."""
Position = Annotated[float, BeforeValidator(_position)]
Weight = Annotated[float, BeforeValidator(_weight)]
"""A number from 0 upwards."""
Amount = Annotated[float, BeforeValidator(_amount)]
"""A number from 0 upwards; null is 0."""
Interval = Annotated[tuple[float, float], BeforeValidator(_interval)]
Rank = Annotated[Number, PlainSerializer(_whole)]
"""A whole number among others that need not be, None where it is not known."""
Texts = tuple[StrictStr, ...]
Names = Annotated[Texts, AfterValidator(lambda names: tuple(dict.fromkeys(names)))]
"""Names, each once."""
Amounts = dict[str, Amount]
Whole = Annotated[Weight, PlainSerializer(_whole)]
"""A whole number from 0 upwards that is read as a number like others."""
Counts = Annotated[dict[str, Whole], BeforeValidator(_without_nulls)]
"""Whole numbers by name, without those that are null."""
KnownAmounts = Annotated[Amounts, BeforeValidator(_without_nulls)]
"""Numbers by name, without those that are null."""
Grid = dict[str, Amounts]
Facts = dict[str, Any]
