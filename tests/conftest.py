"""Fixtures: one tiny base model, and one tiny mixture fitted on it, for all tests of a process."""

import ast
import contextlib
import dataclasses
import functools
import gc
import inspect
import shutil
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import jinja2
import pytest
import typer
from beartype import BeartypeConf, beartype
from jaxtyping._import_hook import JaxtypingTransformer

from coterie.cli.process import bound_spinning

bound_spinning()  # before torch is loaded


def check_what_tells() -> None:
    """Leave out checks that take time and tell nothing.

    Functions within functions stay unchecked: their checks would be compiled anew at every call of the outer one.
    Where no annotation names an array, types are checked without a record of shapes; where one does, arguments are
    checked once, and not again with what is returned.
    """
    check, record_shapes = JaxtypingTransformer.visit_FunctionDef, jaxtyping.jaxtyped
    JaxtypingTransformer.visit_FunctionDef = lambda self, node: (
        node if isinstance(self._parents[-1], ast.FunctionDef) else check(self, node)
    )
    JaxtypingTransformer.visit_AsyncFunctionDef = lambda self, node: node

    def names(kind: type, hint: object) -> bool:
        parts = hint if isinstance(hint, list) else typing.get_args(hint)
        return isinstance(hint, kind) or any(names(kind, part) for part in parts)

    check_types = beartype(conf=BeartypeConf(violation_type=TypeError))  # as jaxtyping's, and as Python's own

    def jaxtyped(typechecker: Callable[..., Any]) -> Callable[..., Any]:
        def checked(target: Any) -> Any:
            hints = [*target.__annotations__.values()] if inspect.isfunction(target) else [""]
            if inspect.isgeneratorfunction(target) or names(str, hints):  # what beartype alone would not take
                return record_shapes(typechecker=typechecker)(target)
            typed = check_types(target)
            return record_shapes(typechecker=None)(typed) if names(type(jaxtyping.AbstractArray), hints) else typed

        return checked

    jaxtyping.jaxtyped = jaxtyped


check_what_tells()  # before the package is loaded

import tiny
from coterie import cli, methods
from coterie.backbone.loading import Backbone, load_backbone
from coterie.cli.table import COMMANDS
from coterie.experts.expert_pool import init_pool
from coterie.methods.elrea.methods import METHODS
from coterie.methods.family import MethodGrid
from coterie.methods.registry import load_grid, train_extras
from coterie.mixture import Mixture
from coterie.settings.commands import ExpertPoolSettings, TrainExtrasSettings
from coterie.settings.groups import ExtrasSettings, ModelSettings, PlacementSettings
from kshot_place import bank, pool_file, shelf  # noqa: F401 - fixtures
from served import breaking, client, server  # noqa: F401 - fixtures
from stub_server import serving
from symbolic_place import EXPERTS, Place, respond, rows
from tiny import write_rows

FIT = {
    "clusters": 3,
    "cluster_rounds": 1,
    "d_proj": 256,
    "learning_rate": 1e-2,
    "expert_learning_rate": 5e-3,
    "batch_size": 8,
    "epochs": 2,
    "expert_epochs": 1,
}
"""Settings of the tiny mixture: learning rates at which a random model moves in a few steps."""


GRID = ExtrasSettings(encoder="hidden", ensemble_size=2, gate_learning_rate=1e-2)
"""Settings of what is trained beyond it."""


def pytest_collection_finish():
    """Keep what was imported out of later searches for garbage: Trainer makes a full one after every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory):
    """Keep the user's cache out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def cards_compiled_once():
    """PEFT compiles the template of its card anew for every adapter that it saves: a fifth of a tiny fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def backbone(model_folder: Path) -> Backbone:
    return load_backbone(ModelSettings(model=str(model_folder), device="cpu"))


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny.make_rows(36))


@pytest.fixture(scope="session")
def run_folder(model_folder: Path, train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "elrea"
    methods.elrea(str(model_folder), str(train_file), output=output, device="cpu", **FIT)
    return output


@pytest.fixture(scope="session")
def mixture(run_folder: Path) -> Mixture:
    return Mixture.from_pretrained(run_folder, device="cpu")


@pytest.fixture(scope="session")
def grid_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the fitted run, in which everything that any method needs beyond it was trained."""
    folder = tmp_path_factory.mktemp("grid") / "run"
    shutil.copytree(run_folder, folder)
    train_extras(TrainExtrasSettings(mixture=str(folder), placement=PlacementSettings(device="cpu"), extras=GRID))
    return folder


@pytest.fixture(scope="session")
def grid(grid_folder: Path) -> MethodGrid:
    return load_grid(Mixture.from_pretrained(grid_folder, device="cpu"), list(METHODS))


command_of = functools.cache(typer.main.get_command)  # which makes some forty commands anew at every call


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; return exit code, stdout and stderr."""
    monkeypatch.setattr(typer.main, "get_command", command_of)

    def command(*words: object):
        monkeypatch.setattr(sys, "argv", ["coterie", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return command


@pytest.fixture
def called(monkeypatch):
    """Calls of commands, each with its name and settings, in place of what they do."""
    calls = []
    for name, command in COMMANDS.items():
        note = lambda *settings, name=name, **extra: calls.append((name, *settings))  # noqa: E731
        monkeypatch.setitem(COMMANDS, name, dataclasses.replace(command, function=note))
    return calls


@contextlib.contextmanager
def placed(folder: Path) -> Iterator[Place]:
    with serving(respond) as stub:
        experts = [f"{name}={stub.url}#{model}" for name, model in EXPERTS.items()]
        init_pool(ExpertPoolSettings(folder=str(folder / "pool"), expert=experts))
        yield Place(stub, folder)


@pytest.fixture
def place(tmp_path):
    with placed(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def fitted_once(tmp_path_factory):
    """The pool profiled on ten questions, and fitted."""
    with placed(tmp_path_factory.mktemp("fitted")) as made:
        data = write_rows(made.folder / "val.jsonl", rows(10))
        methods.profile_pool(made.pool, data=[data], encoder="none", retries=0)
        methods.symbolic(made.pool, output=made.folder / "run", retries=0)
        yield made


@pytest.fixture
def fitted(fitted_once, tmp_path):
    """A copy of it to work with; its server answers as at first."""
    shutil.copytree(fitted_once.folder, tmp_path, dirs_exist_ok=True)
    fitted_once.stub.respond = respond
    return Place(fitted_once.stub, tmp_path)
