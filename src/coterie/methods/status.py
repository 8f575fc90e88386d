"""What there is of a run: which stages are done, and which the same command would make again by now, and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coterie.artifacts import as_path, partial_folder, read_run_record, read_stages, sha256_of
from coterie.backbone.loading import local_weights
from coterie.data.examples import load_all
from coterie.errors import CoterieError, first_line
from coterie.methods.common import IN_MEMORY, hash_examples, load_questions
from coterie.methods.token_level.domains import named_values
from coterie.mixture.folder import find_mixture, hash_mixture, reading_for
from coterie.records.wording import columns
from coterie.settings.reading import Settings, checked, values_of
from coterie.settings.rows import ReadingSettings

SAME, UNKNOWN = "as it was", "not looked at"


@dataclass(frozen=True)
class StageStatus:
    """A stage of a run.

    Attributes:
        name: its folder in the run's.
        is_done: whether it is complete.
        again: why the same command would make it again; None where it would not.
        seconds: that it took; None where it is not done, or where a kill came before that was noted.
        size: of its files, in bytes.
    """

    name: str
    is_done: bool
    again: str | None
    seconds: float | None
    size: int


@dataclass(frozen=True)
class RunStatus:
    """A run, finished or not.

    Attributes:
        folder: where its files are.
        command: that makes it.
        is_finished: whether it has its own name.
        started: when it began.
        size: of all its files, in bytes.
        inputs: what became of everything that it read.
        stages: those that were begun.
    """

    folder: Path
    command: str
    is_finished: bool
    started: str
    size: int
    inputs: Mapping[str, str]
    stages: tuple[StageStatus, ...]

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        """Return a table of the stages, below what there is to say of the whole."""
        state = "finished" if self.is_finished else "unfinished, the same command goes on"
        lines = [f"{self.folder}: coterie {self.command}, {state}, begun {self.started}, {_megabytes(self.size)}"]
        lines += [f"{name}: {what}" for name, what in self.inputs.items() if what != SAME]
        cells = [("stage", "seconds", "size", "state")]
        for one in self.stages:
            seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
            state = f"again: {one.again}" if one.again else "done" if one.is_done else "begun"
            cells.append((one.name, seconds, _megabytes(one.size), state))
        return "\n".join([*lines, columns(cells, "<>><")] if self.stages else lines)


def run_status(folder: str | Path, kinds: Mapping[str, type[Settings]]) -> RunStatus:
    """Look at a run and at what it read; the base model is not loaded, and nothing is made.

    Args:
        folder: the run's --output, finished or not.
        kinds: the settings of every command, by its name.

    Raises:
        CoterieError: when there is no run.
    """
    output = as_path(folder)
    is_finished = output.exists() or not partial_folder(output).exists()
    place = output if is_finished else partial_folder(output)
    record = read_run_record(place / "run.yaml")
    inputs, command = record.get("inputs") or {}, record["command"]
    now: dict[str, str | None] = dict.fromkeys(inputs)
    told: dict[str, str] = dict.fromkeys(inputs, UNKNOWN)
    if command in kinds:
        settings = checked(kinds[command], record["settings"])
        for name in inputs:
            now[name], told[name] = _looked_at(settings, name, inputs[name])
    stages = _stages(place, {name: value for name, value in now.items() if value is not None})
    return RunStatus(place, command, is_finished, str(record.get("started")), _size(place), told, stages)


def _looked_at(settings: Settings, name: str, before: str) -> tuple[str | None, str]:
    """Return the hash of an input by now, or nothing where it is not looked at, and what became of it."""
    kind, _, own = name.partition(" ")
    read = READERS.get((settings.command, kind)) or READERS.get(("", kind))
    if read is None or IN_MEMORY in vars(settings).get("data", ()):
        return None, UNKNOWN
    try:
        found = read(settings, own)
    except CoterieError as error:
        return "", f"cannot be read any more: {first_line(error)}"
    return found, UNKNOWN if found is None else SAME if found == before else "changed since"


def _stages(folder: Path, now: Mapping[str, str]) -> tuple[StageStatus, ...]:
    found: dict[str, StageStatus] = {}
    for name, stage in sorted(read_stages(folder).items(), key=lambda pair: _began(folder / pair[0])):
        made_from, is_done = stage["from"] or {}, (folder / name).is_dir()
        reasons = [f"{one} changed" for one in made_from if one in now and made_from[one] != now[one]]
        reasons = reasons or [f"{one} is" for one in made_from if one in found and found[one].again]
        why = ", ".join(reasons) or None
        place = folder / name if is_done else folder / "working" / name
        found[name] = StageStatus(name, is_done, why, stage.get("seconds") if is_done else None, _size(place))
    return tuple(found.values())


def _began(folder: Path) -> float:
    """Order stages as they were made; what is under way comes last."""
    return folder.stat().st_mtime if folder.exists() else float("inf")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


# --------------------------------------------------------------------------------------- what a run has read, again


def _base_model(settings: Any, _: str) -> str | None:  # noqa: ANN401 - settings of any command
    model = values_of(settings).get("model")
    return local_weights(model) if model else None


def _rows(data: Sequence[str], limit: int | None, reading: ReadingSettings) -> str:
    return hash_examples(load_all(data, limit, reading))


READERS: dict[tuple[str, str], Callable[[Any, str], str | None]] = {
    ("", "base_model"): _base_model,
    ("", "mixture"): lambda its, _: hash_mixture(find_mixture(its.mixture)),
    ("eval", "data"): lambda its, _: _rows(its.data, its.limit, reading_for(its.mixture, its.reading)),
    ("fit token-level", "data"): lambda its, name: _rows(
        named_values(its.data, "data")[name], its.limit, its.reading.shared
    ),
}
for command in ("fit elrea", "fit auto", "influence"):
    READERS[command, "data"] = lambda its, _: _rows(its.data, its.limit, its.reading)
for command in ("fit kshot-moe", "fit kshot-auto"):
    READERS[command, "pool"] = lambda its, name: sha256_of(Path(name))
for command in ("select", "fit kshot-moe", "fit kshot-auto"):
    READERS[command, "shots"] = lambda its, _: _rows(its.shots, its.limit, its.reading)
    READERS[command, "exclude"] = lambda its, _: hash_examples(
        load_questions(its.adapters.exclude, reading=its.reading.shared)
    )
"""How an input is hashed anew, by the command that reads it, or "" for all, and the first word of the input's name."""
