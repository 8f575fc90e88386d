"""Columns of any name, called as the fields that they are: `--map response=output --map answers=answers.text`."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any

from coterie.data.forms import LABELS, SPOKEN, holds, is_missing
from coterie.errors import CoterieError, check_known, unknown_name
from coterie.settings.rows import ReadingSettings

logger = logging.getLogger(__name__)

FIELDS = sorted({*SPOKEN, *LABELS})
"""What a column can be."""
NAMES_SHOWN, NAMES_DEEP = 100, 2


class Columns:
    """The columns that are fields under other names, and which of them no row had yet."""

    def __init__(self, reading: ReadingSettings) -> None:
        """Start a source, or several that are read as one.

        Raises:
            CoterieError: for a field that rows do not have.
        """
        for field in reading.columns:
            check_known("field of rows", field, FIELDS)
        self._of = reading.columns
        self._may_lack = reading.may_lack
        self._lacking = dict(self._of)
        self._names: dict[str, str] = {}

    def called(self, fields: Mapping[str, Any], row: Mapping[Any, Any], place: str) -> dict[str, Any]:
        """Return a row's fields with its columns called as the fields that they are.

        A column of which only a part is taken counts as read. Numbers are texts here, as they are in labels.

        Args:
            fields: what the row holds, by names in lower case.
            row: the row as it was written, with what it has no value for.
            place: names the row in an error.

        Raises:
            CoterieError: when the row has the field, too.
        """
        taken = {column if column in fields else column.partition(".")[0] for column in self._of.values()}
        result = {name: value for name, value in fields.items() if name not in taken}
        for field, column in self._of.items():
            try:
                value = _part(fields, [column] if column in fields else column.split("."))
            except LookupError:
                continue
            if holds(result, field):
                raise CoterieError(
                    f"{place} has {field} and {column}, which --map {field}={column} takes for it; leave that out, or "
                    f"pass over the other with --ignore-fields {field}"
                )
            self._lacking.pop(field, None)
            if not is_missing(value):
                result[field] = str(value) if isinstance(value, Real) and not isinstance(value, bool) else value
        if self._lacking:
            self._names |= {name.lower(): name for name in _names(row)}
            self._lacking = {field: column for field, column in self._lacking.items() if column not in self._names}
        return result

    def lacks(self) -> str:
        """Tell of the first column that no row had; empty where there is none."""
        for field, column in self._lacking.items():
            told = unknown_name("column", column, list(self._names.values())[:NAMES_SHOWN])
            return f"--map {field}={column}: {told}"
        return ""

    def check(self, source: object) -> None:
        """Refuse, or where other sources have it tell of, a column that no row had.

        Raises:
            CoterieError: naming the columns that there are.
        """
        if lacks := self.lacks():
            if not self._may_lack:
                raise CoterieError(f"{source}: {lacks}")
            _tell(f"{source} is read without {lacks}")


@cache
def _tell(line: str) -> None:
    """Log a line once, however often a source is read."""
    logger.info("%s", line)


def _part(value: object, path: Sequence[str]) -> Any:  # noqa: ANN401 - whatever stands there
    """Return what stands at a path: in an object by name, in a list by number, or else the part of each item.

    Raises:
        LookupError: when nothing does.
    """
    if not path:
        return value
    if isinstance(value, Mapping):
        return _part({str(name).strip().lower(): inner for name, inner in value.items()}[path[0]], path[1:])
    if isinstance(value, list | tuple):
        one = value[int(path[0])] if path[0].isdecimal() else [_part(item, path[:1]) for item in value]
        return _part(one, path[1:])
    raise LookupError(path[0])


def _names(value: object, front: str = "") -> Iterator[str]:
    """Yield the names of an object, and behind a dot those in it."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    for name, inner in value.items() if isinstance(value, Mapping) else ():
        written = front + str(name).strip()
        yield written
        if front.count(".") < NAMES_DEEP:
            yield from _names(inner, f"{written}.")
