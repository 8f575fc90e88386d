"""The commands on what was run before: it is run again from its record, or looked at."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

import coterie
from coterie.artifacts import as_path, read_run_record
from coterie.cli.table import COMMANDS, AsJson, command, do, echo, tell_next
from coterie.cluster import done_by_workers, work_in
from coterie.errors import CoterieError
from coterie.records.wording import printable
from coterie.settings.places import WRITTEN_IN_PLACE, sources, target
from coterie.settings.reading import Settings, checked

LONGEST_LINE = 1000  # characters
REMOVES = ("bank remove", "experts remove")
"""What no record asks for: a stranger's would delete what is not its own."""


@command("run", "coterie run runs/elrea/run.yaml")
def repeat(
    records: Annotated[list[Path], typer.Argument(help="run folders, their run.yaml, or YAML files of settings")],
    overwrite: Annotated[bool, typer.Option(help="replace what is there; a record alone cannot ask for it")] = False,
    ray: Annotated[bool, typer.Option(help="several at once, by workers on a Ray cluster")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="workers that run at once, with --ray; default: 2")] = None,
) -> None:
    """Repeat runs from their records, or run YAML files' settings, after telling what is read, written and replaced.

    Seeds of a fit and of its evaluation are records that differ in a word; workers share them out with --ray.
    """
    if workers and not ray:
        raise CoterieError(f"--workers {workers} does not act without --ray; leave it out, or add --ray")
    records = [record / "run.yaml" if record.is_dir() else record for record in records]
    asked = [_recorded(record, overwrite) for record in records]
    for record, settings in zip(records, asked, strict=True):
        echo(_announcement(record, settings), err=True)
    if ray:
        calls = [(os.getcwd(), record, overwrite) for record in records]
        for place, _ in done_by_workers(repeated, calls, workers=workers or 2):
            echo(f"{records[place]}: done")
        return
    for settings in asked:
        do(settings.command, settings)
        tell_next(settings.command, settings)


def repeated(folder: str, record: Path, overwrite: bool) -> None:
    """Repeat a run from its record, in a folder (runs in a worker)."""
    work_in(folder)
    settings = _recorded(record, overwrite)
    do(settings.command, settings)


def _recorded(record: Path, overwrite: bool) -> Settings:
    """Return the settings of a command that can be repeated; of a run that was broken off, those of its other try."""
    unfinished = record.parent.parent / f"{record.parent.name}.partial" / record.name
    found = read_run_record(record if record.exists() or not unfinished.exists() else unfinished)
    again = COMMANDS.get(found["command"])
    known = [name for name, one in COMMANDS.items() if one.settings and not one.takes_prompts and name not in REMOVES]
    if again is None or again.settings is None or found["command"] not in known:
        raise CoterieError(f"{record} records {found['command'][:80]!r}; these can be repeated: {', '.join(known)}")
    settings = checked(again.settings, found["settings"])
    if "overwrite" in type(settings).model_fields:
        settings = settings.model_copy(update={"overwrite": overwrite})
    return settings


@command("status", "coterie status runs/elrea")
def status(
    folder: Annotated[Path, typer.Argument(help="the --output of a command, finished or not")], as_json: AsJson = False
) -> None:
    """Tell what there is of a run, and which stages the same command would make again by now, and why."""
    kinds = {name: one.settings for name, one in COMMANDS.items() if one.settings}
    found = coterie.run_status(folder, kinds)
    echo(json.dumps(found.record()) if as_json else str(found))


def _announcement(record: Path, settings: Settings) -> str:
    """Tell what a command will read, write and replace: its record may be a stranger's."""
    reads = [f"{name} {value}" for name, values in sources(settings).items() for value in values]
    written = target(settings)
    lines = [f"{record}: coterie {settings.command}"]
    lines += [f"  reads     {one}" for one in reads]
    if written is not None:
        place = as_path(written)
        lines.append(f"  {'adds to ' if settings.command in WRITTEN_IN_PLACE else 'writes  '}  {place}")
        if vars(settings).get("overwrite") and os.path.lexists(place):
            lines.append(f"  replaces  {place / 'profile' if settings.command == 'profile' else place}")
    if vars(settings).get("allow_code_execution"):
        lines.append("  runs      the code that models write, in a limited child process")
    return "\n".join(printable(line, LONGEST_LINE) for line in lines)
