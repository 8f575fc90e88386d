"""The commands on adapters, experts and data that exist already: banks, lists of experts, what is chosen from them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import coterie
from coterie.artifacts import as_path
from coterie.cli.process import TROUBLE
from coterie.cli.table import AsJson, command, echo
from coterie.errors import CoterieError
from coterie.settings.commands import (
    BankAddSettings,
    BankRemoveSettings,
    BankVerifySettings,
    ExpertAddSettings,
    ExpertPoolSettings,
    ExpertRemoveSettings,
    GatherSettings,
    ProfileSettings,
    SelectSettings,
)
from coterie.settings.hub import BankFindSettings
from coterie.settings.influence import InfluenceSettings


@command("bank add", "coterie bank add bank/ maths=./my-lora --model smollm2-135m --trained-on maths=gsm8k.jsonl")
def add_to_bank(settings: BankAddSettings) -> None:
    """Put adapters into a bank on disk: each is checked, then copied."""
    refused = []
    for adapter in coterie.methods.add_to_bank(settings):
        echo(str(adapter), err=bool(adapter.refusal))
        refused += [adapter.name] if adapter.refusal else []
    if len(refused) < len(settings.adapters):
        _tell_bank(settings.folder)
    if refused:
        raise typer.Exit(TROUBLE)


@command("bank remove", "coterie bank remove bank/ maths")
def remove_from_bank(settings: BankRemoveSettings) -> None:
    """Take adapters out of a bank on disk, whole and for good."""
    coterie.bank_remove(settings.folder, settings.name)
    for name in settings.name:
        echo(f"removed {name}")
    _tell_bank(settings.folder)


@command("bank list", "coterie bank list bank/")
def list_bank(folder: Annotated[Path, typer.Argument(help="folder of the bank")], as_json: AsJson = False) -> None:
    """List the adapters of a bank."""
    found = coterie.open_bank(folder)
    for line in [json.dumps(vars(card)) for card in found.cards] if as_json else [found]:
        echo(line)


@command("bank verify", "coterie bank verify bank/")
def verify_bank(settings: BankVerifySettings, as_json: AsJson = False) -> None:
    """Hash every adapter of a bank again, load it against the base model, and read its card."""
    wrong = 0
    for adapter in coterie.verify_bank(settings.folder, **settings.placement.model_dump()):
        echo(json.dumps(vars(adapter)) if as_json else adapter)
        wrong += adapter.trouble is not None
    if wrong:
        raise typer.Exit(TROUBLE)


@command("bank find", "coterie bank find --base smollm2-135m --licence apache-2.0,mit --max-rank 64")
def find_for_bank(settings: BankFindSettings, as_json: AsJson = False) -> None:
    """Find adapters on the model hub that fit a base model; rank, layers and licence are checked first."""
    found = []
    for adapter in coterie.find_adapters(settings):
        found.append(adapter)
        echo(json.dumps(vars(adapter)) if as_json else adapter, err=bool(adapter.refusal))
    if all(adapter.refusal for adapter in found):
        raise CoterieError(
            f"none of {len(found)} adapters that name {settings.base} will do; look at more with --limit, or at others "
            "with --search"
        )


@command("select", "coterie select bank/ --shots shots.jsonl --keep 4 --output runs/select")
def select(settings: SelectSettings, as_json: AsJson = False) -> None:
    """Choose adapters of a bank for a task of which a few examples are known (2408.15915)."""
    selected = coterie.methods.select_adapters(settings)
    echo(json.dumps(selected.record.plain()) if as_json else str(selected))
    if not as_json:
        total = len(selected.record.adapters)
        echo(f"{settings.output}: {len(selected.chosen)} of {total} adapters chosen: {', '.join(selected.chosen)}")


@command("gather", "coterie gather --shots shots.jsonl --pool dolly.jsonl --budget 1000 --output runs/gather")
def gather(settings: GatherSettings, as_json: AsJson = False) -> None:
    """Choose rows of open data that are similar to a task's examples and diverse among themselves (2408.15915)."""
    gathered = coterie.methods.gather_rows(settings)
    echo(json.dumps(gathered.summary) if as_json else str(gathered))


@command(
    "influence",
    "coterie influence runs/elrea --target few.jsonl --data many.jsonl --share 0.05 --output runs/influence",
)
def influence(settings: InfluenceSettings) -> None:
    """Find the rows of much data that would help most with a few, by gradients (LESS, 2402.04333)."""
    echo(coterie.methods.write_influence(settings))


@command(
    "experts init",
    "coterie experts init experts/ --expert base=smollm2-135m --expert big=http://127.0.0.1:8001/v1#some-model",
)
def init_pool(settings: ExpertPoolSettings) -> None:
    """Check experts and list them in a folder."""
    _list_pool(settings.folder, coterie.init_pool(settings))


@command("experts add", "coterie experts add experts/ --expert code=./my-lora")
def add_to_pool(settings: ExpertAddSettings) -> None:
    """Check more experts and add them to those that a folder lists."""
    _list_pool(settings.folder, coterie.add_experts(settings))


@command("experts list", "coterie experts list experts/ --json")
def list_pool(folder: Annotated[Path, typer.Argument(help="folder of the experts")], as_json: AsJson = False) -> None:
    """List the experts of a folder; whether they are still what they were is checked where they are used."""
    found = coterie.read_pool(folder, verify=False)
    echo("\n".join(json.dumps(vars(one)) for one in found.experts) if as_json else found)


@command("experts remove", "coterie experts remove experts/ big")
def remove_from_pool(settings: ExpertRemoveSettings) -> None:
    """Take experts out of a folder's list; their own files stay."""
    _list_pool(settings.folder, coterie.remove_experts(settings.folder, settings.name))


def _list_pool(folder: str, pool: Any) -> None:
    echo(pool)
    echo(f"{folder}: {len(pool.names)} experts")


@command("profile", "coterie profile experts/ --data val.jsonl")
def profile(settings: ProfileSettings, as_json: AsJson = False) -> None:
    """Find out what every expert is good at, skill by skill, on validation questions."""
    found = coterie.methods.profile_pool(settings)
    echo(json.dumps(found.record().plain()) if as_json else str(found))
    if not as_json:
        place = as_path(settings.folder) / "profile"
        echo(f"{place}: {len(found.rows)} questions, skills: {len(found.profile.skills)}")


def _tell_bank(folder: str) -> None:
    names = coterie.open_bank(folder).names
    echo(f"{folder}: {len(names)} adapter{'' if len(names) == 1 else 's'} ({', '.join(names)})")
