"""Settings by their names: what takes a settings object also takes its fields, and lists of names in any form."""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from os import PathLike, fspath
from typing import Any, TypeVar

from coterie.settings.reading import Settings, flat_fields, from_flat

Result = TypeVar("Result")


def names_in(given: str | Iterable[str]) -> list[str]:
    """Return names, each once, from a list or from one text with commas between them."""
    return list(dict.fromkeys(map(str.strip, given.split(",")) if isinstance(given, str) else given))


def takes_fields(kind: type[Settings]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function whose first argument is a settings object take the settings' plain names in its place.

    What comes first is then the first field that has to be given: `load_backbone("smollm2-135m", device="cpu")`.
    """
    names = [name for name, _, _ in flat_fields(kind)]
    required = [name for name, field, _ in flat_fields(kind) if field.is_required() and name != "output"]
    first = [*required, *names][0]

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        own = list(inspect.signature(function).parameters)[1:]

        @wraps(function)
        def call(*given: Any, **named: Any) -> Result:  # noqa: ANN401 - of the function, or fields of its settings
            if "settings" in named or (given and isinstance(given[0], Settings)):
                return function(*given, **named)
            others = {name: named.pop(name) for name in own if name in named}
            values = {first: given[0], **named} if given else named
            settings = from_flat(kind, {name: _plain(value) for name, value in values.items()}, own)
            return function(settings, *given[1:], **others)

        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nInstead of settings: {first}, ..., by name.\n"
        return call

    return decorate


def _plain(value: object) -> object:
    """Write paths as texts, and several of them, as settings hold them."""
    if isinstance(value, PathLike):
        return fspath(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
