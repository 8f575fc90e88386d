"""How a function and its settings become a command: flags in panels, an example, a row of the table of commands."""

import inspect
import os
import re
import shlex
import textwrap
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar, get_args

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from coterie.artifacts import as_path, read_json
from coterie.errors import shown
from coterie.launcher import launched, wants_sharding
from coterie.ranks import alone, is_quiet, needs_it_whole
from coterie.records.mixture import MIXTURE_FILE
from coterie.settings.old_spellings import is_old
from coterie.settings.places import target
from coterie.settings.reading import FLAGS, Settings, flag_of, flat_fields, from_flat

PANELS = {
    "Make a mixture": ("methods", "fit", "train-extras"),
    "Ask it": ("route", "generate", "plan", "serve", "export", "push"),
    "Compare methods": ("eval", "report", "spread"),
    "Adapters, experts and data that exist already": ("bank", "select", "gather", "influence", "experts", "profile"),
    "Again": ("run", "status"),
    "This machine": ("doctor",),
}
"""The commands in the order in which one comes to use them, as help shows them."""

ARGUMENTS = ("mixture", "mixtures", "folder", "adapters", "name", "repository")
"""Settings that are given by place instead of by a flag."""
WIDEST_TYPE = 24  # characters; help at 80 columns cuts names off beside wider ones
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, one object a line")]
Function = TypeVar("Function", bound=Callable[..., None])


class _OrderedGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 - typer keeps click's context to itself
        names = super().list_commands(ctx)
        return [name for panel in PANELS.values() for name in panel if name in names]


class _ShortHelp(TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Show only that spelling of a switch which changes something, so that no name is too long for its column."""
        shortened = copy(self)  # what is typed next is read by the switches as they are
        shortened.params = [copy(one) for one in self.params]
        for switch in (one for one in shortened.params if isinstance(one, TyperOption) and one.secondary_opts):
            if switch.default:
                switch.opts, switch.help = switch.secondary_opts, f"turn off: {switch.help}"
            switch.secondary_opts, switch.show_default = [], False
        super(_ShortHelp, shortened).format_help(ctx, formatter)


app = typer.Typer(
    help="Train, select, route, combine and serve LoRA experts for language models.",
    no_args_is_help=True,
    cls=_OrderedGroup,
    add_completion=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
GROUPS = {
    "fit": typer.Typer(help="Make a mixture by one of the published methods.", no_args_is_help=True),
    "bank": typer.Typer(help="Keep adapters of one base model in a folder, each checked.", no_args_is_help=True),
    "experts": typer.Typer(help="List experts by name: adapters, models, endpoints.", no_args_is_help=True),
}
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name, rich_help_panel=PANEL_OF[_name])


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        function: does it; gets the settings first, and what else the command takes by name.
        settings: their fields are its flags; None where it has none.
        takes_prompts: whether it takes prompts besides, so that its settings do not say all that it does.
    """

    function: Callable[..., None]
    settings: type[Settings] | None
    takes_prompts: bool


EVALUATE = "coterie eval {mixture} --data test.jsonl --output {mixture}-eval"
NEXT = {
    "methods": "coterie fit elrea --model smollm2-135m --data train.jsonl --output runs/elrea",
    "fit elrea": "coterie generate {output} 'What do 5 pens cost?'",
    "fit auto": "coterie generate {output} 'What do 5 pens cost?'",
    "fit token-level": "coterie generate {output} 'What do 5 pens cost?' --show-weights",
    "fit from-adapters": "coterie generate {output} 'What do 5 pens cost?'",
    "fit kshot-moe": "coterie generate {output} 'What do 5 pens cost?'",
    "fit kshot-auto": "coterie generate {output} 'What do 5 pens cost?'",
    "fit symbolic-moe": "coterie generate {output} 'What do 5 pens cost?'",
    "train-extras": EVALUATE + " --methods {methods}",
    "route": "coterie generate {mixture} {prompts}",
    "generate": EVALUATE,
    "plan": "coterie generate {mixture} {prompts}",
    "serve": "coterie generate {mixtures_0} 'What do 5 pens cost?'",
    "export": "cat {output}/README.md",
    "push": "python3 -m webbrowser https://huggingface.co/{repository}",
    "eval": "coterie report {output}",
    "status": "coterie run {folder}/run.yaml --overwrite",
    "report": "python3 -m webbrowser {evaluation}/report.html",
    "spread": "coterie report {evaluations_0}",
    "bank add": "coterie fit from-adapters --bank {folder} --output runs/shelf",
    "bank remove": "coterie fit from-adapters --bank {folder} --output runs/shelf",
    "bank find": "coterie bank add bank/ OWNER/NAME --model {base}",
    "bank list": "coterie fit from-adapters --bank {folder} --output runs/shelf",
    "bank verify": "coterie fit from-adapters --bank {folder} --output runs/shelf",
    "select": "coterie fit kshot-auto --bank {folder} --shots {shots} --selected {output} --output runs/task",
    "gather": "coterie fit kshot-auto --bank bank/ --shots {shots} --gathered {output} --output runs/task",
    "influence": "coterie fit elrea --model {base} --data {output}/chosen.jsonl --output runs/chosen",
    "experts init": "coterie profile {folder} --data val.jsonl",
    "experts add": "coterie profile {folder} --data val.jsonl --overwrite",
    "experts list": "coterie profile {folder} --data val.jsonl",
    "experts remove": "coterie profile {folder} --data val.jsonl --overwrite",
    "profile": "coterie fit symbolic-moe --experts {folder} --output runs/sym",
    "doctor": "coterie fit elrea --model smollm2-135m --data train.jsonl --output runs/elrea",
}
"""What one types after a command, with what it was given in its place; prompts and data are the user's own.

`coterie run` ends with what follows the command that it repeats.
"""

COMMANDS: dict[str, Command] = {}
"""Every command by its full name, such as "fit elrea": what is typed, and what `coterie run` repeats."""


SHARED = ("fit elrea", "fit auto", "fit token-level", "fit kshot-moe", "fit kshot-auto", "train-extras", "influence")
"""The commands whose work several processes share that were launched together."""


def do(name: str, settings: Settings | None, **extra: Any) -> None:  # noqa: ANN401 - what a command takes
    """Run a command; of several processes that were launched, the first one alone does what cannot be shared."""
    number, total = launched()
    function = partial(COMMANDS[name].function, *([] if settings is None else [settings]), **extra)
    if name in SHARED:
        function()
        return
    if total > 1:
        if wants_sharding():
            raise needs_it_whole(name)
        echo(f"{name} is done by one of the {total} processes alone", err=True)
    if number == 0:
        with alone():
            function()


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text, much of which is others': names, answers, records. Nothing in it acts on a terminal.

    What JSON prints keeps its meaning, since it is escaped in JSON's own way. Of several processes the first prints.
    """
    if is_quiet():
        return
    typer.echo(shown(str(text), keep="\n\t"), err=err, nl=nl)


def command(name: str, example: str) -> Callable[[Function], Function]:
    """Make a function a command; the fields of its settings become flags, and it gets the settings object itself."""

    def register(function: Function) -> Function:
        own = list(inspect.signature(function).parameters.values())
        kind = own.pop(0).annotation if own and own[0].name == "settings" else None
        COMMANDS[name] = Command(function, kind, any(parameter.name == "prompts" for parameter in own))

        def run(**values: Any) -> None:
            extra = {parameter.name: values.pop(parameter.name) for parameter in own}
            given = {name: value for name, value in values.items() if value is not None}
            settings = None if kind is None else from_flat(kind, given)
            do(name, settings, **extra)
            if name != "run":  # which ends as the command that it repeats
                tell_next(name, settings, **extra)

        flags = ([] if kind is None else _flags(kind)) + [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature(sorted(flags, key=lambda p: p.name not in ARGUMENTS))  # pyrefly: ignore
        run.__annotations__ = {flag.name: flag.annotation for flag in flags}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        group, _, last = name.rpartition(" ")
        panel = None if group else PANEL_OF[name]
        place = GROUPS[group] if group else app
        bound = re.sub(r"(--\S+) (?!-)", "\\1\N{NO-BREAK SPACE}", example)  # a flag and its value stay together
        lines = textwrap.wrap(bound, 72, break_long_words=False, break_on_hyphens=False)
        epilog = "Example:\n\n" + " \\\n    ".join(lines).replace("\N{NO-BREAK SPACE}", " ")
        place.command(last, cls=_ShortHelp, epilog=epilog, rich_help_panel=panel)(run)
        return function

    return register


def tell_next(name: str, settings: Settings | None, **extra: Any) -> None:  # noqa: ANN401 - what a command takes
    """Tell on stderr, which keeps results on stdout apart, what a command wrote and what to type after it."""
    written = None if settings is None else target(settings)
    if written and os.path.lexists(as_path(written)):
        echo(f"wrote {written}", err=True)
    places = {}
    for field, value in {**extra, **({} if settings is None else dict(settings))}.items():
        given = [str(one) for one in (value if isinstance(value, list) else [value])]
        if field == "mixtures":  # NAME=FOLDER, or a folder alone
            given = [one.partition("=")[2] or one for one in given]
        texts = [shlex.quote(one.rstrip("/") or "/") for one in given]
        places |= {field: (" " if field == "prompts" else f" --{field} ").join(texts), f"{field}_0": "".join(texts[:1])}
    if extra.get("input"):
        places["prompts"] = f"--input {places['input']}"
    if "{base}" in NEXT[name] and "base" not in places:
        described = as_path(vars(settings)["mixture"]) / MIXTURE_FILE
        places["base"] = shlex.quote(read_json(described)["base_model"]["id"]) if described.is_file() else "MODEL"
    following = NEXT[name].format(**places)
    alike = "" if "{output}/" in NEXT[name] else _read_alike(following, settings)  # its own rows need no --map
    echo(f"next: {following}{alike}", err=True)


def _read_alike(following: str, settings: Settings | None) -> str:
    """Return the flags with which the next command reads the same rows as this one, such as --map; none if it does not.

    A mixture itself keeps how its rows were read.
    """
    reading = getattr(settings, "reading", None)
    again = next((one for name, one in COMMANDS.items() if following.startswith(f"coterie {name} ")), None)
    if reading is None or again is None or again.settings is None or "reading" not in again.settings.model_fields:
        return ""
    if again.takes_prompts and "--input" not in following:
        return ""
    given = [(name, value) for name, value in reading.model_dump().items() if value]
    several = [(name, one) for name, value in given for one in (value if isinstance(value, list) else [value])]
    return "".join(f" {flag_of(name)} {shlex.quote(one)}" for name, one in several)


def _flags(kind: type[Settings]) -> list[inspect.Parameter]:
    flags = []
    for name, field, group in flat_fields(kind):
        old = is_old(kind.command, name)
        choices = [one for one in get_args(field.annotation) if isinstance(one, str)]
        kind_of_value = "<choice>" if len("|".join(choices)) > WIDEST_TYPE else None  # its help names the choices
        words = [FLAGS[name]] if name in FLAGS else []
        option = typer.Option(*words, help=field.description, rich_help_panel=group, hidden=old, metavar=kind_of_value)
        place = typer.Argument(help=field.description) if name in ARGUMENTS else option
        default = inspect.Parameter.empty if field.is_required() else None if old else field.default
        annotation: Any = Annotated[field.annotation, place]  # pyrefly: ignore
        flags.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return flags
