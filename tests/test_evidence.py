"""The evidence is made in steps that go on where they stopped, on rows that were not trained on."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from coterie.methods.elrea.methods import FAMILY
from coterie.settings.auto import AutoSettings
from coterie.settings.commands import EvaluationSettings, TrainExtrasSettings
from report_pages import records

FILE = Path(__file__).parents[1] / "examples" / "evidence.py"


@pytest.fixture(scope="module")
def evidence():
    spec = importlib.util.spec_from_file_location("evidence", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path, evidence):
    """Data of which each set has 40 short rows in each file, 20 of its test's questions in the training file too."""
    for files in {file for mix in evidence.MIXES.values() for side in mix.values() for file in side.values()}:
        name, split = files.split("/")
        first = 0 if split == "train" else 20
        rows = [
            {"id": f"{n}", "instruction": f"{name} {n}", "response": "r" * (n % 3)} for n in range(first, first + 40)
        ]
        rows.append({"id": "long", "instruction": "x" * 500, "response": "y"})
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / f"{files}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"train": 60, "test": 24, "longest": 100, "model": "tiny", "minutes": 9.0}
    return argparse.Namespace(data=tmp_path / "data", output=tmp_path / "out", **known)


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("mix", ["maths", "general"])
def test_rows_are_even_over_the_sets_and_none_is_tested_that_was_trained_on(evidence, arguments, mix):
    evidence.write_rows(arguments, mix, [0, 1])
    place = arguments.output / mix
    sides = {side: read(place / f"{side}.jsonl") for side in ("inside", "outside", "train-0", "train-1")}
    tested = {row["instruction"] for side in ("inside", "outside") for row in sides[side]}
    for side, rows in sides.items():
        sets = evidence.MIXES[mix][side.partition("-")[0]]
        counts = {name: sum(row["source"] == name for row in rows) for name in sets}
        assert set(counts.values()) == {(60 if side.startswith("train") else 24) // len(sets)}
        assert len({row["instruction"] for row in rows}) == len(rows)
        assert side in ("inside", "outside") or not tested & {row["instruction"] for row in rows}
    assert sides["train-0"] != sides["train-1"]
    before = {side: (place / f"{side}.jsonl").read_bytes() for side in sides}
    evidence.write_rows(arguments, mix, [0, 1])
    assert before == {side: (place / f"{side}.jsonl").read_bytes() for side in sides}


def test_the_steps_are_commands_that_there_are_with_methods_that_there_are(evidence, arguments):
    made = list(evidence.steps(arguments, "maths", [0, 1]))
    assert [step.output.name for step in made[:6]] == [
        *("run-0", "one-lora", "random-weights", "random-clusters", "inside-0", "outside-0"),
    ]
    commands = {step.command[3] if step.command[3] != "fit" else "fit auto" for step in made}
    assert commands == {kind.command for kind in (AutoSettings, EvaluationSettings, TrainExtrasSettings)}
    for name in evidence.METHODS:
        FAMILY.method(name)


def asked(evidence, monkeypatch, arguments, commands) -> None:
    """Type the command, with other steps."""
    made = [evidence.Step((sys.executable, "-c", code), arguments.output / name) for name, code in commands.items()]
    monkeypatch.setattr(evidence, "steps", lambda *_: iter(made))
    monkeypatch.setattr(evidence, "write_rows", lambda *_: arguments.output.mkdir(exist_ok=True))
    monkeypatch.setattr(evidence, "table", lambda place, side, seeds: f"{place.name} {side} {seeds}\n")
    words = [str(arguments.data), str(arguments.output), "--minutes", str(arguments.minutes), "--seeds", "3,4"]
    monkeypatch.setattr(sys, "argv", ["evidence.py", *words])
    evidence.main()


def touch(arguments, name: str) -> str:
    return f"open({str(arguments.output / name)!r}, 'x').close()"


def test_what_was_done_is_not_done_again_and_the_table_comes_last(evidence, monkeypatch, arguments, capsys):
    commands = {name: touch(arguments, name) for name in ("a", "b")}
    asked(evidence, monkeypatch, arguments, commands)
    assert capsys.readouterr().out == "maths inside [3, 4]\n\nmaths outside [3, 4]\n\n"
    asked(evidence, monkeypatch, arguments, commands)  # a second `a` would fail: the file exists
    assert (arguments.output / "tables.md").exists()


def test_a_step_that_runs_out_of_time_is_interrupted_and_what_is_left_is_told(evidence, monkeypatch, arguments):
    code = f"import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: {touch(arguments, 'interrupted')}"
    arguments.minutes = 0.02  # a second or so: the child has to come up
    monkeypatch.setattr(evidence, "ROOM", 0)
    with pytest.raises(SystemExit, match="2 steps are left: type the same command again"):
        asked(evidence, monkeypatch, arguments, {"a": code, "b": touch(arguments, "b")})
    assert not (arguments.output / "b").exists()


def test_a_step_that_fails_ends_it(evidence, monkeypatch, arguments):
    with pytest.raises(SystemExit, match="this failed with 2: .*"):
        asked(evidence, monkeypatch, arguments, {"a": "raise SystemExit(2)"})


def test_the_table_has_each_seed_and_the_spread_over_seeds(evidence, tmp_path):
    evaluation, _ = records()
    for seed in (0, 1):
        folder = tmp_path / "maths" / f"inside-{seed}"
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    text = evidence.table(tmp_path / "maths", "inside", [0, 1])
    line = next(own for own in evaluation["table"] if own["method"] == "elrea" and own["source"] == "all")
    assert text.startswith("## maths, inside, 2 seeds")
    assert sum(f"elrea {' ' * 20} {line['nll_difference']:+.4f}" in one for one in text.splitlines()) == 2
