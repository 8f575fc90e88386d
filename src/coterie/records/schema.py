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

from coterie.artifacts import parse_json, read_json, read_lines
from coterie.errors import CoterieError

LONGEST_NAME = 200  # bytes; file systems take 255, and something is added to some names


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
        fields = cls.model_fields.items()
        filled = {name for name, field in fields if not field.is_required() and field.default is not None}
        return {name: value for name, value in values.items() if value is not None or name not in filled}

    def plain(self) -> dict[str, Any]:
        """Return the fields that were set, as plain values."""
        return self.model_dump(mode="json", exclude_unset=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse(kind: type[AnyRecord], values: object, place: str, advice: str) -> AnyRecord:
    """Build a record from the values of a file; `place` names the file, and the line where it has several records.

    Raises:
        CoterieError: for the first wrong field: its place, what is wanted, what it is, and the advice what to do.
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


def read_rows(kind: type[AnyRecord], path: Path, advice: str) -> tuple[AnyRecord, ...]:
    """Read a JSONL file that holds one record a line.

    Raises:
        CoterieError: when it is missing or broken; see `parse`.
    """
    places = ((f"{path}, line {number}", line) for number, line in read_lines(path))
    return tuple(parse(kind, parse_json(line, place, advice), place, advice) for place, line in places)


def _in_order(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("should be two numbers in order, or null")
    return ends


def _nothing_for_null(value: object) -> object:
    """Read null as 0, and leave entries out that are null."""
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if v is not None}
    return 0 if value is None else value


def is_folder_name(name: str) -> bool:
    """Tell whether a name from a file can be that of a folder or file in the folder that it is meant for.

    It is shown, too, so that nothing in it acts on a terminal.
    """
    plain = name.isprintable() and name == Path(name).name and not name.startswith(".")
    return bool(name) and plain and len(name.encode()) <= LONGEST_NAME


def _check_folder_name(name: str) -> str:
    if not is_folder_name(name):
        raise ValueError("should be a plain name of letters, digits, '-' and '_'")
    return name


Count = Annotated[int, Field(strict=True, ge=0)]
Position = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Number = Position | None
"""A number, None where it is not known."""
Weight = Annotated[Position, Field(ge=0)]
Amount = Annotated[Weight, BeforeValidator(_nothing_for_null)]
Interval = Annotated[tuple[Position, Position], AfterValidator(_in_order)]
Rank = Annotated[Number, PlainSerializer(int, when_used="unless-none")]
"""A whole number among others that need not be, None where it is not known."""
Texts = tuple[StrictStr, ...]
Names = Annotated[Texts, AfterValidator(lambda names: tuple(dict.fromkeys(names)))]
"""Names, each once."""
FolderName = Annotated[StrictStr, AfterValidator(_check_folder_name)]
FolderNames = Annotated[tuple[FolderName, ...], AfterValidator(lambda names: tuple(dict.fromkeys(names)))]
"""Names of folders or files, each once."""
Amounts = dict[str, Amount]
Whole = Annotated[Weight, PlainSerializer(int)]
"""A whole number from 0 upwards that is read as a number like others."""
Counts = Annotated[dict[str, Whole], BeforeValidator(_nothing_for_null)]
"""Whole numbers by name, without those that are null."""
KnownAmounts = Annotated[Amounts, BeforeValidator(_nothing_for_null)]
"""Numbers by name, without those that are null."""
Grid = dict[str, Amounts]
Facts = dict[str, Any]
