"""How rows are read: which columns are which fields, what is passed over, and how an input joins its instruction."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from coterie.settings.reading import Settings, from_flat

INPUT_TEMPLATE = r"{instruction}\n\n{input}"
"""How a row's input or passage joins its instruction where nothing else is said; `\\n` stands for a new line."""


def _check_template(template: str | None) -> str | None:
    if template is not None and any(template.count(part) != 1 for part in ("{instruction}", "{input}")):
        raise ValueError("write {instruction} and {input} into it, each once")
    return template


def _check_map(written: list[str]) -> list[str]:
    fields = [pair.partition("=")[0].strip().lower() for pair in written]
    for pair in written:
        field, _, column = (part.strip() for part in pair.partition("="))
        if not (field and column):
            raise ValueError("write FIELD=COLUMN, such as response=output")
    if len(set(fields)) < len(fields):
        twice = next(field for field in fields if fields.count(field) > 1)
        raise ValueError(f"{twice} can be one column only; leave out the others")
    return written


class ReadingSettings(Settings):
    """Reading rows."""

    may_lack: ClassVar[bool] = False
    """Whether a source need not have the columns of the map: it is meant for other sources, too."""

    map: Annotated[
        list[str],
        BeforeValidator(lambda given: [f"{a}={b}" for a, b in given.items()] if isinstance(given, Mapping) else given),
        AfterValidator(_check_map),
    ] = Field(
        [],
        description="FIELD=COLUMN: the column that is a field under another name, such as response=output; a part of "
        "a column by dots, answers=answers.text; repeated; default: as the mixture was fitted",
    )
    ignore_fields: str | None = Field(
        None,
        description="fields to pass over, separated by commas: rows that bring something which would change the prompt "
        "or the loss and is not understood are refused otherwise",
    )
    input_template: Annotated[str | None, AfterValidator(_check_template)] = Field(
        None,
        description="how a row's input, context or passage joins its instruction, \\n for a new line; default: as the "
        rf"mixture was fitted, or {INPUT_TEMPLATE}",
    )

    def as_fitted(self, record: Mapping[str, Any]) -> "ReadingSettings":
        """Return these settings with the template and the columns of a mixture's record where they name none.

        Rows need not have the mixture's columns: they may have the fields themselves.

        Raises:
            CoterieError: when the record holds no template or columns.
        """
        template, columns = record.get("input_template"), record.get("map")
        found = {"ignore_fields": self.ignore_fields, "input_template": self.input_template or template}
        takes = bool(columns) and not self.map
        return from_flat(SharedReading if takes else type(self), {**found, "map": columns if takes else self.map})

    def record(self) -> dict[str, Any]:
        """Return what a mixture keeps of how its rows were read."""
        return {"input_template": self.input_template or INPUT_TEMPLATE, "map": self.map}

    @property
    def shared(self) -> "ReadingSettings":
        """The same for a source beside those that the map is meant for."""
        return SharedReading(**self.model_dump())

    @cached_property
    def columns(self) -> dict[str, str]:
        """The column of each field that has another name, both in lower case."""
        pairs = (pair.lower().partition("=") for pair in self.map)
        return {field.strip(): column.strip() for field, _, column in pairs}

    @cached_property
    def ignored(self) -> frozenset[str]:
        """The fields that are passed over, in lower case."""
        return frozenset(name.strip().lower() for name in (self.ignore_fields or "").split(","))

    @cached_property
    def template(self) -> str:
        """The template as it is filled in, with new lines."""
        return (self.input_template or INPUT_TEMPLATE).replace(r"\n", "\n")


class SharedReading(ReadingSettings):
    """Reading rows of which not all need have the columns of the map."""

    may_lack = True


READING = ReadingSettings()
"""Fields have their own names, every one counts, and inputs are joined as usual."""
