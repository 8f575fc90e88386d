"""Cards: what is known of every adapter of a bank, read from its files; no code is run and nothing is unpickled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from torch import nn

from coterie.artifacts import MAX_TENSOR_FILE, read_json, sha256_of
from coterie.backbone.aliases import named_model
from coterie.errors import CoterieError
from coterie.experts.bank import CONFIG_FILE, MAX_TEXT_FILE, WEIGHTS_FILE, load_adapter
from coterie.records.wording import printable

CARD_FILE = "card.json"
README_FILE = "README.md"
MAX_FRONT_MATTER = 2**14  # characters
MAX_LABEL = 100  # characters
MAX_LABELS = 20
ADAPTER_FILES = {CONFIG_FILE: MAX_TEXT_FILE, WEIGHTS_FILE: MAX_TENSOR_FILE, README_FILE: MAX_TEXT_FILE}
"""The files of an adapter that are ever read or copied, and their largest size; the last one may be missing."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Card:
    """One adapter of a bank, as its `card.json` holds it.

    Attributes:
        name: its name in the bank.
        source: folder or hub id as it was given.
        sha256: of `adapter_config.json` and `adapter_model.safetensors`.
        base: what `adapter_config.json` names as its base model.
        rank: the largest of its layers.
        layers: layers it changes.
        parameters: numbers in all its factors.
        licence: from the front matter of its README.
        datasets: from there too.
        rows: training rows whose questions are known; None: unknown.
        trained_on: where those rows came from, as it was given.
    """

    name: str
    source: str
    sha256: str
    base: str | None
    rank: int
    layers: int
    parameters: int
    licence: str | None
    datasets: tuple[str, ...]
    rows: int | None
    trained_on: tuple[str, ...] = ()


_CARD = TypeAdapter(Card)


def describe_adapter(
    folder: Path, model: nn.Module, *, name: str, source: str, rows: int | None = None, trained_on: Sequence[str] = ()
) -> Card:
    """Check an adapter, whose files `check_files` has seen, against the base model and make its card.

    Raises:
        CoterieError: as `load_adapter`.
    """
    base = read_json(folder / CONFIG_FILE, MAX_TEXT_FILE).get("base_model_name_or_path")
    pairs = load_adapter(folder, model).values()
    facts = _front_matter(folder / README_FILE)
    return Card(
        name=name,
        source=printable(source, 1000),
        sha256=hash_adapter(folder),
        base=printable(named_model(base), 200) if isinstance(base, str) and base else None,
        rank=max(len(pair.down) for pair in pairs),
        layers=len(pairs),
        parameters=sum(pair.down.numel() + pair.up.numel() for pair in pairs),
        licence=", ".join(labels(facts.get("license"))) or None,
        datasets=labels(facts.get("datasets")),
        rows=rows,
        trained_on=tuple(trained_on),
    )


def check_files(folder: Path) -> None:
    """Make sure that a folder holds an adapter's files: regular ones, not too large, none a link to somewhere else.

    Raises:
        CoterieError: naming the first file that is missing or wrong.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CoterieError(f"{folder} holds no {CONFIG_FILE}, so it is no adapter; give a PEFT folder")
    if not (folder / WEIGHTS_FILE).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if not pickles:
            raise CoterieError(f"{folder} holds no {WEIGHTS_FILE}; get or train the adapter again")
        raise CoterieError(
            f"{folder} holds {printable(pickles[0], MAX_LABEL)}, but only safetensors are read, since unpickling can "
            "run code; where you trust the file, load it with PEFT and call save_pretrained, which writes safetensors"
        )
    for file, limit in ((folder / name, limit) for name, limit in ADAPTER_FILES.items()):
        if not file.exists():
            continue
        # the hub's cache keeps the files of its snapshots, at any depth, as links to blobs beside them
        target, own = file.resolve(), file.parent.resolve()
        is_blob = any(place.name == "snapshots" and target.parent == place.parent / "blobs" for place in own.parents)
        if target.parent != own and not is_blob:
            raise CoterieError(f"{file} is a link to another folder, which is not followed; put the file itself there")
        if not file.is_file():
            raise CoterieError(f"{file} is not a regular file; get the adapter again")
        size = file.stat().st_size
        if size > limit:
            raise CoterieError(f"{file} has {size:,} bytes, more than the {limit:,} that are accepted; check the file")


def hash_adapter(folder: Path) -> str:
    """Return the SHA-256 of an adapter's configuration and weights."""
    return sha256_of(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def read_card(folder: Path) -> Card:
    """Read the card of an adapter in a bank.

    Raises:
        CoterieError: when it is missing or broken, or another adapter's.
    """
    file = folder / CARD_FILE
    record = read_json(file, MAX_TEXT_FILE)
    try:
        card = _CARD.validate_python(record)
    except ValidationError as error:
        raise CoterieError(f"{file} is no adapter's card; add the adapter again with --overwrite") from error
    if card.name != folder.name:
        raise CoterieError(f"{file} is the card of {card.name!r}; give the folder that name again, or add it again")
    return card


def _front_matter(file: Path) -> dict[str, Any]:
    """Read the YAML at the head of a README; return {} if there is no valid front matter."""
    if not file.exists():
        return {}
    head, *rest = file.read_text(encoding="utf-8", errors="replace").split("\n---", 1)
    if not rest or not head.startswith("---") or len(head) > MAX_FRONT_MATTER:
        return {}
    try:
        # The base loader makes texts, lists and objects only: no tags, and no merging that could grow without end.
        found = yaml.load(head, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def labels(value: object) -> tuple[str, ...]:
    """Return what a card gives as a text or a list of them, fit to be shown; everything else is left out."""
    values = value if isinstance(value, list) else [value]
    texts = [printable(text.strip(), MAX_LABEL) for text in values if isinstance(text, str)]
    return tuple(text for text in texts if text not in ("", "null", "~"))[:MAX_LABELS]


def short(count: int) -> str:
    """Write a count with a unit, such as 2.4M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
