"""Old spellings of commands and flags: they work for one more release, hidden from help.

On the command line each costs one line that names the new spelling; in YAML files, in records of runs and in Python
they are read as the new ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

TO_EXTRAS = "coterie train-extras"

OLD_SPELLINGS = (
    # command, old flag ("" where the command itself has a new name), new spelling
    ("bank build", "", "fit from-adapters"),
    *((f"pool {what}", "", f"experts {what}") for what in ("init", "add", "list", "remove")),
    ("fit symbolic-moe", "--pool", "--experts"),
    ("fit kshot-moe", "--top-k", "--top-k-experts"),
    ("eval", "--shots", "--few-shot"),
    ("eval", "--shot-count", "--few-shot-count"),
    ("eval", "--encoder", f"{TO_EXTRAS} --encoder"),
    ("eval", "--ensemble-size", f"{TO_EXTRAS} --ensemble-size"),
    ("eval", "--gate-epochs", f"{TO_EXTRAS} --gate-epochs"),
    ("eval", "--gate-learning-rate", f"{TO_EXTRAS} --gate-learning-rate"),
    ("eval", "--lorahub-steps", f"{TO_EXTRAS} --lorahub-steps"),
    ("eval", "--judge-folds", f"{TO_EXTRAS} --judge-folds"),
)
"""What was renamed. A flag that moved to another command is still understood by its old one."""


def current_words(words: Sequence[str], tell: Callable[[str], None]) -> list[str]:
    """Put new spellings in the place of old ones in a command line, telling each once."""
    words = list(words)
    for command, old, new in OLD_SPELLINGS:
        start = len(command.split())
        if words[:start] != command.split():
            continue
        if not old:
            words[:start] = new.split()
            tell(f"coterie {command} is now called: coterie {new}")
            continue
        found = [place for place, word in enumerate(words) if word.partition("=")[0] == old]
        for place in found if new.startswith("--") else []:
            words[place] = new + words[place].removeprefix(old)
        if found:
            tell(f"{old} of coterie {command} is now called: {new}")
    return words


def current_command(name: str) -> str:
    """Return what a command is called today."""
    return {command: new for command, old, new in OLD_SPELLINGS if not old}.get(name, name)


def current_names(command: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put the new names in the place of old ones among a command's settings."""
    renamed = {_field(old): _field(new) for name, old, new in OLD_SPELLINGS if name == command and new.startswith("--")}
    return {renamed.get(name, name): value for name, value in values.items()}


def is_old(command: str, field: str) -> bool:
    """Tell whether a command's flag is an old one that it only still understands."""
    return any(name == command and _field(old) == field for name, old, _ in OLD_SPELLINGS)


def _field(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
