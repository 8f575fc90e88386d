"""Adapters of strangers in a bank on disk: each is checked before it gets there, checked again, and taken out."""

import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from coterie.artifacts import FORMAT, as_path, disk_errors, hub_folder, locked, real_folder, replace_folder, write_json
from coterie.backbone.loading import Backbone, BaseModelIdentity, check_identity, load_backbone
from coterie.data.streaming import question_of, stream_examples, text_key
from coterie.errors import CoterieError, check_known
from coterie.experts.bank_folder import (
    BANK_FILE,
    EXPERTS,
    OWN_FILES,
    QUESTIONS_FILE,
    list_names,
    read_base,
    read_questions,
    tidy_up,
)
from coterie.experts.cards import (
    ADAPTER_FILES,
    CARD_FILE,
    Card,
    check_files,
    describe_adapter,
    hash_adapter,
    printable,
    read_card,
    short,
)
from coterie.methods.token_level.domains import check_domain_names, named_values
from coterie.settings.commands import BankAddSettings
from coterie.settings.groups import ModelSettings, PlacementSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat
from coterie.settings.rows import ReadingSettings

logger = logging.getLogger(__name__)

LONGEST_NAME = 100
LONGEST_REASON = 500


@dataclass(frozen=True)
class AddResult:
    """What became of one adapter.

    Attributes:
        name: its name in the bank.
        card: where it is in the bank now.
        is_new: whether it was not there before.
        refusal: why it was refused.
    """

    name: str
    card: Card | None = None
    is_new: bool = False
    refusal: str | None = None

    def __str__(self) -> str:
        """Tell it in one line."""
        name = printable(self.name, LONGEST_NAME)
        if self.refusal:
            return f"refused {name}: {self.refusal}"
        if self.card is None or not self.is_new:
            return f"{name} is there already, with the same files"
        size = f"rank {self.card.rank}, {self.card.layers} layers, {short(self.card.parameters)} parameters"
        return f"added {name}: {size}"


@dataclass(frozen=True)
class Verified:
    """What was found about one adapter of a bank: `trouble` is None where everything is as it was added."""

    name: str
    trouble: str | None

    def __str__(self) -> str:
        """Tell it in one line."""
        return f"{printable(self.name, LONGEST_NAME)}: {self.trouble or 'ok'}"


@dataclass(frozen=True)
class Questions:
    """The questions of an adapter's training rows: where they came from, their number and their keys."""

    sources: Sequence[str] = ()
    rows: int | None = None
    keys: frozenset[bytes] = frozenset()


@dataclass(frozen=True)
class _Addition:
    """A bank that is being added to; `added` collects the names that came into it."""

    folder: Path
    backbone: Backbone
    questions: Mapping[str, Questions]
    overwrite: bool
    added: set[str] = field(default_factory=set)


def bank_add(folder: str | Path, adapters: str | Path | Sequence[str | Path], **settings: Any) -> list[AddResult]:  # noqa: ANN401
    """Put adapters into a bank on disk; each is added or refused on its own.

    Args:
        folder: of the bank; made where there is none.
        adapters: PEFT folders or hub ids, one or several, or NAME=FOLDER for another name than the folder's.
        **settings: fields of `BankAddSettings` by their plain names, such as model="smollm2-135m".

    Raises:
        CoterieError: for bad settings, and as `add_to_bank`.
    """
    several = [adapters] if isinstance(adapters, str | Path) else adapters
    flat = {"folder": str(folder), "adapters": list(map(str, several)), **settings}
    return list(add_to_bank(from_flat(BankAddSettings, flat)))


@takes_fields(BankAddSettings)
def add_to_bank(settings: BankAddSettings) -> Iterator[AddResult]:
    """Put adapters into a bank one after the other, telling of each what became of it.

    Raises:
        CoterieError: for bad training data, another base model than the bank's, a folder that is no bank, or one that
            another process adds to.
    """
    folder = as_path(settings.folder)
    folder = folder.resolve() if folder.is_symlink() else folder  # the user's own link
    base = _base_of(folder)
    adapters = []
    for text in settings.adapters:
        name, equals, source = text.partition("=")
        path = as_path(text)
        if os.path.exists(path):  # also with an equals sign; unlike the path's own method, for names of any length
            adapters.append((path.resolve().name, text))
        else:
            adapters.append((name, source) if equals else (path.name, text))
    questions = _read_questions(settings.trained_on, [name for name, _ in adapters], settings.reading)
    try:
        with locked(folder / ".lock", folder):
            experts = real_folder(folder, EXPERTS)
            tidy_up(folder)
            try:
                addition = _Addition(folder, _load_base(settings, base), questions, settings.overwrite)
                for name, source in adapters:
                    yield _add_one(addition, name, source)
            finally:
                with suppress(OSError):  # of a new bank into which nothing came; others are not empty and stay
                    experts.rmdir()
    finally:
        with suppress(OSError):
            folder.rmdir()


def bank_remove(folder: str | Path, names: str | Sequence[str]) -> None:
    """Take adapters out of a bank on disk, whole and for good; where one cannot be taken out, all stay.

    Raises:
        CoterieError: for a folder that is no bank, a name that is not in it, an adapter's folder that is a link or
            holds what no `bank_add` wrote, or a bank that another process writes to.
    """
    bank = as_path(str(folder))
    read_base(bank)
    with locked(bank / ".lock", bank):
        tidy_up(bank)
        known = list_names(bank)
        several = list(dict.fromkeys([names] if isinstance(names, str) else names))
        for name in several:
            check_known("adapter", name, known)
            _check_own(bank / EXPERTS / name, "removed")
        for name in several:  # once it has another name it is no adapter, and the next call deletes what is left of it
            gone = bank / EXPERTS / f".{name}.{secrets.token_hex(8)}.partial"
            with disk_errors(gone):
                (bank / EXPERTS / name).rename(gone)
                shutil.rmtree(gone)


def verify_bank(folder: str | Path, **placement: Any) -> Iterator[Verified]:  # noqa: ANN401
    """Hash every adapter of a bank again, load it against the base model, and hold its card to what is found.

    Args:
        folder: of the bank.
        **placement: fields of `PlacementSettings`: dtype, device, load_in_4bit.

    Raises:
        CoterieError: for a folder that is no bank, or a base model that is not the bank's any more.
    """
    settings = from_flat(PlacementSettings, placement)
    bank = Path(folder)
    base = read_base(bank)
    backbone = load_backbone(ModelSettings(model=base.id, revision=base.revision, **settings.model_dump()))
    check_identity(base, backbone.identity, f"{bank} is a bank for")
    for name in list_names(bank):
        yield Verified(name, _trouble(bank / EXPERTS / name, backbone.model))


def _trouble(folder: Path, model: nn.Module) -> str | None:
    try:
        card = read_card(folder)
        check_files(folder)
        if hash_adapter(folder) != card.sha256:
            return "its files are not the ones that were added; add it again with --overwrite, or delete its folder"
        facts = {"name": card.name, "source": card.source, "rows": card.rows, "trained_on": card.trained_on}
        found = describe_adapter(folder, model, **facts)
        if card.rows is not None and len(read_questions(folder)) > card.rows:
            return f"it has more questions than the {card.rows} training rows on its card; add it again"
    except (CoterieError, OSError) as error:
        return printable(str(error), LONGEST_REASON)
    wrong = [fact for fact, value in vars(found).items() if value != vars(card)[fact]]
    return f"its card has another {', '.join(wrong)} than its files; add it again with --overwrite" if wrong else None


# ------------------------------------------------------------------------------------------- before anything is added


def _base_of(folder: Path) -> BaseModelIdentity | None:
    """Return the base model of a bank; None where a new bank can be made."""
    if (folder / BANK_FILE).exists():
        return read_base(folder)
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    foreign = [name for name in found if name != EXPERTS and not name.startswith(".")]
    if folder.is_file() or foreign or list_names(folder):
        raise CoterieError(f"{folder} is there already and is no bank; choose another folder")
    return None


def _load_base(settings: BankAddSettings, base: BaseModelIdentity | None) -> Backbone:
    model = settings.model or (base.id if base else None)
    if model is None:
        raise CoterieError(f"{settings.folder} is a new bank; say which base model it is for with --model")
    if base and settings.revision and not settings.model:
        raise CoterieError("--revision goes with --model; the bank says which base model its adapters are on")
    revision = settings.revision if settings.model or not base else base.revision
    backbone = load_backbone(ModelSettings(model=model, revision=revision, **settings.placement.model_dump()))
    if base:
        check_identity(base, backbone.identity, f"{settings.folder} is a bank for")
    return backbone


def _read_questions(values: Sequence[str], names: Sequence[str], reading: ReadingSettings) -> dict[str, Questions]:
    """Read the questions of the training data that is named for adapters."""
    found = named_values(values, "trained-on")
    strange = [name for name in found if name not in names]
    if strange:
        raise CoterieError(f"--trained-on names {strange[0]!r}, but the adapters to add are {', '.join(names)}")
    questions = {}
    for name, sources in found.items():
        rows = chain.from_iterable(stream_examples(source, None, reading) for source in sources)
        keys = [text_key(question_of(example)) for example in rows]
        questions[name] = Questions(sources, len(keys), frozenset(keys))
    return questions


# -------------------------------------------------------------------------------------------------------- one adapter


def _add_one(addition: _Addition, name: str, source: str) -> AddResult:
    """Add one adapter, or say why not: a local folder, or from the hub its known files and no others."""
    advice = f"{source} does not exist; give an adapter's folder or a hub id"
    try:
        check_domain_names([name])
        if not name.isprintable() or len(name) > LONGEST_NAME or "=" in name:
            raise CoterieError(f"{name!r} cannot be an adapter's name; give another one with NAME=FOLDER")
        folder = as_path(source)
        folder = folder if os.path.exists(folder) else hub_folder(source, list(ADAPTER_FILES), advice)
        check_files(folder)
        if (there := _existing_card(addition, name, folder)) is not None:
            return AddResult(name, there)
        draft = addition.folder / EXPERTS / f".{name}.{secrets.token_hex(8)}.partial"
        with disk_errors(draft):
            try:
                card = _copy_and_check(draft, folder, name, source, addition)
                _publish(draft, addition, name)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    except (CoterieError, OSError) as error:
        return AddResult(name, refusal=printable(str(error), LONGEST_REASON))
    addition.added.add(name)
    own, wanted = card.base, addition.backbone.identity.id
    if own is not None and Path(own).name.casefold() != Path(wanted).name.casefold():  # folders differ between machines
        logger.info(f"note: {name} names {own} as its base model, and this bank is for {wanted}")
    return AddResult(name, card, is_new=True)


def _existing_card(addition: _Addition, name: str, folder: Path) -> Card | None:
    """Return the card of the same adapter if the bank has it; refuse another one of that name."""
    target = addition.folder / EXPERTS / name
    if not target.exists() or (addition.overwrite and name not in addition.added):
        return None
    card = read_card(target)
    if card.sha256 != hash_adapter(folder):
        advice = "" if addition.overwrite else ", or add --overwrite to replace it"
        raise CoterieError(f"another adapter of this name is there already; rename one with NAME=FOLDER{advice}")
    if name in addition.questions and name not in addition.added:
        raise CoterieError("it is there already; add --overwrite to note what it was trained on")
    return card


def _copy_and_check(draft: Path, folder: Path, name: str, source: str, addition: _Addition) -> Card:
    """Copy an adapter's files into a new folder, then check the copies, so that what was checked is what is kept."""
    draft.mkdir()
    for file in ADAPTER_FILES:
        if (folder / file).exists():
            shutil.copyfile(folder / file, draft / file)
    questions = addition.questions.get(name, Questions())
    facts = {"name": name, "source": source, "rows": questions.rows, "trained_on": questions.sources}
    try:
        card = describe_adapter(draft, addition.backbone.model, **facts)
    except CoterieError as error:
        raise CoterieError(str(error).replace(str(draft), str(folder))) from error
    write_json(draft / CARD_FILE, vars(card))
    if questions.rows is not None:
        write_json(draft / QUESTIONS_FILE, {"keys": sorted(key.hex() for key in questions.keys)})
    return card


def _publish(draft: Path, addition: _Addition, name: str) -> None:
    """Give a finished folder its name, in place of the one that has it."""
    if not (addition.folder / BANK_FILE).exists():
        bank = {"format": FORMAT, "base_model": asdict(addition.backbone.identity)}
        write_json(addition.folder / BANK_FILE, bank)
    target = draft.with_name(name)
    _check_own(target, "replaced")
    replace_folder(draft, target, draft.with_suffix(".old"))


def _check_own(target: Path, what: str) -> None:
    """Refuse to delete an adapter's folder that is a link, or holds what is nobody's but the user's."""
    foreign = set(os.listdir(target)) - OWN_FILES if target.is_dir() else set()
    if target.is_symlink() or foreign:
        raise CoterieError(f"{target} is a link or holds what no bank add wrote, so it is not {what}; move it away")
