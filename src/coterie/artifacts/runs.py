"""Run folders: a run works in `<output>.partial`, which is renamed to `<output>` when it is complete.

So a folder under its own name is always a finished one. Inside, a stage is done when its folder or file exists under
its own name.
"""

import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from coterie import ranks
from coterie.artifacts.files import FORMAT, disk_errors, write_jsonl, write_text
from coterie.artifacts.folders import check_tree, held_places, real_folder, replace_folder, strange_entry
from coterie.artifacts.locks import locked
from coterie.artifacts.machine import environment_record
from coterie.artifacts.outputs import inputs_of, mode_of
from coterie.artifacts.reading import MAX_YAML, parse_yaml, read_text
from coterie.artifacts.stages import ANY, STAGES_FILE, WORKING, RunFolder, difference, read_stages
from coterie.errors import CoterieError
from coterie.settings.old_spellings import current_command, current_names, is_old
from coterie.settings.reading import Settings, flat_values

logger = logging.getLogger(__name__)

ADDED_LATER = ("report.html", "methods", WORKING, STAGES_FILE)
"""What other commands add to a finished run."""


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:  # they would not be read again
        return True


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
        alike = ranks.by_first(lambda: stack.enter_context(_open_folder(output, settings, inputs, together)))
        run = RunFolder(partial_folder(output), inputs, output if alike else None)
        yield run
        ranks.by_first(run.finish)
        ranks.by_first(stack.close)


@contextmanager
def _open_folder(
    output: Path, settings: Settings, inputs: Mapping[str, str], together: Mapping[str, int]
) -> Iterator[bool]:
    """Give the partial folder of a run to work in, and tell whether stages of what it replaces may be taken over."""
    check_output(output, settings)
    with locked(output.with_name(f".{output.name}.lock"), output):
        _put_back(output, settings)
        check_output(output, settings)
        partial = real_folder(partial_folder(output))
        check_tree(partial)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"format": FORMAT, "command": settings.command, "settings": settings.model_dump()}
        record |= {"inputs": dict(inputs), "started": started, **environment_record()}
        _begin(partial, record)
        try:
            yield _made_alike(output, record)
            facts = {**together, "files": sorted(os.listdir(partial))}
            _write_record(partial, read_run_record(partial / "run.yaml") | facts)
            check_output(output, settings)  # something may have come there meanwhile
            with disk_errors(output):
                replace_folder(partial, output, aside_folder(output))
        except (CoterieError, KeyboardInterrupt):
            records = ("run.yaml", STAGES_FILE)
            if not any(path.is_file() and path.name not in records for path in partial.rglob("*")):  # nothing to resume
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


def _begin(partial: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run into its new folder, or make an unfinished one go on under it.

    With other settings or inputs than before, what was made from those stays, stage by stage; see `stages.py`.

    Raises:
        CoterieError: when what is there is no unfinished run of this command, or one with other settings that was begun
            before stages were recorded.
    """
    if not (partial / "run.yaml").exists():
        if any(path.name != STAGES_FILE or path.stat().st_size for path in partial.iterdir()):  # a kill leaves that one
            raise CoterieError(f"{partial} is no unfinished run, and {partial.stem} would be made there; move it away")
        try:
            write_text(partial / STAGES_FILE, "")
            _write_record(partial, record)
        except CoterieError:  # nothing to resume
            shutil.rmtree(partial)
            raise
        return
    before = read_run_record(partial / "run.yaml")
    if not (partial / STAGES_FILE).exists():
        write_jsonl(partial / STAGES_FILE, [{"stage": ANY, "from": None}])
    stages = read_stages(partial)
    ours, theirs = _decisive(record), _decisive(before)
    for name in theirs["settings"].keys() - ours["settings"].keys():
        if is_old(record["command"], name):  # the run began when this flag was this command's
            del theirs["settings"][name]
    if ours == theirs:
        return
    if before["command"] != record["command"] or ANY in stages:
        different = " and ".join(key for key in ("command", "settings", "inputs") if ours[key] != theirs[key])
        raise CoterieError(
            f"{partial} holds an unfinished run with other {different}; "
            f"finish that one with its own settings, or delete the folder"
        )
    logger.info("%s goes on, where nothing depends on what is new: %s", partial, difference(theirs, ours))
    kept = {"run.yaml", STAGES_FILE, WORKING, *(Path(name).parts[0] for name in stages)}
    for path in [path for path in partial.iterdir() if path.name not in kept]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write_record(partial, record)


def _decisive(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells one run from another: its command, settings as they are called today, and inputs."""
    values = current_names(record["command"], flat_values(record["settings"]))
    values.pop("overwrite", None)  # the tries at one run may differ in it
    return {"command": record["command"], "settings": values, "inputs": record.get("inputs")}


def _made_alike(output: Path, record: Mapping[str, Any]) -> bool:
    """Tell whether a finished run was made by the same command with the same versions of everything."""
    if not (output / STAGES_FILE).is_file():
        return False
    before = read_run_record(output / "run.yaml")
    return all(before.get(name) == record[name] for name in ("command", "versions"))


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
