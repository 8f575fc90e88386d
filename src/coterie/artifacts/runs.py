"""Run folders: a run works in `<output>.partial`, which is renamed to `<output>` when it is complete.

So a folder under its own name is always a finished one. Inside, a stage is done when its folder or file exists under
its own name.
"""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from coterie import ranks
from coterie.artifacts.files import FORMAT, disk_errors, write_json, write_text
from coterie.artifacts.folders import check_tree, held_places, real_folder, replace_folder, strange_entry
from coterie.artifacts.locks import locked
from coterie.artifacts.machine import environment_record
from coterie.artifacts.outputs import inputs_of, mode_of
from coterie.artifacts.reading import MAX_YAML, parse_yaml, read_json, read_text
from coterie.errors import CoterieError
from coterie.settings.old_spellings import current_command, current_names, is_old
from coterie.settings.reading import Settings, flat_values

MAX_KEPT = 2**32  # bytes

ADDED_LATER = ("report.html", "methods", "working")
"""What other commands add to a finished run."""

JsonCache = Callable[[str, Callable[[], Any]], Any]
"""Gives a JSON value by name, computing it where it is not known yet; see `RunFolder.cached`."""


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:  # they would not be read again
        return True


@dataclass(frozen=True)
class RunFolder:
    """A run folder under construction; all of it is real folders and files."""

    path: Path

    def stage(self, name: str, make: Callable[[Path], object], *, together: bool = False) -> Path:
        """Make the folder `name` once: `make` fills a working folder, which gets its name when it is complete.

        A stage that was interrupted starts again with what it left in its working folder. Of several processes the
        first one makes it, or all of them `together`.
        """
        done, working = self.path / name, self.path / "working" / name

        def begin() -> None:
            check_tree(real_folder(self.path, f"working/{name}"))

        def fill() -> None:
            with disk_errors(working):
                make(working)

        def finish() -> None:
            with disk_errors(working):
                real_folder(self.path, str(Path(name).parent))
                working.rename(done)

        if not ranks.by_first(done.exists):
            ranks.by_first(begin)
            fill() if together else ranks.by_first(fill)
            ranks.by_first(finish)
        return done

    def cached(self, name: str, make: Callable[[], Any]) -> Any:  # whatever JSON holds
        """Compute a JSON value once: a run that was interrupted later reads it. It is gone when the run is finished."""
        file = self.path / "working" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.json"
        if not ranks.by_first(file.exists):
            ranks.by_first(lambda: write_json(file, {"value": make()}))
        kept = read_json(file, MAX_KEPT)
        if "value" not in kept:
            raise CoterieError(f"{file} lacks its 'value'; delete the file, it is made again")
        return kept["value"]


@contextmanager
def run_folder(output: Path, settings: Settings, inputs: Mapping[str, str]) -> Iterator[RunFolder]:
    """Open the partial folder of a run, new or interrupted, and finish it when the body is through.

    The settings are of the command that runs; inputs are content hashes by name. A folder that is to be overwritten
    stays as it is until the new one is complete. Of several processes the first one does all of this.

    Raises:
        CoterieError: as `check_output`; when another process works on this output, or an unfinished run with other
            settings or inputs is in the way. What stands in the way stays.
    """
    together = {"processes": ranks.count()} if ranks.count() > 1 else {}
    ranks.check_same(inputs)
    with ExitStack() as stack:
        ranks.by_first(lambda: stack.enter_context(_open_folder(output, settings, inputs, together)))
        yield RunFolder(partial_folder(output))
        ranks.by_first(stack.close)


@contextmanager
def _open_folder(
    output: Path, settings: Settings, inputs: Mapping[str, str], together: Mapping[str, int]
) -> Iterator[None]:
    check_output(output, settings)
    with locked(output.with_name(f".{output.name}.lock"), output):
        _put_back(output, settings)
        check_output(output, settings)
        partial = real_folder(partial_folder(output))
        check_tree(partial)
        record = {"format": FORMAT, "command": settings.command, "settings": settings.model_dump()}
        record["inputs"] = dict(inputs)
        _check_same_run(partial, record)
        if not (partial / "run.yaml").exists():
            started = datetime.now(UTC).isoformat(timespec="seconds")
            _write_record(partial, {**record, "started": started, **environment_record()})
        try:
            yield
            shutil.rmtree(partial / "working", ignore_errors=True)
            facts = {**together, "files": sorted(os.listdir(partial))}
            _write_record(partial, read_run_record(partial / "run.yaml") | facts)
            check_output(output, settings)  # something may have come there meanwhile
            with disk_errors(output):
                replace_folder(partial, output, aside_folder(output))
        except (CoterieError, KeyboardInterrupt):
            if not any(path.is_file() and path.name != "run.yaml" for path in partial.rglob("*")):  # nothing to resume
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _put_back(output: Path, settings: Settings) -> None:
    """Finish what a process left that was killed while a new folder took an old one's name."""
    aside = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{16}}\.old")
    for old in [path for path in output.parent.iterdir() if aside.fullmatch(path.name)]:
        if why_kept(old, settings):
            continue
        if os.path.lexists(output):
            shutil.rmtree(old)
        else:
            old.rename(output)


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_text(folder / "run.yaml", yaml.dump(dict(record), Dumper=_WithoutAliases, sort_keys=False))


def partial_folder(output: Path) -> Path:
    """Return the folder in which a run works until it is complete."""
    return output.with_name(output.name + ".partial")


def aside_folder(output: Path) -> Path:
    """Return what a folder is called while another one takes its name."""
    return output.with_name(f".{output.name}.{secrets.token_hex(8)}.old")


def check_output(output: Path, settings: Settings) -> None:
    """Refuse, before anything is spent, an output folder that a command may not write.

    Raises:
        CoterieError: when it exists and the settings do not say to overwrite it, or is nothing that this command has
            made, or holds what must not be deleted; when it is a link, or no name that a folder can have.
    """
    if output.name in ("", ".."):
        raise CoterieError(f"{output} has no name of its own; choose another --output")
    with disk_errors(output):
        for path in (aside_folder(output), partial_folder(output), output):  # the first is the longest name
            if stat.S_ISLNK(mode_of(path)):
                raise CoterieError(f"{path} is a link, and nothing is written through links; choose another --output")
        if not os.path.lexists(output):
            return
        if not vars(settings).get("overwrite"):
            raise CoterieError(f"{output} exists; choose another --output, or add --overwrite to replace it")
        if reason := why_kept(output, settings):
            raise CoterieError(f"{output} {reason}, so it is not replaced; choose another --output")


def why_kept(folder: Path, settings: Settings) -> str | None:
    """Tell why a command may not replace a folder; None where it may.

    It may where the folder is empty, or where the same command has made it and all that is in it.
    """
    if not stat.S_ISDIR(mode_of(folder)):
        return "is no folder"
    if os.path.ismount(folder):
        return "is a mount point"
    if held := next(held_places(folder, inputs_of(settings)), None):
        return f"is or holds {held}"
    if strange := strange_entry(folder):
        return f"holds {strange}"
    names = sorted(os.listdir(folder))
    if not names:
        return None
    record = _run_record(folder)
    if record is None:
        return "is not a run folder"
    if record["command"] != settings.command:
        return f"was made by coterie {record['command']}, not by coterie {settings.command}"
    if "files" not in record:  # as in records of before; a copy of one may lie in any folder
        return "has a run.yaml that does not list which files the run wrote"
    foreign = set(names) - {*record["files"], *ADDED_LATER}
    return f"holds {min(foreign)}, which the run did not write" if foreign else None


def _run_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of the run that made a folder; None where none of ours did."""
    try:
        record = read_run_record(folder / "run.yaml")
    except CoterieError:
        return None
    kinds = {"inputs": dict, "versions": dict, "started": str, "files": list}
    is_ours = all(isinstance(record.get(name, []), kind) for name, kind in kinds.items())
    return record if is_ours and record.get("format") == FORMAT and "coterie" in record["versions"] else None


def _check_same_run(partial: Path, record: Mapping[str, Any]) -> None:
    if not (partial / "run.yaml").exists():
        if any(partial.iterdir()):
            raise CoterieError(f"{partial} is no unfinished run, and {partial.stem} would be made there; move it away")
        return
    tries = []
    for one in (record, read_run_record(partial / "run.yaml")):
        values = current_names(one["command"], flat_values(one["settings"]))  # as settings are called today
        values.pop("overwrite", None)  # the tries at one run may differ in it
        tries.append({**one, "settings": values})
    ours, theirs = tries
    for name in theirs["settings"].keys() - ours["settings"].keys():
        if is_old(record["command"], name):  # the run began when this flag was this command's
            del theirs["settings"][name]
    different = [key for key in ("command", "settings", "inputs") if ours[key] != theirs.get(key)]
    if different:
        raise CoterieError(
            f"{partial} holds an unfinished run with other {' and '.join(different)}; "
            f"finish that one with its own settings, or delete the folder"
        )


def read_run_record(path: Path) -> dict[str, Any]:
    """Read a `run.yaml`; its command has the name of today.

    Raises:
        CoterieError: when it is missing or not the record of a run.
    """
    advice = "give the run.yaml of a run folder"
    record = parse_yaml(read_text(path, MAX_YAML, advice), str(path), advice)
    if not isinstance(record, dict) or "command" not in record or not isinstance(record.get("settings"), dict):
        raise CoterieError(f"{path} holds no command and settings; {advice}")
    return {**record, "command": current_command(str(record["command"]))}
