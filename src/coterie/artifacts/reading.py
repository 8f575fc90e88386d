"""Reading what may come from a stranger: regular files of bounded size, JSON and YAML without surprises."""

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from coterie.errors import CoterieError, first_line

MAX_JSON = 2**26  # bytes; what Python makes of them may take twenty times as much
MAX_YAML = 2**18  # bytes; a run's record has a few thousand, and this many take seconds
MAX_DEPTH = 64
MAX_INTEGER = 2**64
AGAIN = "get or make the file again"


def open_regular(path: Path, advice: str = "check the folder's name") -> BinaryIO:
    """Open a regular file for reading; a pipe, a device or a folder is neither waited for nor read.

    Raises:
        CoterieError: when it is missing, something else than a regular file, or cannot be read.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except FileNotFoundError as error:
        raise CoterieError(f"{path} does not exist; {advice}") from error
    except IsADirectoryError as error:
        raise CoterieError(f"{path} is a folder, not a file; {AGAIN}") from error
    except (OSError, ValueError) as error:
        raise CoterieError(f"{path} is not readable ({error}); {AGAIN}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CoterieError(f"{path} is not a regular file; {AGAIN}")
    return file


def read_text(path: Path, limit: int = MAX_JSON, advice: str = "check the folder's name") -> str:
    """Read a regular file of UTF-8 text; the advice is what to do when it is missing.

    Raises:
        CoterieError: when it is missing, not a regular file, has more than `limit` bytes, or is not UTF-8.
    """
    with open_regular(path, advice) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise CoterieError(f"{path} is not readable ({error}); {AGAIN}") from error
    if len(content) > limit:
        raise CoterieError(f"{path} has more than the {limit:,} bytes that are accepted; check the file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CoterieError(f"{path} is not readable: it is no UTF-8 text ({error.reason}); {AGAIN}") from error


def read_lines(path: Path, limit: int = MAX_JSON) -> Iterator[tuple[int, str]]:
    """Yield the lines of a regular file that are not empty, each with its number; they end at newlines only.

    Raises:
        CoterieError: as `read_text`; the limit is that of a line.
    """
    with open_regular(path) as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            if len(line) > limit:
                raise CoterieError(f"{path}, line {number} has more than the {limit:,} bytes that are accepted")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise CoterieError(f"{path}, line {number} is not readable: it is no UTF-8 text; {AGAIN}") from error
            if text.strip():
                yield number, text


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON object of up to `limit` bytes.

    Raises:
        CoterieError: when the file is missing, broken, or holds something else than an object.
    """
    return _object(parse_json(read_text(path, limit), str(path)), str(path))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line.

    Raises:
        CoterieError: when it is missing or broken.
    """
    places = ((f"{path}, line {number}", line) for number, line in read_lines(path))
    return [_object(parse_json(line, place), place) for place, line in places]


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CoterieError(f"{place} must hold a JSON object, but holds a {type(value).__name__}")
    return value


def parse_json(text: str, place: str, advice: str = AGAIN, *, lenient: bool = False) -> Any:
    """Read JSON whose numbers are finite, whose texts can be written again, and that is not nested too deeply.

    Args:
        text: the JSON.
        place: names the file in errors, and the line where it has several values.
        advice: what to do about it.
        lenient: read NaN and infinite numbers as null, and keep texts that cannot be written.

    Raises:
        CoterieError: when it is anything else.
    """

    def constant(name: str) -> None:
        if not lenient:
            raise ValueError(f"{name} is no number that JSON has")

    try:
        value = json.loads(text, parse_constant=constant)
        if not lenient and "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise CoterieError(f"{place} is too deeply nested; {advice}") from error
    except UnicodeEncodeError as error:
        raise CoterieError(f"{place} is not readable JSON (a text holds half a character); {advice}") from error
    except ValueError as error:
        raise CoterieError(f"{place} is not readable JSON ({first_line(error)}); {advice}") from error
    _check_values(value, place, advice)
    return value


class _Plain(yaml.SafeLoader):
    """Reads texts, numbers, lists and objects; nothing is named to be used again, and nothing is merged or tagged."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors and aliases are not read", event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(None, None, "tags are not read", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, "it is too deeply nested", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge") or key.value in keys:
                problem = "a key must be a text that stands once in its object"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, place: str, advice: str = AGAIN) -> Any:
    """Read YAML as far as JSON could say the same: no aliases, which can grow without end, no tags, no key twice.

    Raises:
        CoterieError: when it is anything else.
    """
    try:
        value = yaml.load(text, Loader=_Plain)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or first_line(error)
        raise CoterieError(f"{place}{line} is not readable YAML ({problem}); {advice}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise CoterieError(f"{place} is not readable YAML ({first_line(error)}); {advice}") from error
    _check_values(value, place, advice)
    return value


def _check_values(value: object, place: str, advice: str) -> None:
    """Refuse what is nested too deeply, numbers that are not finite or too large, and what JSON does not have."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, dict) and not all(isinstance(key, str) for key in one):
                raise CoterieError(f"{place} holds a key that is no text; put it in quotes")
            for item in one.values() if isinstance(one, dict) else one:
                if isinstance(item, dict | list):
                    deeper.append(item)
                elif not isinstance(item, str | int | float | None):
                    raise CoterieError(f"{place} holds {str(item)!r}, which is no text; put it in quotes")
                elif isinstance(item, int) and abs(item) > MAX_INTEGER:
                    raise CoterieError(f"{place} holds a number that is too large; {advice}")
                elif isinstance(item, float) and not math.isfinite(item):
                    raise CoterieError(f"{place} holds a number that is not finite; {advice}")
        level = deeper
        if not level:
            return
    raise CoterieError(f"{place} is too deeply nested; {advice}")
