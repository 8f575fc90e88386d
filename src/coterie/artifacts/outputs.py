"""Files that a user names to be written: never written over unasked; pipes and devices are written to as they are."""

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coterie.artifacts.files import as_path, disk_errors, write_jsonl
from coterie.errors import CoterieError
from coterie.settings.places import sources
from coterie.settings.reading import Settings


def inputs_of(settings: Settings) -> list[Path]:
    """Return the files and folders that a command reads; NAME=SOURCE stands for its source."""
    named = (text for given in sources(settings).values() for text in given)
    texts = (part for text in named for part in (text, text.partition("=")[2]) if part)
    return [path for path in map(as_path, texts) if os.path.exists(path)]


def is_stream(path: Path) -> bool:
    """Tell whether a path is a pipe, a device or an open descriptor (/dev/stdout), to be written to as it is."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    if path.parent == Path("/dev/fd") or path in (Path("/dev/stdout"), Path("/dev/stderr")):
        return True
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_file(path: Path, settings: Settings, also: Iterable[str] = ()) -> None:
    """Refuse, before anything is spent, to write over a file; `also` names what is read besides what settings name.

    Raises:
        CoterieError: when it exists and may not be overwritten, is a link or a folder, or is read by this call.
    """
    if is_stream(path):
        return
    with disk_errors(path):
        mode = mode_of(path)
        if stat.S_ISLNK(mode):
            raise CoterieError(f"{path} is a link, and nothing is written through links; choose another --output")
        if stat.S_ISDIR(mode):
            raise CoterieError(f"{path} is a folder; give the name of a file as --output")
        for given in [*inputs_of(settings), *map(as_path, also)] if mode else ():
            if path.resolve().is_relative_to(given.resolve()):
                raise CoterieError(f"{path} is or belongs to {given}, which this call reads; choose another --output")
        if mode and not vars(settings).get("overwrite"):
            raise CoterieError(f"{path} exists; choose another --output, or add --overwrite to replace it")


def write_answers(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line: a file whole or not at all, a pipe or a device as it is.

    Raises:
        CoterieError: when it cannot be written.
    """
    if not is_stream(path):
        write_jsonl(path, [dict(row) for row in rows])
        return
    with disk_errors(path), path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def mode_of(path: Path) -> int:
    """Return the mode of what stands at a path, links not followed; 0 where nothing does."""
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return 0
