"""What a folder of ours is, told by the file that marks it, for whoever gives one in another one's place."""

import shlex
from pathlib import Path

from coterie.errors import CoterieError

KSHOT = "coterie fit kshot-moe --bank bank/ --shots shots.jsonl --output runs/task"
KINDS = {
    "mixture.json": ("a mixture", "coterie eval {0} --data test.jsonl --output {0}-eval"),
    "bank.json": ("a bank", "coterie fit from-adapters --bank {0} --output runs/shelf"),
    "pool.json": ("a list of experts", "coterie profile {0} --data val.jsonl"),
    "evaluation.json": ("an evaluation", "coterie report {0}"),
    "selection.json": ("a choice of adapters", KSHOT + " --selected {0}"),
    "gather.json": ("a folder of gathered rows", KSHOT + " --gathered {0}"),
    "adapter_config.json": ("an adapter", "coterie bank add bank/ {0} --model MODEL"),
    "config.json": ("a base model", "coterie fit elrea --model {0} --data train.jsonl --output runs/elrea"),
}
"""By the file that only such a folder has: what it is, and the command that takes it."""


MADE_OF = {("bank.json", "mixture.json"): "coterie bank add bank/ {0}/experts/* --model MODEL"}
"""What makes a folder of the first kind from one of the second."""


def check_kind(folder: Path, marker: str) -> None:
    """Refuse a folder of another kind than the one that a file marks; one of none is left to its reader.

    Raises:
        CoterieError: saying what it is, and which command takes it.
    """
    if (folder / marker).exists():
        return
    for file, (kind, command) in KINDS.items():
        if (folder / file).is_file():
            typed = MADE_OF.get((marker, file), command).format(shlex.quote(str(folder)))
            raise CoterieError(f"{folder} is {kind}, not {KINDS[marker][0]}; type: {typed}")
