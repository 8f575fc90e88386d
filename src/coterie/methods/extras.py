"""What the methods of the table need beyond a fitted run: more experts, gates, judgements, routers fitted to those.

Each ingredient is a folder `methods/<name>` inside the run's folder, trained once: `ingredient.json` says how, experts
are plain PEFT folders, the rest is safetensors.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from coterie.artifacts import FORMAT, RunFolder, read_json, read_tensors, write_json
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank, check_names, load_bank
from coterie.mixture import Mixture, RouterParts, load_router
from coterie.routers.base import Router
from coterie.routers.judgement import Judgement
from coterie.settings.groups import ExtrasSettings

logger = logging.getLogger(__name__)

RECORD = "ingredient.json"
JUDGEMENT = "judgement.safetensors"


@runtime_checkable
class Recipe(Protocol):
    """What every fitted run's recipe tells: how it was made, so that more can be made of the same."""

    @property
    def mixture(self) -> Mixture:
        """What the run made."""
        ...

    @property
    def grid(self) -> ExtrasSettings:
        """How what is trained further is made."""
        ...

    @property
    def folder(self) -> Path:
        """The run's folder."""
        ...


@dataclass(frozen=True)
class Made:
    """What making an ingredient gave: the experts' folders by name, a router, and facts that are only kept."""

    experts: Mapping[str, Path]
    router: Router | None = None
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of ingredient.

    Attributes:
        make: makes it from a fitted run's recipe, in a folder that may hold what an interrupted making left.
        settings: the fields of `ExtrasSettings` that it depends on.
        needs: ingredients that it is made from.
    """

    make: Callable[[Any, RunFolder], Made]
    settings: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ingredient:
    """An ingredient, loaded: its experts, its router if it has one, and the seconds that its training took."""

    bank: ExpertBank
    router: Router | None
    folder: Path
    seconds: float


def prepare(recipe: Recipe, names: Iterable[str], kinds: Mapping[str, Kind]) -> dict[str, Ingredient]:
    """Train the ingredients that the run's folder lacks and load them all; what they are made from comes first.

    Raises:
        CoterieError: when one was trained with other settings, or its files are broken.
    """
    order: list[str] = []
    for name in names:
        order += [needed for needed in (*kinds[name].needs, name) if needed not in order]
    for name in order:
        _make_once(recipe, name, kinds[name])
    return {name: load_ingredient(recipe.mixture, name) for name in order}


def load_ingredient(mixture: Mixture, name: str) -> Ingredient:
    """Load an ingredient of a mixture's folder.

    Raises:
        CoterieError: when it was not trained yet, or its files are broken.
    """
    assert mixture.folder is not None  # whoever asks has read the folder
    folder = mixture.folder / "methods" / name
    record = read_json(folder / RECORD)
    try:
        experts = list(record["experts"])
        router_record = record["router"]
    except (KeyError, TypeError) as error:
        raise CoterieError(f"{folder / RECORD} lacks {error}; delete {folder} and train it again") from error
    check_names(experts)
    bank = load_bank({expert: folder / "experts" / expert for expert in experts}, mixture.backbone.model)
    own = mixture.bank
    known = ExpertBank((*own.names, *bank.names), (*own.adapters, *bank.adapters))  # gates may weigh either's experts
    parts = RouterParts(folder / "router", mixture.folder, mixture.backbone, known)
    router = load_router(router_record, parts) if router_record else None
    return Ingredient(bank, router, folder, float(record.get("seconds") or 0))


def read_judgement(ingredient: Ingredient) -> Judgement:
    """Read how the experts of a run were judged.

    Raises:
        CoterieError: when the file is missing or broken.
    """
    record = read_json(ingredient.folder / RECORD)
    return Judgement.from_tensors(tuple(record["judged"]), read_tensors(ingredient.folder / JUDGEMENT))


def _make_once(recipe: Recipe, name: str, kind: Kind) -> None:
    settings = {field: getattr(recipe.grid, field) for field in kind.settings}
    folder = recipe.folder / "methods" / name
    if folder.exists():
        _check_same(folder, settings)
        return
    logger.info("training what the run lacks: %s", name)
    run = RunFolder(output=recipe.folder, path=recipe.folder)

    def make(working: Path) -> None:
        started = time.perf_counter()
        made = kind.make(recipe, RunFolder(output=working, path=working))
        shutil.rmtree(working / "training", ignore_errors=True)
        shutil.rmtree(working / "working", ignore_errors=True)
        record = {
            "format": FORMAT,
            "settings": settings,
            "experts": list(made.experts),
            "router": made.router.save(working / "router") if made.router else None,
            "seconds": round(time.perf_counter() - started, 1),
            **(made.facts or {}),
        }
        write_json(working / RECORD, record)

    run.stage(f"methods/{name}", make)
    with suppress(OSError):  # another ingredient may be under way in there
        (recipe.folder / "working" / "methods").rmdir()
        (recipe.folder / "working").rmdir()


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    before = read_json(folder / RECORD).get("settings")
    for field, value in settings.items():
        if not isinstance(before, dict) or before.get(field) != value:
            flag = field.replace("_", "-")
            trained = before.get(field) if isinstance(before, dict) else None
            raise CoterieError(
                f"{folder} was trained with --{flag} {trained}, not {value}; ask for that value, or delete the folder"
            )
