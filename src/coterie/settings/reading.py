"""Settings in their three forms: an object, flat flags with plain names, groups in YAML."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from coterie.errors import CoterieError, unknown_name


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


AnySettings = TypeVar("AnySettings", bound=Settings)


def flat_fields(kind: type[Settings]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every field with its plain name, groups opened up."""
    for name, field in kind.model_fields.items():
        group = _group(field)
        if group is None:
            yield name, field
        else:
            yield from flat_fields(group)


def from_flat(kind: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Build settings from plain names, putting each into its group.

    Raises:
        CoterieError: for an unknown name or a value that does not fit, naming the field, its value and the reason.
    """
    known = [name for name, _ in flat_fields(kind)]
    for name in values:
        if name not in known:
            raise unknown_name("setting", name, known)
    return checked(kind, _grouped(kind, values))


def checked(kind: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Build settings from grouped values, as they stand in a YAML file.

    Raises:
        CoterieError: for an unknown name or a value that does not fit.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][-1]).replace("_", "-") if first["loc"] else "settings"
        given = "" if first["type"] == "missing" else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise CoterieError(f"--{name}: {message[:1].lower()}{message[1:]}{given}") from error


def _group(field: FieldInfo) -> type[Settings] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _grouped(kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        group = _group(field)
        if group is not None:
            result[name] = _grouped(group, values)
        elif name in values:
            result[name] = values[name]
    return result
