"""Help can be read in a small terminal, and what it and the README tell to type can be typed."""

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from coterie.cli.table import ARGUMENTS, COMMANDS
from coterie.report.page import REPORT_FILE
from coterie.settings.old_spellings import is_old
from coterie.settings.reading import flag_of, flat_fields

REPEAT = COMMANDS["run"]


def shown(run, name: str) -> str:
    """The help of a command, as it stands in a terminal of 80 columns."""
    code, out, _ = run(*name.split(), "--help")
    assert code == 0 and f"Usage: coterie {name}".rstrip() in out
    return out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_flag_in_full(run, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    out, kind = shown(run, name), COMMANDS[name].settings
    assert "…" not in out
    text = re.sub(r"[\s│]", "", out)  # help is folded at any place
    for field, info, _ in flat_fields(kind) if kind else ():
        old, flag = is_old(kind.command, field), flag_of(field)
        if field not in ARGUMENTS:
            flag = flag.replace("--", "--no-") if info.default is True else flag
            assert bool(re.search(rf"(?m)^│ [ *]*{flag} ", out)) != old, flag
        for choice in get_args(info.annotation):
            assert old or not isinstance(choice, str) or choice in text, choice


def test_commands_stand_in_the_order_of_their_use(run):
    out = run("--help")[1]
    places = [out.index(f"│ {name} ") for name in "fit train-extras route generate eval report bank run".split()]
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_help_can_be_typed(run, called, name):
    example = shown(run, name).partition("Example:")[2]
    words = shlex.split(re.sub(r"\\\s*\n", "", example))
    assert words[0] == "coterie" and run(*words[1:])[0] == 0
    assert [call[0] for call in called] == [name]


def test_help_changes_nothing_of_what_is_typed_after_it(run, called):
    words = ("fit", "symbolic-moe", "--experts", "pool", "--output", "run", "--no-replacement")
    assert run(*words)[0] == 0
    shown(run, "fit symbolic-moe")
    assert run(*words)[0] == 0
    assert [settings.recruiting.replacement for _, settings in called] == [False, False]


PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def commands_in(file: Path) -> list[str]:
    text = file.read_text().replace("\\\n", " ")
    return [part.strip() for part in re.findall(r"(?m)^coterie .*$", text) for part in part.split(" ; ")]


@pytest.mark.parametrize("line", dict.fromkeys(line for page in PAGES for line in commands_in(page)))
def test_a_command_of_a_page_can_be_typed(run, called, line):
    assert run(*shlex.split(line, comments=True)[1:])[0] == 0 and len(called) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_with_the_next_one_ready_to_type(run, called, name, tmp_path, monkeypatch):
    example = re.sub(r"\\\s*\n", "", shown(run, name).partition("Example:")[2])
    if name == "run":  # ends as the command that it repeats
        monkeypatch.setitem(COMMANDS, "run", REPEAT)
        example = f"coterie run {tmp_path}/run.yaml"
        settings = {"model": "m", "data": ["d"], "output": str(tmp_path / "out")}
        (tmp_path / "run.yaml").write_text(json.dumps({"command": "fit elrea", "settings": settings}))
    code, out, err = run(*shlex.split(example)[1:])
    assert (code, out) == (0, "") and err.count("next: ") == 1
    last = err.splitlines()[-1]
    following = shlex.split(last.removeprefix("next: "))
    assert last.startswith("next: ") and "None" not in following
    named = [word.rstrip("/") for word in shlex.split(example)[2:] if "/" in word and "=" not in word]
    assert not named or any(word in " ".join(following) for word in (*named, str(tmp_path / "out"))), following
    if following[0] == "coterie":
        assert run(*following[1:])[0] == 0 and len(called) >= 2
    else:
        assert following[:3] in (["python3", "-m", "webbrowser"], ["cat", "runs/elrea-vllm/README.md"])


def test_a_command_tells_what_it_wrote_once_it_is_there(run, called, tmp_path):
    words = ["fit", "elrea", "--model", "m", "--data", "d.jsonl", "--output", tmp_path / "new run"]
    assert "wrote" not in run(*words)[2]
    (tmp_path / "new run").mkdir()
    assert run(*words)[2].splitlines() == [
        f"wrote {tmp_path}/new run",
        f"next: coterie generate '{tmp_path}/new run' 'What do 5 pens cost?'",
    ]


def test_the_next_command_has_what_this_one_was_given(run, called):
    following = lambda *words: run(*words)[2].splitlines()[-1].removeprefix("next: ")  # noqa: E731
    assert following("route", "m", "it's", "b c") == """coterie generate m 'it'"'"'s' 'b c'"""
    assert following("route", "m", "--input", "a b.jsonl") == "coterie generate m --input 'a b.jsonl'"
    shots = ["--shots", "a.jsonl", "--shots", "b.jsonl"]
    assert " ".join(shots) in following("select", "bank/", *shots, "--output", "s")
    assert following("spread", "x", "y") == "coterie report x"
    assert "--gathered out " in following("gather", *shots, "--pool", "p.jsonl", "--output", "out/")
    assert following("report", "e/").endswith(f"e/{REPORT_FILE}")
