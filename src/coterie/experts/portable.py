"""Folders that leave this machine: adapters that name their base model as the hub does, and no place of this disk."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coterie.artifacts import check_tree, read_json, read_text, write_json, write_text
from coterie.backbone.aliases import ALIASES, hub_name
from coterie.backbone.loading import BaseModelIdentity
from coterie.errors import CoterieError
from coterie.experts.bank import CONFIG_FILE
from coterie.experts.cards import README_FILE

LEFT_OUT = shutil.ignore_patterns("*.jsonl", ".*")
"""Rows, logs and locks, which no answer needs."""


def name_base_model(identity: BaseModelIdentity, named: str | None) -> BaseModelIdentity:
    """Return the base model's identity as strangers can load it: by an alias, by hub id, or as it is named.

    Whoever loads it compares its weights with the hash, so a wrong name is noticed there.

    Raises:
        CoterieError: when the base model lies in a folder of this machine and no name is given.
    """
    if named is not None:
        return BaseModelIdentity(named, None, identity.sha256, identity.config_sha256)
    if identity.id in ALIASES or identity.revision:
        return identity
    raise CoterieError(
        f"the base model is {identity.id} on this machine, which nobody else has; say what the hub calls it with "
        "--base-model OWNER/NAME"
    )


def copy_portable(source: Path, target: Path, names: Iterable[str], base: BaseModelIdentity) -> None:
    """Copy parts of a folder, large files as links, with adapters that PEFT loads on the base model from anywhere.

    Raises:
        CoterieError: when the folder holds what nobody made who made it, such as a link to somewhere else.
    """
    check_tree(source)
    for part in (source / name for name in names):
        if part.is_dir():
            shutil.copytree(part.resolve(), target / part.name, copy_function=os.symlink, ignore=LEFT_OUT)
        elif part.exists():
            shutil.copyfile(part, target / part.name)
    said = {"base_model_name_or_path": hub_name(base.id), "revision": base.revision}
    for file in target.rglob(CONFIG_FILE):
        before = read_json(file)
        write_json(file, before | said)
        readme, named = file.with_name(README_FILE), before.get("base_model_name_or_path")
        if readme.exists() and isinstance(named, str) and named:  # PEFT's own card names it too
            write_text(readme, read_text(readme).replace(named, hub_name(base.id)))


def without_places(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Return a JSON value in which files and folders of this machine are called by their own names alone.

    So a text must be no prompt: one that begins with a slash is taken for a path. NAME=FILE keeps its name.
    """
    if isinstance(value, dict):
        return {name: without_places(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one) for one in value]
    if not isinstance(value, str):
        return value
    label, equals, file = value.partition("=")
    if equals and not _is_place(value):
        return f"{label}={without_places(file)}"
    return Path(value).name if _is_place(value) else value


def _is_place(text: str) -> bool:
    return text.startswith(("/", "~", ".")) or os.path.lexists(text)
