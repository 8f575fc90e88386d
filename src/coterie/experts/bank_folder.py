"""A bank on disk: adapters of one base model, each a plain PEFT folder with a card.

`bank.json` names the base model, `experts/<name>` holds an adapter.
"""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from coterie.artifacts import FORMAT, check_kind, hub_folder, may_be_on_hub, read_json
from coterie.backbone.loading import BaseModelIdentity
from coterie.data.examples import Example
from coterie.data.streaming import KEY_BYTES, question_of, text_key
from coterie.errors import CoterieError, check_known
from coterie.experts.bank import MAX_TEXT_FILE, ExpertBank, load_adapter, load_bank
from coterie.experts.cards import ADAPTER_FILES, CARD_FILE, Card, check_files, hash_adapter, printable, read_card, short
from coterie.records.mixture import BaseModelRecord
from coterie.records.schema import parse
from coterie.records.wording import columns
from coterie.settings.keywords import names_in

logger = logging.getLogger(__name__)

BANK_FILE = "bank.json"
EXPERTS = "experts"
QUESTIONS_FILE = "questions.json"
OWN_FILES = {*ADAPTER_FILES, CARD_FILE, QUESTIONS_FILE}
"""All that a bank keeps of an adapter."""
MAX_QUESTIONS_FILE = 2**30  # bytes; a key takes 37
LEFT_BEHIND = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{16})?\.(?P<kind>partial|old)")
"""Names of folders while an adapter is added; a process that was killed leaves them."""
HEADINGS = ("name", "rank", "layers", "parameters", "licence", "data", "known rows")
ALIGNED = "<>>><<>"


@dataclass(frozen=True)
class BankFolder:
    """An opened bank.

    Attributes:
        path: its folder.
        base_model: identity of the base model, as `mixture.json` keeps it.
        cards: of all adapters, sorted by name.
    """

    path: Path
    base_model: dict[str, Any]
    cards: tuple[Card, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, sorted."""
        return tuple(card.name for card in self.cards)

    def card(self, name: str) -> Card:
        """Return an adapter's card.

        Raises:
            CoterieError: when no adapter has this name.
        """
        check_known("adapter", name, self.names)
        return self.cards[self.names.index(name)]

    def folder_of(self, name: str) -> Path:
        """Return an adapter's folder, a plain PEFT folder.

        Raises:
            CoterieError: when no adapter has this name.
        """
        return self.path / EXPERTS / self.card(name).name

    def trained_on(self, name: str) -> frozenset[bytes] | None:
        """Return the keys of an adapter's training questions (see `text_key`); None when they are unknown.

        Raises:
            CoterieError: when no adapter has this name, or the file of its questions is missing or broken.
        """
        card = self.card(name)
        return None if card.rows is None else read_questions(self.folder_of(name))

    def __str__(self) -> str:
        """List the adapters, one a line."""
        lines = [HEADINGS]
        for card in self.cards:
            licence, data = (printable(text or "unknown", 32) for text in (card.licence, ", ".join(card.datasets)))
            rows = "unknown" if card.rows is None else str(card.rows)
            size = (str(card.rank), str(card.layers), short(card.parameters))
            lines.append((printable(card.name, 32), *size, licence, data, rows))
        return columns(lines, ALIGNED)


def open_bank(path: str | Path, names: str | Sequence[str] | None = None, *, revision: str | None = None) -> BankFolder:
    """Open a bank, or some adapters of it, and read their cards; the adapters' own files are not read.

    Args:
        path: its folder, or a hub id.
        names: adapters to take; all by default.
        revision: of a bank on the hub: a branch, tag or commit.

    Raises:
        CoterieError: when it is missing, no bank, or broken, or has no adapter of such a name.
    """
    folder = Path(path)
    if not folder.exists() and may_be_on_hub(str(path)):  # of which the files of a bank are got, and no others
        folder = hub_folder(str(path), [BANK_FILE, *(f"{EXPERTS}/*/{name}" for name in OWN_FILES)], "", revision)
    base = asdict(read_base(folder))
    for name in set_aside(folder):
        logger.warning("%s is set aside, since replacing it was cut off; any `coterie bank add` puts it back", name)
    known = list_names(folder)
    wanted = known if names is None else names_in(names)
    for name in wanted:
        check_known("adapter", name, known)
    chosen = [name for name in known if name in wanted]
    return BankFolder(folder, base, tuple(read_card(folder / EXPERTS / name) for name in chosen))


def load_opened(bank: BankFolder, model: nn.Module) -> ExpertBank:
    """Load the adapters of an opened bank, whose files must still be those that were added.

    Raises:
        CoterieError: when there is none, or naming all that are broken, have changed, or do not fit the base model.
    """
    if not bank.cards:
        raise CoterieError(f"{bank.path} holds no adapters; add some with: coterie bank add {bank.path} ADAPTER ...")
    broken = {}
    for card in bank.cards:
        folder = bank.folder_of(card.name)
        try:
            check_files(folder)
            if hash_adapter(folder) != card.sha256:
                raise CoterieError("its files are not the ones that were added")
            load_adapter(folder, model)
        except CoterieError as error:
            broken[card.name] = f"{card.name}: {error}"
    if broken:
        names = " ".join(broken)
        advice = f"take out with: coterie bank remove {bank.path} {names}; or choose others by name"
        raise CoterieError(f"{bank.path}: {'; '.join(broken.values())}; {advice}")
    return load_bank({name: bank.folder_of(name) for name in bank.names}, model)


def read_base(folder: Path) -> BaseModelIdentity:
    """Read which base model a bank is for.

    Raises:
        CoterieError: when the folder is no bank, or its `bank.json` is broken.
    """
    file = folder / BANK_FILE
    check_kind(folder, BANK_FILE)
    if not file.is_file():
        raise CoterieError(
            f"{folder} holds no {BANK_FILE}, so it is no bank; make one with: "
            f"coterie bank add {folder} ADAPTER ... --model MODEL"
        )
    record = read_json(file, MAX_TEXT_FILE)
    if record.get("format") != FORMAT:
        raise CoterieError(f"{file} has format {record.get('format')!r}, not {FORMAT}; upgrade coterie")
    base = parse(BaseModelRecord, record.get("base_model"), f"{file}, 'base_model'", "get the bank again")
    return BaseModelIdentity(**dict(base))


def list_names(folder: Path) -> list[str]:
    """Return the names of a bank's adapters, sorted; folders that are only being written are left out."""
    experts = folder / EXPERTS
    found = experts.iterdir() if experts.is_dir() else ()
    return sorted(path.name for path in found if path.is_dir() and not path.name.startswith("."))


def set_aside(folder: Path) -> dict[str, Path]:
    """Return by name where the adapters of a bank are whose replacing was cut off before the new one had the name."""
    found = {name: path for name, kind, path in _left_behind(folder) if kind == "old"}
    return {name: path for name, path in found.items() if not os.path.lexists(folder / EXPERTS / name)}


def tidy_up(folder: Path) -> None:
    """Give adapters that were set aside their names again, and delete what else cut-off additions have left."""
    for name, path in set_aside(folder).items():
        path.rename(folder / EXPERTS / name)
        logger.warning("%s has its place again; adding another one was cut off", printable(name, 100))
    for _, _, path in _left_behind(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _left_behind(folder: Path) -> list[tuple[str, str, Path]]:
    """Return what additions that were cut off have left: the adapter's name, `partial` or `old`, and where it is."""
    experts = folder / EXPERTS
    found = [(LEFT_BEHIND.fullmatch(path.name), path) for path in experts.iterdir()] if experts.is_dir() else []
    return [(match["name"], match["kind"], path) for match, path in found if match]


def read_questions(folder: Path) -> frozenset[bytes]:
    """Read the keys of an adapter's training questions from its folder.

    Raises:
        CoterieError: when the file is missing or broken.
    """
    file = folder / QUESTIONS_FILE
    record = read_json(file, MAX_QUESTIONS_FILE)
    keys: frozenset[bytes] = frozenset()
    with suppress(KeyError, TypeError, ValueError):
        keys = frozenset(map(bytes.fromhex, record["keys"]))
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise CoterieError(f"{file} holds no keys of questions; add the adapter again with --overwrite")
    return keys


def leaks(bank: BankFolder, examples: Sequence[Example]) -> dict[str, int]:
    """Find the adapters that are known to have been trained on questions of these examples, and on how many.

    The examples are such as a task's shots or test set. A question counts as the same whatever its letter case and
    white space. An adapter whose training questions are unknown is never reported: that it is missing says nothing.

    Raises:
        CoterieError: when the file of an adapter's questions is missing or broken.
    """
    asked = [text_key(question_of(example)) for example in examples]
    counts = {}
    for name in bank.names:
        known = bank.trained_on(name) or frozenset()
        counts[name] = sum(key in known for key in asked)
    return {name: count for name, count in counts.items() if count}
