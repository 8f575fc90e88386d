"""Commands, flags and records under their old names do what they did."""

import operator
from contextlib import nullcontext

import pytest
import yaml

from coterie.artifacts import run_folder
from coterie.cli.again import repeat
from coterie.errors import CoterieError
from coterie.settings.groups import ExtrasSettings
from coterie.settings.reading import Settings


def before_next(err: str) -> list[str]:
    """What a command says on stderr before the next one that it names."""
    *lines, last = err.splitlines()
    assert last.startswith("next: coterie ")
    return lines


@pytest.mark.parametrize(
    ("words", "now", "line"),
    [
        (
            "bank build --adapter a=A --centroid-data a=D --output O",
            "fit from-adapters --adapter a=A --centroid-data a=D --output O",
            "coterie bank build is now called: coterie fit from-adapters",
        ),
        (
            "pool init P --expert a=A",
            "experts init P --expert a=A",
            "coterie pool init is now called: coterie experts init",
        ),
        (
            "fit symbolic-moe --pool=P --output O",
            "fit symbolic-moe --experts P --output O",
            "--pool of coterie fit symbolic-moe is now called: --experts",
        ),
        (
            "fit kshot-moe --bank B --shots S --pool P --output O --top-k 3",
            "fit kshot-moe --bank B --shots S --pool P --output O --top-k-experts 3",
            "--top-k of coterie fit kshot-moe is now called: --top-k-experts",
        ),
        (
            "eval M --data D --output O --shots S --shots T --top-k 3",
            "eval M --data D --output O --few-shot S --few-shot T --top-k 3",
            "--shots of coterie eval is now called: --few-shot",
        ),
        (
            "eval M --data D --output O --few-shot S --shot-count 5",
            "eval M --data D --output O --few-shot S --few-shot-count 5",
            "--shot-count of coterie eval is now called: --few-shot-count",
        ),
    ],
    ids=lambda value: value.split(" --")[0],
)
def test_an_old_spelling_works_and_names_the_new_one(run, called, words, now, line):
    code, out, err = run(*words.split())
    assert (code, out) == (0, "") and before_next(err) == [line]
    code, out, err = run(*now.split())
    assert (code, out, before_next(err)) == (0, "", []) and called[0] == called[1]


def test_training_flags_of_eval_work_and_name_the_command_that_has_them_now(run, called):
    words = ["eval", "M", "--data", "D", "--output", "O"]
    assert run(*words)[0] == 0
    code, _, err = run(*words, "--ensemble-size", 3, "--encoder", "hidden")
    assert code == 0 and sorted(before_next(err)) == [
        "--encoder of coterie eval is now called: coterie train-extras --encoder",
        "--ensemble-size of coterie eval is now called: coterie train-extras --ensemble-size",
    ]
    assert [call[1].extras for call in called] == [None, ExtrasSettings(ensemble_size=3, encoder="hidden")]


OLD_RECORDS = {
    "bank build": {
        "adapter": ["a=A"],
        "centroid_data": ["a=D"],
        "output": "O",
        "limit": None,
        "similarity": {"encoder": "hidden", "window": None},
        "renewal": {"every": "2", "cache": "recompute"},
    },
    "fit symbolic-moe": {"pool": "P", "output": "O", "work": {"retries": 0}, "recruiting": {"recruits": 2}},
    "fit kshot-moe": {
        "bank": "B",
        "shots": ["S"],
        "pool": ["P"],
        "output": "O",
        "choice": {"keep": 2},
        "selection": {"budget": 12},
        "gates": {"top_k": 3},
    },
    "eval": {
        "mixture": "M",
        "data": ["D"],
        "output": "O",
        "sampling": {"top_k": 5},
        "grid": {"ensemble_size": 3},
        "few_shot": {"shots": ["S"], "shot_count": 4},
        "work": {"retries": 1},
    },
}
"""Settings as records held them that were written under the old names."""


@pytest.mark.parametrize(
    ("command", "now", "values"),
    [
        ("bank build", "fit from-adapters", {"similarity.encoder": "hidden", "rerouting.cache": "recompute"}),
        ("fit symbolic-moe", "fit symbolic-moe", {"experts": "P", "serving.retries": 0, "recruiting.recruits": 2}),
        ("fit kshot-moe", "fit kshot-moe", {"adapters.keep": 2, "rows.budget": 12, "gates.top_k_experts": 3}),
        (
            "eval",
            "eval",
            {"sampling.top_k": 5, "extras.ensemble_size": 3, "solved.few_shot": ["S"], "solved.few_shot_count": 4},
        ),
    ],
)
def test_a_record_under_old_names_is_repeated(called, tmp_path, command, now, values):
    record = tmp_path / "run.yaml"
    record.write_text(yaml.safe_dump({"format": 1, "command": command, "settings": OLD_RECORDS[command], "inputs": {}}))
    repeat([record])
    name, settings = called[0]
    assert name == now
    for place, value in values.items():
        assert operator.attrgetter(place)(settings) == value


class NewNames(Settings):
    """As many settings of `fit kshot-moe` as the old record has."""

    command = "fit kshot-moe"
    bank: str
    shots: list[str]
    pool: list[str]
    output: str
    limit: int | None
    adapters: dict[str, int]
    rows: dict[str, int]
    gates: dict[str, int]


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [({}, True), ({"gates": {"top_k": 2}}, False), ({"limit": 5}, False), ({"overwrite": True}, True)],
)
def test_an_interrupted_run_goes_on_under_new_names(tmp_path, change, goes_on):
    before = {**OLD_RECORDS["fit kshot-moe"], **change}
    (tmp_path / "run.partial").mkdir()
    record = {"command": "fit kshot-moe", "settings": before, "inputs": {}}
    (tmp_path / "run.partial" / "run.yaml").write_text(yaml.safe_dump(record))
    settings = {
        "bank": "B",
        "shots": ["S"],
        "pool": ["P"],
        "output": "O",
        "limit": None,
        "adapters": {"keep": 2},
        "rows": {"budget": 12},
        "gates": {"top_k_experts": 3},
    }
    expected = nullcontext() if goes_on else pytest.raises(CoterieError, match="unfinished run with other settings")
    with expected, run_folder(tmp_path / "run", NewNames(**settings), {}):
        pass
