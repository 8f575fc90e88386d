"""What the documents say of the code is so: the recipes of docs/architecture.md name places that exist."""

import ast
import re
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import TypeAdapter

from coterie.cli.table import COMMANDS
from coterie.methods import listed
from coterie.methods.family import SINGLE_EXPERT
from coterie.settings.reading import flat_fields

PROJECT = Path(__file__).parents[1]
TESTS = PROJECT / "tests"
PACKAGE = PROJECT / "src" / "coterie"
ARCHITECTURE = (PROJECT / "docs" / "architecture.md").read_text()
PLACE = re.compile(r"`([\w/]+\.\w+)(?:::(\w+))?`")
"""A place in a recipe: a file of the package or of the project, and a name that stands at its top level."""


def recipes(text: str) -> dict[str, list[str]]:
    """The numbered steps below every heading `### How to add ...`, by the heading."""
    sections = re.findall(r"^### (How to add [^\n]*)\n(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return {title: re.findall(r"^\d\. (.*(?:\n   .*)*)", body, flags=re.MULTILINE) for title, body in sections}


def lacking(step: str) -> list[str]:
    """The places that a step names and that are not there."""
    found = []
    for name, symbol in PLACE.findall(step):
        files = [folder / name for folder in (PACKAGE, PROJECT) if (folder / name).is_file()]
        if not files or (symbol and symbol not in top_level(files[0])):
            found.append(f"{name}::{symbol}" if symbol else name)
    return found


def top_level(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_there_is_a_recipe_for_each_thing_that_people_add():
    titles = list(recipes(ARCHITECTURE))
    assert titles == [f"How to add a {thing}" for thing in ("router", "combiner", "method", "family")]


@pytest.mark.parametrize("title", recipes(ARCHITECTURE))
def test_every_place_that_a_recipe_names_exists(title):
    steps = recipes(ARCHITECTURE)[title]
    assert len(steps) >= 2
    for step in steps:
        assert PLACE.search(step), f"this step names no place: {step}"
        assert lacking(step) == [], step


def test_a_place_that_is_gone_is_found():
    assert lacking("put it into `routers/base.py::Router`") == []
    assert lacking("put it into `routers/base.py::Nobody`, or `routers/nowhere.py`") == [
        "routers/base.py::Nobody",
        "routers/nowhere.py",
    ]


NAMED_TEST = re.compile(r"`(?:tests/)?(?:((?:\w+/)*test_\w+\.py)(?:::(test_\w+))?|(test_\w+))`")
"""A file of tests, a test in it, or a test without its file."""


def lacking_tests(text: str) -> list[str]:
    """The tests that a document names and that are not there."""
    tests = {str(file.relative_to(TESTS)): top_level(file) for file in TESTS.rglob("test_*.py")}
    anywhere: set[str] = set().union(*tests.values())
    found = NAMED_TEST.findall(text)
    return [
        file and f"{file}::{test}" or alone
        for file, test, alone in found
        if (file not in tests if file else alone not in anywhere) or (test and test not in tests[file])
    ]


@pytest.mark.parametrize("page", ["security.md", "inputs.md"])
def test_every_test_that_a_page_of_promises_names_exists(page):
    text = (PROJECT / "docs" / page).read_text()
    assert len(NAMED_TEST.findall(text)) > 30
    assert lacking_tests(text) == []


def test_every_row_of_threats_names_what_holds_it():
    rows = re.findall(r"^\|(?! threat |-).*\|$", (PROJECT / "docs" / "security.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 30
    assert [
        row for row in rows if not (NAMED_TEST.search(row) or re.search(r"\| (the same|all tests of the file)", row))
    ] == []


def test_a_test_that_is_gone_is_found():
    assert lacking_tests("`test_docs.py::test_a_test_that_is_gone_is_found`, `tests/test_docs.py`, `top_level`") == []
    gone = ["test_docs.py::test_nothing", "test_nowhere.py::", "test_nothing"]
    assert lacking_tests("`test_docs.py::test_nothing`, `test_nowhere.py`, `test_nothing`") == gone


def tables_of_methods(text: str) -> list[dict[str, str]]:
    """The combiner of every method of every table whose first column is `method`, as written in a document."""
    tables = []
    for body in re.findall(r"^\| method \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        cells = [line.strip("|\n").split("|") for line in body.splitlines()]
        tables.append({name: row[-1].strip() for row in cells for name in re.findall(r"`([^`]+)`", row[0])})
    return tables


def test_the_readme_lists_the_methods_that_there_are_and_where_their_experts_meet():
    families = list(dict.fromkeys(row["on"] for row in listed()))
    tables = tables_of_methods((PROJECT / "README.md").read_text())
    assert len(tables) == len(families) == 4
    for family, table in zip(families, tables, strict=True):
        combiners = {row["method"]: row["combiner"] for row in listed() if row["on"] == family}
        table.pop(f"{SINGLE_EXPERT}:NAME", None)
        assert set(table) | {"backbone"} == set(combiners) | {"backbone"}  # the base model stands in one table for all
        for name, told in table.items():
            plain = re.sub(r" \(`(.*)`\)", r":\1", told)  # weights (`factors`)
            assert plain.split(": ")[0] == combiners[name].split(": ")[0], f"{family}: {name}"


def test_the_switches_that_bring_a_papers_own_setting_back_exist():
    """Every flag in the table of differences is one of some command, and takes the value that stands there."""
    _, _, table = ARCHITECTURE.partition("## Defaults that differ from a paper")
    table = table.partition("## ")[0]
    kinds = [command.settings for command in COMMANDS.values() if command.settings]
    fields = {name: field for kind in kinds for name, field, _ in flat_fields(kind)}
    found = re.findall(r"--([a-z][a-z-]*)(?: ([^\s`]+))?", table)
    assert len(found) > 15
    for flag, value in found:
        field = fields[flag.replace("-", "_")]
        if value and value not in ("N", "NAME", "WRITER"):
            TypeAdapter(Annotated[field.annotation, field]).validate_strings(value)  # pyrefly: ignore
