"""What `coterie select` and `coterie gather` made before, taken for a task's mixture as it is once it fits the task."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from coterie.artifacts import as_path, check_kind, read_run_record, sha256_of
from coterie.errors import CoterieError
from coterie.methods.kshot.choose_adapters import SELECTION_FILE, read_selection
from coterie.methods.kshot.gather_rows import GATHERED_FILE, SUMMARY_FILE
from coterie.methods.kshot.task import KshotTask
from coterie.settings.commands import GatherSettings, KshotSettings, SelectSettings
from coterie.settings.reading import Settings, changed

MADE_FOR = {
    "base_model": "another base model than the bank is for; select from this bank",
    "shots": "other shots; give the same --shots and --limit, or make it again",
    "exclude": "other excluded rows; give the same --exclude, or make it again",
}
"""What is told where a folder was made for something else, by the input's name in its record."""


def check_reused(settings: KshotSettings) -> None:
    """Refuse settings of what is not done anew, before anything is loaded.

    Raises:
        CoterieError: naming the first of them.
    """
    if settings.pool and settings.gathered:
        raise CoterieError("--pool is gathered from, --gathered was gathered already; leave one of them out")
    if not settings.pool and (given := changed(settings.rows)):
        raise CoterieError(f"{given[0]} says how open data is gathered; add --pool, or leave it out")
    choosing = [flag for flag in changed(settings.adapters) if flag != "--exclude"] + changed(settings.rationale)
    if settings.selected and choosing:
        raise CoterieError(f"{choosing[0]} says how adapters are chosen; leave out --selected, or this flag")


def reused_inputs(settings: KshotSettings, task: KshotTask) -> dict[str, str]:
    """Hold what was made before to the task, and return the hashes of it by name.

    Raises:
        CoterieError: when a folder is none of those, or was made for another base model, other examples or adapters.
    """
    hashes = {}
    if settings.selected:
        folder = as_path(settings.selected)
        made_from = _inputs_of(SelectSettings, folder, SELECTION_FILE)
        chosen = [f"adapter {name}" for name in read_selection(folder).chosen]
        _check_same(folder, made_from, ["base_model", *chosen], settings, task)
        hashes["selected"] = sha256_of(folder / SELECTION_FILE)
    if settings.gathered:
        folder = as_path(settings.gathered)
        _check_same(folder, _inputs_of(GatherSettings, folder, SUMMARY_FILE), [], settings, task)
        hashes["gathered"] = sha256_of(folder / GATHERED_FILE)
    return hashes


def _inputs_of(kind: type[Settings], folder: Path, marker: str) -> Mapping[str, str]:
    """Return the hashes of what a folder was made from, which only the command with these settings makes."""
    check_kind(folder, marker)
    record = read_run_record(folder / "run.yaml") if (folder / marker).is_file() else {}
    if record.get("command") != kind.command:
        raise CoterieError(f"{folder} was not made by coterie {kind.command}; give the --output of that command")
    return record.get("inputs") or {}


def _check_same(
    folder: Path, made_from: Mapping[str, str], names: list[str], settings: KshotSettings, task: KshotTask
) -> None:
    own = task.inputs()
    for name in ("shots", *(["exclude"] if task.excluded else []), *names):
        if made_from.get(name) != own.get(name):
            other = f"another {name} than {settings.bank} holds; select from this bank"
            raise CoterieError(f"{folder} was made for {MADE_FOR.get(name, other)}")


def copy_files(source: str, folder: Path, files: Sequence[str]) -> None:
    """Copy files of a folder that was made before into a stage of the run."""
    for file in files:
        shutil.copyfile(as_path(source) / file, folder / file)
