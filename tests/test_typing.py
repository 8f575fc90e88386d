"""What people type, with its slips: absent paths, wrong flags, `-h`, rows with ids of their own."""

import json
import os

import pytest

from conftest import write_rows
from coterie.artifacts import may_be_on_hub
from coterie.backbone import loading
from coterie.cli.table import COMMANDS
from helpers import refused


@pytest.fixture
def no_hub(monkeypatch):
    """Any question to the hub fails the test."""

    def asked(*words, **more):
        raise AssertionError(f"the hub was asked for {words} {more}")

    for name in ("huggingface_hub.snapshot_download", "huggingface_hub.hf_hub_download", "datasets.load_dataset"):
        monkeypatch.setattr(name, asked)
    config_of = loading.find_adapter_config_file
    look = lambda place, **more: config_of(place, **more) if os.path.isdir(place) else asked(place)  # noqa: E731
    monkeypatch.setattr(loading, "find_adapter_config_file", look)


@pytest.mark.parametrize(
    "words",
    [
        "fit elrea --model here/absent --data DATA --output out",
        "fit elrea --model absent/ --data DATA --output out",
        "fit elrea --model absent/model.gguf --data DATA --output out",
        "fit elrea --model MODEL --data here/absent --output out",
        "fit elrea --model MODEL --data ./absent --output out",
        "route here/absent hello",
        "generate here/absent hello",
        "bank add bank here/absent --model MODEL",
        "experts init experts --expert a=here/absent",
    ],
)
def test_a_path_that_is_not_there_is_told_without_asking_the_hub(
    words, run, no_hub, model_folder, train_file, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*(words.replace("DATA", str(train_file)).replace("MODEL", str(model_folder)).split()))
    assert code == 2 and "absent" in err.splitlines()[-1] and "Traceback" not in err


def test_what_may_be_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert may_be_on_hub("HuggingFaceTB/SmolLM2-135M")
    for path in ("runs/absent", "absent/", "./absent", "~/absent", "/absent", "a/b/c", "absent", "a/b.gguf"):
        assert not may_be_on_hub(path), path


def test_answers_keep_the_ids_of_their_rows(run, run_folder, tmp_path):
    rows = [{"id": name, "instruction": f"add {name} 4"} for name in ("q7", "q3")]
    file = write_rows(tmp_path / "in.jsonl", rows)
    words = ["generate", run_folder, "--input", file, "--max-new-tokens", 3]
    output = tmp_path / "out.jsonl"
    assert run(*words, "--output", output, "--n", 2, "--temperature", 1)[0] == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["id"], row["prompt"]) for row in written] == [
        (row["id"], row["instruction"]) for row in rows for _ in range(2)
    ]
    assert [json.loads(line)["id"] for line in run(*words, "--json")[1].splitlines()] == ["q7", "q3"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_names_the_help_of_its_own_command(run, name):
    refused(run(*name.split(), "--no-such-flag"), rf"--no-such-flag.*; type: coterie {name} --help$")


def test_a_missing_argument_and_a_wrong_command_name_their_help(run):
    refused(run("fit", "elrea", "--model", "m"), r"--data.*; type: coterie fit elrea --help$")
    refused(run("fit", "elreaa"), r"Did you mean 'elrea'[?] Or type: coterie fit --help$")
    refused(run("rout"), r"Did you mean 'route', 'report'[?] Or type: coterie --help$")


@pytest.mark.parametrize("name", ["", "fit", *COMMANDS])
def test_h_is_help(run, name):
    assert run(*name.split(), "-h") == run(*name.split(), "--help")
