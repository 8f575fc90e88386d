"""Settings in their three forms: an object, flat flags with plain names, groups in YAML."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from coterie.errors import CoterieError, unknown_name
from coterie.settings.old_spellings import current_names


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    command: ClassVar[str] = ""
    """The command that these are the settings of; a group belongs to none."""
    idle_with: ClassVar[Mapping[str, tuple[str, tuple[Any, ...]]]] = {}
    """Fields that do not act while another one has one of these values."""

    @model_validator(mode="before")
    @classmethod
    def _one_text_is_a_list_of_one(cls, values: object) -> object:
        if not isinstance(values, Mapping):
            return values
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        return {k: [v] if k in lists and isinstance(v, str) else v for k, v in values.items()}


AnySettings = TypeVar("AnySettings", bound=Settings)

FLAGS = {"target": "--for", "target_rows": "--target"}
"""Settings whose flag is a word that Python keeps to itself."""


def flag_of(name: str) -> str:
    """Return a setting's flag."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def flat_fields(kind: type[Settings], title: str | None = None) -> Iterator[tuple[str, FieldInfo, str | None]]:
    """Yield every field with its plain name and the title of its group, groups opened up."""
    for name, field in kind.model_fields.items():
        group = _group(field)
        if group is None:
            yield name, field, title
        else:
            first_line = (group.__doc__ or "").partition("\n")[0].removesuffix(".")
            yield from flat_fields(group, field.title or first_line)


def from_flat(kind: type[AnySettings], values: Mapping[str, Any], beside: Iterable[str] = ()) -> AnySettings:
    """Build settings that a user asks for from plain names, putting each into its group.

    Args:
        kind: of the settings.
        values: by plain name.
        beside: other names that the caller takes, which an unknown one may be meant for.

    Raises:
        CoterieError: for an unknown name, a value that does not fit, or one that would not act, naming the field, its
            value and the reason.
    """
    built = _built(kind, values, beside)
    _check_acting(built)
    return built


def changed(settings: Settings) -> list[str]:
    """Return the fields that have another value than the default, as flags."""
    fields = type(settings).model_fields
    return [flag_of(name) for name, value in settings if value != fields[name].default]


def _check_acting(settings: Settings) -> None:
    """Refuse a value that another one keeps from acting: whoever gives it expects something of it."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            _check_acting(value)
        elif name in settings.idle_with and value != field.default:
            other, idle = settings.idle_with[name]
            if (held := getattr(settings, other)) in idle:
                reason = f"with {flag_of(other)} {held}" if held else f"without {flag_of(other)}"
                raise CoterieError(
                    f"{flag_of(name)} {value} does not act {reason}; leave it out, or change {flag_of(other)}"
                )


def _built(kind: type[AnySettings], values: Mapping[str, Any], beside: Iterable[str] = ()) -> AnySettings:
    values = current_names(kind.command, values)
    known = [name for name, _, _ in flat_fields(kind)]
    for name in values:
        if name not in known:
            raise unknown_name("setting", name, [*known, *beside])
    try:
        return kind(**_grouped(kind, values))
    except ValidationError as error:
        first = error.errors()[0]
        names = [part for part in first["loc"] if isinstance(part, str)]  # a number is a place in a list
        flag = flag_of(names[-1] if names else "settings")
        given = "" if first["type"] == "missing" else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise CoterieError(f"{flag}: {message[:1].lower()}{message[1:]}{given}") from error


def checked(kind: type[AnySettings], values: Mapping[str, Any]) -> AnySettings:
    """Build settings from grouped values, as they stand in a YAML file or a run's record, whatever the groups' names.

    Raises:
        CoterieError: for an unknown name or a value that does not fit.
    """
    return _built(kind, flat_values(values))


def flat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Open up the groups of settings as they stand in a record; None stands for a default."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flat_values(value) if isinstance(value, Mapping) else {} if value is None else {name: value}
    return flat


def values_of(settings: Settings, but: Iterable[str] = ()) -> dict[str, Any]:
    """Return the values of settings by plain name, as JSON holds them, but for some; None stands for a default."""
    flat = flat_values(settings.model_dump(mode="json"))
    return {name: value for name, value in flat.items() if name not in but}


def _group(field: FieldInfo) -> type[Settings] | None:
    """Return which group a field holds, also one that may be left out."""
    kinds = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), None)


def _grouped(kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        group = _group(field)
        if group is None and name in values:
            result[name] = values[name]
        elif group is not None and (inner := _grouped(group, values)):
            result[name] = inner
        elif group is not None and field.is_required():
            result[name] = {}
    return result
