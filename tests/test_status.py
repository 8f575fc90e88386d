"""`coterie status` tells what there is of a run, and what the same command would make again."""

import json
from pathlib import Path

import pytest

import tiny
from conftest import write_rows
from coterie import methods
from coterie.artifacts import read_stages
from coterie.methods.elrea import fit as elrea_fit

SMALL = {"clusters": 2, "cluster_rounds": 1, "d_proj": 64, "learning_rate": 1e-2, "batch_size": 4, "device": "cpu"}
STAGES = ["checkpoints", "experts/base", "features", "experts/cluster-0", "experts/cluster-1"]


@pytest.fixture
def place(model_folder, tmp_path) -> Path:
    write_rows(tmp_path / "rows.jsonl", tiny.make_rows(12))
    methods.elrea(str(model_folder), str(tmp_path / "rows.jsonl"), output=tmp_path / "run", **SMALL)
    return tmp_path


def told(run, folder: Path) -> dict:
    code, out, _ = run("status", folder, "--json")
    assert code == 0
    return json.loads(out)


def test_a_finished_run_holds_until_what_it_read_changes(place, run):
    found = told(run, place / "run")
    assert (found["command"], found["is_finished"]) == ("fit elrea", True)
    assert [one["name"] for one in found["stages"]] == STAGES
    assert all(one["is_done"] and one["again"] is None and one["size"] > 0 for one in found["stages"])
    assert found["inputs"] == {"data": "as it was", "base_model": "as it was"}
    files = [path for path in (place / "run").rglob("*") if path.is_file()]
    assert found["size"] == sum(path.stat().st_size for path in files)
    seconds = {name: stage["seconds"] for name, stage in read_stages(place / "run").items()}
    assert {one["name"]: one["seconds"] for one in found["stages"]} == seconds
    write_rows(place / "rows.jsonl", tiny.make_rows(13))
    found = told(run, place / "run")
    assert found["inputs"]["data"] == "changed since"
    assert [one["name"] for one in found["stages"] if one["again"]] == STAGES
    (place / "rows.jsonl").unlink()
    code, out, err = run("status", place / "run")
    assert code == 0 and "data: cannot be read any more: " in out and "again: data changed" in out
    assert err == f"next: coterie run {place}/run/run.yaml --overwrite\n"


def test_an_unfinished_run_is_found_by_its_own_name_and_goes_on_by_what_is_told(place, model_folder, run, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(elrea_fit, "write_features", lambda *_: [][0])
        methods.elrea(str(model_folder), str(place / "rows.jsonl"), output=place / "other", **SMALL)
    code, out, err = run("status", place / "other")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and f"{place}/other.partial: coterie fit elrea, unfinished" in out
    assert [line[0] for line in lines if line[-1] == "done"] == ["checkpoints", "experts/base"]
    assert [line[0] for line in lines if line[-1] == "begun"] == ["features"]
    assert run(*err.split("next: coterie ")[1].split())[0] == 0
    assert told(run, place / "other")["is_finished"]


def test_what_is_no_run_is_told(run, tmp_path):
    code, _, err = run("status", tmp_path)
    assert code == 2 and "run.yaml does not exist; give the run.yaml of a run folder" in err
