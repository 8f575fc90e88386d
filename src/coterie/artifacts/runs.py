"""Run folders: a run works in `<output>.partial`, which is renamed to `<output>` when it is complete.

So a folder under its own name is always a finished one. Inside, a stage is done when its folder or file exists under
its own name.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from coterie.artifacts.files import FORMAT, disk_errors, write_json, write_text
from coterie.artifacts.reading import MAX_YAML, parse_yaml, read_json, read_text
from coterie.errors import CoterieError
from coterie.settings.old_spellings import current_command, current_names, is_old
from coterie.settings.reading import flat_values

RECORDED_PACKAGES = ("coterie", "torch", "transformers", "peft", "scikit-learn", "numpy")

JsonCache = Callable[[str, Callable[[], Any]], Any]
"""Gives a JSON value by name, computing it where it is not known yet; see `RunFolder.cached`."""


def environment_record() -> dict[str, Any]:
    """Describe what a run ran on: package versions, Python, machine and the working folder's git commit."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = None
    with suppress(OSError, subprocess.CalledProcessError):  # no git, no repository, or no commit yet
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commit = git.stdout.strip()
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    machine = f"{processor}, {os.cpu_count()} cores"
    return {"versions": versions, "python": platform.python_version(), "machine": machine, "git": commit}


class _WithoutAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:  # they would not be read again
        return True


@dataclass(frozen=True)
class RunFolder:
    """A run folder under construction."""

    path: Path

    def stage(self, name: str, make: Callable[[Path], object]) -> Path:
        """Make the folder `name` once: `make` fills a working folder, which gets its name when it is complete.

        A stage that was interrupted starts again with what it left in its working folder.
        """
        done = self.path / name
        if not done.exists():
            working = self.path / "working" / name
            with disk_errors(working):
                working.mkdir(parents=True, exist_ok=True)
                make(working)
                done.parent.mkdir(parents=True, exist_ok=True)
                working.rename(done)
        return done

    def cached(self, name: str, make: Callable[[], Any]) -> Any:  # whatever JSON holds
        """Compute a JSON value once: a run that was interrupted later reads it. It is gone when the run is finished."""
        file = self.path / "working" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.json"
        if not file.exists():
            write_json(file, {"value": make()})
        return read_json(file)["value"]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that exists, before any work is done.

    Raises:
        CoterieError: when it exists and `overwrite` is not set, or is something that no run has made.
    """
    if not output.exists():
        return
    if not overwrite:
        raise CoterieError(f"{output} exists; choose another --output, or add --overwrite to replace it")
    if not output.is_dir() or not ((output / "run.yaml").exists() or not any(output.iterdir())):
        raise CoterieError(f"{output} is not a run folder, so it is not replaced; choose another --output")


@contextmanager
def run_folder(
    output: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> Iterator[RunFolder]:
    """Open the partial folder of a run, new or interrupted, and finish it when the body is through.

    The command has its name of the command line, such as "fit elrea"; inputs are content hashes by name.

    Raises:
        CoterieError: when an unfinished run with other settings or inputs is in the way, or when at the end something
            that no run has made stands under the run's name; the partial folder stays.
    """
    partial = output.with_name(output.name + ".partial")
    record = {"format": FORMAT, "command": command, "settings": dict(settings), "inputs": dict(inputs)}
    _check_same_run(partial, record)
    with disk_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
    if not (partial / "run.yaml").exists():
        started = datetime.now(UTC).isoformat(timespec="seconds")
        whole = {**record, "started": started, **environment_record()}
        text = yaml.dump(whole, Dumper=_WithoutAliases, sort_keys=False)
        write_text(partial / "run.yaml", text)
    try:
        yield RunFolder(partial)
        shutil.rmtree(partial / "working", ignore_errors=True)
        with disk_errors(output):
            check_output(output, overwrite=True)  # something else may have come there meanwhile
            if output.exists():  # the caller asked for overwriting, and the new run is complete
                shutil.rmtree(output)
            partial.rename(output)
    except (CoterieError, KeyboardInterrupt):
        if not any(path.is_file() and path.name != "run.yaml" for path in partial.rglob("*")):  # nothing to resume
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_same_run(partial: Path, record: Mapping[str, Any]) -> None:
    if not (partial / "run.yaml").exists():
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
