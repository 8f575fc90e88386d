"""What methods need beyond a fitted run: more experts, gates, cross-fitted losses, routers fitted to those.

Each of these extras is a folder `methods/<name>`, trained once: `ingredient.json` says how, experts are plain PEFT
folders, the rest is safetensors. It lies inside the run's folder if it was trained there on purpose, and else in the
user's cache.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from math import fsum
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from coterie import ranks
from coterie.artifacts import (
    FORMAT,
    STAGES_FILE,
    RunFolder,
    hash_json,
    hash_text,
    locked,
    read_floats,
    read_run_record,
    sha256_of,
    write_json,
    write_tensors,
)
from coterie.errors import CoterieError, naming
from coterie.experts.bank import ExpertBank, load_bank
from coterie.mixture import Mixture
from coterie.mixture.folder import derived_folder, hash_mixture
from coterie.progress import part, whole
from coterie.records.mixture import ExtraRecord
from coterie.records.schema import read
from coterie.routers.base import Router, RouterParts
from coterie.routers.loss import CrossFitLosses
from coterie.routers.table import load_router
from coterie.settings.groups import ExtrasSettings
from coterie.settings.reading import AnySettings, Settings, checked

logger = logging.getLogger(__name__)

RECORD = "ingredient.json"
LOSSES = "judgement.safetensors"

AnyRun = TypeVar("AnyRun", bound="FittedRun")


@dataclass(frozen=True)
class FittedRun(Generic[AnySettings]):
    """A fitted run, opened for further training.

    Attributes:
        made_by: settings of the command that makes such runs.
        also_made_by: those of other commands that do.
        mixture: what the run made.
        settings: how it made it.
        extras: how extras are trained.
        folder: the run's folder.
        inputs: content hash of every input, by name.
    """

    made_by: ClassVar[type[Settings]]
    also_made_by: ClassVar[tuple[type[Settings], ...]] = ()
    mixture: Mixture
    settings: AnySettings
    extras: ExtrasSettings
    folder: Path
    inputs: Mapping[str, str]

    @classmethod
    def open(cls: type[AnyRun], mixture: Mixture, extras: ExtrasSettings) -> AnyRun:
        """Reopen the run that made a mixture; `extras` tell how more will be trained for it.

        Raises:
            CoterieError: when the mixture lies in no folder, or was made by another command.
        """
        folder, command = mixture.folder, cls.made_by.command
        kinds = {kind.command: kind for kind in (cls.made_by, *cls.also_made_by)}
        if folder is None or not (folder / "run.yaml").exists():
            raise CoterieError(
                "this mixture has no run.yaml beside it, so nothing more can be trained for it; fit it again"
            )
        record = read_run_record(folder / "run.yaml")
        if record["command"] not in kinds:
            raise CoterieError(f"{folder} was made by {record['command']!r}; give a folder made by coterie {command}")
        inputs = {str(name): str(value) for name, value in (record.get("inputs") or {}).items()}
        return cls(mixture, checked(kinds[record["command"]], record["settings"]), extras, folder, inputs)


@dataclass(frozen=True)
class TrainedExtra:
    """What training an extra gave: the experts' folders by name, a router, and facts that are only kept."""

    experts: Mapping[str, Path]
    router: Router | None = None
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ExtraSpec(Generic[AnyRun]):
    """How an extra is made.

    Attributes:
        make: makes it from a fitted run, in a folder that may hold what an interrupted making left.
        work: what making it weighs beside others (see `coterie.progress`).
        settings: the fields of `ExtrasSettings` that it depends on.
        needs: extras that it is made from.
        together: whether several processes make it together, where others leave it to the first one.
    """

    make: Callable[[AnyRun, RunFolder], TrainedExtra]
    work: Callable[[AnyRun], float]
    settings: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    together: bool = False


@dataclass(frozen=True)
class Extra:
    """An extra, loaded: its experts, its router if it has one, how long its training took, and how it was trained."""

    bank: ExpertBank
    router: Router | None
    folder: Path
    seconds: float
    settings: Mapping[str, Any]


def prepare_extras(
    run: AnyRun, names: Iterable[str], specs: Mapping[str, ExtraSpec[AnyRun]], *, in_run: bool = False
) -> dict[str, Extra]:
    """Train the extras that a run lacks and load them all; what they are made from comes first.

    They go into the user's cache, since the run's folder may be a stranger's: with `in_run` into that folder.

    Raises:
        CoterieError: when one was trained with other settings than those asked for, its files are broken, or another
            process trains some of this run.
    """
    order = _with_needed(names, specs)
    folders = {name: extra_folder(run.mixture, name, in_run=in_run) for name in order}
    lacking = ranks.by_first(lambda: [name for name, folder in folders.items() if not folder.exists()])
    made_from = {need for name in order if name not in lacking for need in specs[name].needs if need not in lacking}
    hashes = {need: _hash(folders[need]) for need in made_from}
    for name in (name for name in order if name not in lacking):
        folder, record = folders[name], _read(folders[name])
        before = record.settings
        for need in specs[name].needs:
            if need in lacking or record.needs.get(need, hashes[need]) != hashes[need]:
                raise CoterieError(f"{folder} was made from a {folders[need]} that is gone; delete it, too")
        for field in specs[name].settings:  # those that nobody gave a value for are taken as it was trained
            value = getattr(run.extras, field)
            trained = before.get(field)
            if field in run.extras.model_fields_set and trained != value:
                raise CoterieError(
                    f"{folder} was trained with --{field.replace('_', '-')} {trained}, not {value}; ask for that "
                    "value, or delete the folder"
                )
    with whole("train-extras", {name: specs[name].work(run) for name in lacking}):
        for name in lacking:
            logger.info("training what the run lacks: %s", name)
            with part(name):
                _train(run, name, specs[name], folders[name].parents[1])
    return {name: load_extra(run.mixture, name) for name in order}


def lacking_work(run: AnyRun, names: Iterable[str], specs: Mapping[str, ExtraSpec[AnyRun]]) -> float:
    """Return what training the extras that a run lacks weighs."""
    order = _with_needed(names, specs)
    return fsum(specs[name].work(run) for name in order if not extra_folder(run.mixture, name).exists())


def _with_needed(names: Iterable[str], specs: Mapping[str, ExtraSpec[Any]]) -> list[str]:
    """Put what extras are made from before them, each once."""
    return list(dict.fromkeys(one for name in names for one in (*specs[name].needs, name)))


def extra_folder(mixture: Mixture, name: str, *, in_run: bool = False) -> Path:
    """Return the folder of an extra: the one that is there, or where it is to be trained."""
    assert mixture.folder is not None  # whoever asks has read the folder
    own = mixture.folder / "methods" / name
    return own if in_run or own.is_dir() else derived_folder(mixture.folder) / "methods" / name


def _train(run: AnyRun, name: str, spec: ExtraSpec[AnyRun], place: Path) -> None:
    def make(working: Path) -> None:
        started = time.perf_counter()
        made = spec.make(run, RunFolder(working))
        ranks.by_first(partial(shutil.rmtree, working / "working", ignore_errors=True))
        ranks.by_first(partial((working / STAGES_FILE).unlink, missing_ok=True))
        record = {
            "format": FORMAT,
            "settings": values,
            "needs": {need: _hash(extra_folder(run.mixture, need)) for need in spec.needs},
            "experts": list(made.experts),
            "router": made.router.save(working / "router") if made.router else None,
            "seconds": round(time.perf_counter() - started, 1),
            **(made.facts or {}),
        }
        write_json(working / RECORD, record)

    values = {field: getattr(run.extras, field) for field in spec.settings}
    real = place.resolve()  # the run may be named by a link; below it there is none

    def tidy() -> None:
        with suppress(OSError):  # another extra may be under way in there
            (real / "working" / "methods").rmdir()
            (real / "working").rmdir()

    with ExitStack() as stack:
        ranks.by_first(lambda: stack.enter_context(locked(real / ".lock", place)))
        made_from = {"mixture": hash_mixture(run.folder), **values}
        RunFolder(real).stage(f"methods/{name}", make, made_from, together=spec.together)
        ranks.by_first(tidy)


def load_extra(mixture: Mixture, name: str) -> Extra:
    """Load an extra of a mixture's folder.

    Raises:
        CoterieError: when it was not trained yet, or its files are broken.
    """
    folder = extra_folder(mixture, name)
    assert mixture.folder is not None  # or else it would have no extras
    record = _read(folder)
    with naming(folder):
        bank = load_bank({expert: folder / "experts" / expert for expert in record.experts}, mixture.backbone.model)
        own = mixture.bank
        known = ExpertBank((*own.names, *bank.names), (*own.adapters, *bank.adapters))  # gates may weigh either's
        parts = RouterParts(folder / "router", mixture.folder, mixture.backbone, known)
        router = load_router(record.router.plain(), parts) if record.router else None
    return Extra(bank, router, folder, record.seconds, record.settings)


def write_losses(losses: CrossFitLosses, into: RunFolder) -> None:
    """Write what `read_losses` reads into an extra's folder."""
    write_tensors(into.path / LOSSES, {"nll": losses.nll, "pairs": losses.pairs, "tokens": losses.tokens})


def read_losses(extra: Extra) -> CrossFitLosses:
    """Read the cross-fitted losses of a run's experts.

    Raises:
        CoterieError: when the file is missing or broken.
    """
    judged = _read(extra.folder).judged
    count = len(judged)
    wanted = {"nll": (None, count), "pairs": (None, count, count), "tokens": (None,)}
    losses = read_floats(extra.folder / LOSSES, wanted, f"delete {extra.folder} and train it again")
    if len({len(values) for values in losses.values()}) > 1:
        raise CoterieError(f"{extra.folder / LOSSES} holds unequal numbers of rows; delete {extra.folder}")
    return CrossFitLosses(judged, **losses)


def _hash(folder: Path) -> str:
    """Hash an extra's files, and its record but for the time that it took."""
    facts = {key: value for key, value in _read(folder).plain().items() if key != "seconds"}
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != RECORD)
    return hash_text(hash_json(facts), *map(sha256_of, files))


def _read(folder: Path) -> ExtraRecord:
    return read(ExtraRecord, folder / RECORD, f"delete {folder} and train it again")
