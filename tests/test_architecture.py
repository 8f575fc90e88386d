"""The rooms of the library depend in one direction only; the order below is the architecture."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "coterie"
ORDER = (
    "errors launcher ranks progress settings cluster artifacts records data grading lora backbone features experts "
    "routers combiners engine mixture methods evaluation report serve cli"
).split()
PROJECT = Path(__file__).parents[1]
ROOT = PROJECT / "src" / PACKAGE
LONGEST_FILE = 400
TRAINER, TRAINING = f"{PACKAGE}.experts.trainer", Path("experts") / "training.py"
"""The first loads transformers' trainer, for seconds that only a training is to pay; the second imports it in one."""


class OwnImport(NamedTuple):
    """One import of the package by itself: where it stands and the dotted module it names."""

    file: Path
    line: int
    module: str


def room_of(file: Path, root: Path) -> str:
    return file.relative_to(root).parts[0].removesuffix(".py")


def rooms(root: Path) -> set[str]:
    found = {room_of(file, root) for file in root.rglob("*.py")}
    return found - {"__init__", "__main__"}  # the doors belong to no room: they may name every room


def modules_named(node: ast.AST) -> list[str]:
    """The modules an import statement names; `from coterie import data` names coterie.data."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        if node.module == PACKAGE:
            return [f"{PACKAGE}.{alias.name}" for alias in node.names]
        return [node.module or ""]
    return []


def own_imports(tree: ast.AST, file: Path) -> Iterator[OwnImport]:
    for node in ast.walk(tree):
        for module in modules_named(node):
            if module.startswith(PACKAGE + "."):
                yield OwnImport(file, node.lineno, module)


def edges(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (room, imported room, place) for every import of one room by another."""
    for file in sorted(root.rglob("*.py")):
        here = room_of(file, root)
        if here in {"__init__", "__main__"}:
            continue
        for found in own_imports(ast.parse(file.read_text()), file):
            there = found.module.split(".")[1]
            if there != here:
                yield here, there, f"{file.relative_to(root)}:{found.line}"


def upward_imports(root: Path) -> list[str]:
    position = {room: number for number, room in enumerate(ORDER)}
    return [
        f"{place} imports {there}, which is not to the left of {here}"
        for here, there, place in edges(root)
        if position.get(there, len(ORDER)) > position.get(here, -1)
    ]


def imports_inside_functions(root: Path) -> list[str]:
    found = {
        f"{file.relative_to(root)}:{inner.line} imports {inner.module}"
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in own_imports(node, file)
        if (file.relative_to(root), inner.module) != (TRAINING, TRAINER)
    }
    return sorted(found)


def trainers_loaded_with_modules(root: Path) -> list[str]:
    """Imports of the trainer that do not wait for a training."""
    return [
        f"{file.relative_to(root)}:{inner.line}"
        for file in sorted(root.rglob("*.py"))
        for node in ast.parse(file.read_text()).body
        if not isinstance(node, ast.FunctionDef)
        for inner in own_imports(node, file)
        if inner.module == TRAINER
    ]


def relative_imports(root: Path) -> list[str]:
    return [
        f"{file.relative_to(root)}:{node.lineno}"
        for file in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def test_every_room_stands_in_the_order():
    assert rooms(ROOT) - set(ORDER) == set()


def test_every_import_points_down_the_order():
    wrong = upward_imports(ROOT)
    assert not wrong, "\n".join(wrong)


def test_no_two_rooms_import_each_other():
    pairs = {(here, there) for here, there, _ in edges(ROOT)}
    assert {pair for pair in pairs if pair[::-1] in pairs} == set()


def test_no_function_hides_an_import_of_ours():
    wrong = imports_inside_functions(ROOT)
    assert not wrong, "\n".join(wrong)


def test_the_trainer_is_loaded_by_a_training_alone():
    wrong = trainers_loaded_with_modules(ROOT)
    assert not wrong, "\n".join(wrong)


def test_no_import_is_relative():
    wrong = relative_imports(ROOT)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("from coterie.mixture import Mixture", upward_imports),
        ("import coterie.cli", upward_imports),
        ("from coterie import mixture", upward_imports),
        ("from coterie.nowhere import x", upward_imports),
        ("def f():\n    from coterie.errors import CoterieError", imports_inside_functions),
        ("class C:\n    async def f(self):\n        import coterie.errors", imports_inside_functions),
        ("def f():\n    from coterie.experts.trainer import make_trainer", imports_inside_functions),
        ("from coterie.experts.trainer import make_trainer", trainers_loaded_with_modules),
        ("from . import errors", relative_imports),
        ("from .batching import pad", relative_imports),
    ],
)
def test_each_rule_finds_what_breaks_it(tmp_path, source, rule):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "examples.py").write_text("import torch\nfrom coterie.errors import CoterieError\n")
    assert rule(tmp_path) == []
    (tmp_path / "data" / "batching.py").write_text(source)
    assert len(rule(tmp_path)) == 1


def test_no_file_is_longer_than_four_hundred_lines():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in ROOT.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_the_documented_order_is_the_enforced_one():
    text = (PROJECT / "docs" / "architecture.md").read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert ORDER in [block.split() for block in blocks]


IMPORT_ALL = """
import importlib, pkgutil, sys
import coterie
names = [module.name for module in pkgutil.walk_packages(coterie.__path__, "coterie.")]
for name in names:
    importlib.import_module(name)
print(*names)
"""


def test_every_module_imports():
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    files = {
        ".".join((PACKAGE, *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for file in ROOT.rglob("*.py")
    }
    assert set(result.stdout.split()) == files - {PACKAGE}
