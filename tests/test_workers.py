"""What workers on a local Ray cluster make of a bank, one of them killed at it, is what one process makes of it."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

import coterie
import tiny
from conftest import write_rows
from coterie.cluster import joined
from coterie.errors import CoterieError
from coterie.experts.expert_pool import init_pool
from coterie.methods.add_adapters import bank_add
from coterie.settings.commands import ExpertPoolSettings
from crashing import results, without_times

pytestmark = pytest.mark.ray

SHORT = ("--max-new-tokens", 4, "--device", "cpu")
BY_WORKERS = {"ray": True, "workers": 2}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests, which commands join and leave to us."""
    with joined():
        yield


@contextlib.contextmanager
def a_worker_killed(at="opened_call"):
    """Kill one worker in the middle of what it does first, and give what was killed."""
    killed, over = [], threading.Event()

    def kill():
        while not killed and not over.is_set():
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if not killed and f"ray::{at}".encode() in (folder / "cmdline").read_bytes():
                        time.sleep(0.05)  # while it loads
                        os.kill(int(folder.name), signal.SIGKILL)
                        killed.append(folder.name)
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    over.set()
    thread.join()


@pytest.fixture(scope="module")
def experts(run_folder):
    return {name: run_folder / "experts" / name for name in ("base", "cluster-0", "cluster-1", "cluster-2")}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_adapters_are_scored_as_by_one_process(experts, model_folder, tmp_path):
    bank_add(tmp_path / "bank", list(experts.values()), model=str(model_folder), device="cpu")
    shots = str(write_rows(tmp_path / "shots.jsonl", tiny.make_rows(6, 77)))
    how = {"keep": 2, "group_size": 1, "max_new_tokens": 4, "device": "cpu"}
    alone = coterie.select(tmp_path / "bank", shots, output=tmp_path / "alone", **how)
    with a_worker_killed() as killed:
        shared = coterie.select(tmp_path / "bank", shots, output=tmp_path / "shared", **how, **BY_WORKERS)
    assert killed and shared.record == alone.record and shared.scores == alone.scores


def test_methods_are_evaluated_as_by_one_process(run_folder, run, tmp_path):
    data = write_rows(tmp_path / "test.jsonl", tiny.make_rows(6, 78))
    words = ["eval", run_folder, "--data", data, "--device", "cpu", "--max-new-tokens", 4, "--methods"]
    words += ["base,elrea,uniform-weights,moe-routing,router:arrow,oracle", "--resamples", 100]
    assert run(*words, "--output", tmp_path / "alone")[0] == 0
    with a_worker_killed() as killed:
        code, _, err = run(*words, "--output", tmp_path / "shared", "--ray", "--workers", 2)
    assert code == 0, err
    assert killed and lines(tmp_path / "shared" / "rows.jsonl") == lines(tmp_path / "alone" / "rows.jsonl")


def test_a_task_is_fitted_as_by_one_process(experts, model_folder, run, tmp_path):
    bank_add(tmp_path / "bank", list(experts.values()), model=str(model_folder), device="cpu")
    shots = write_rows(tmp_path / "shots.jsonl", tiny.make_rows(6, 77))
    words = ["fit", "kshot-moe", "--bank", tmp_path / "bank", "--shots", shots, "--keep", 2, "--group-size", 1]
    words += ["--epochs", 1, "--batch-size", 4, "--max-new-tokens", 4, "--device", "cpu"]
    assert run(*words, "--output", tmp_path / "alone")[0] == 0
    with a_worker_killed() as killed:
        code, _, err = run(*words, "--output", tmp_path / "shared", "--ray", "--workers", 2)
    assert code == 0 and killed, err
    assert results(tmp_path / "shared") == results(tmp_path / "alone")


def profiled(pool, experts, model, data, run, flags=()):
    """Profile experts on questions; return every question's replies by expert."""
    named = [f"{expert}={folder}" for expert, folder in experts.items()]
    init_pool(ExpertPoolSettings(folder=str(pool), expert=named, base=str(model)))
    code, _, err = run("profile", pool, "--data", data, "--skills", "source", "--encoder", "none", *SHORT, *flags)
    assert code == 0, err
    rows = lines(pool / "profile" / "validation.jsonl")
    return [{name: reply["text"] for name, reply in row["replies"].items()} for row in rows]


def test_experts_answer_and_are_recruited_as_by_one_process(experts, model_folder, run, tmp_path):
    """What the base adapter says is what is right, so that aggregators have something to be judged by."""
    questions = tiny.make_rows(6, 79)
    said = profiled(tmp_path / "said", experts, model_folder, write_rows(tmp_path / "all.jsonl", questions), run)
    answers = [own["base"].strip() or row["response"] for row, own in zip(questions, said, strict=True)]
    right = [{**row, "response": one, "answer": one} for row, one in zip(questions, answers, strict=True)]
    data = write_rows(tmp_path / "val.jsonl", right)
    found = {}
    for name, flags in (("alone", ()), ("shared", ("--ray", "--workers", 2))):
        pool, fitted = tmp_path / name, tmp_path / f"{name}-run"
        with a_worker_killed() if flags else contextlib.nullcontext([0]) as killed:
            replies = profiled(pool, experts, model_folder, data, run, flags)
        code, _, err = run("fit", "symbolic-moe", "--experts", pool, "--output", fitted, *SHORT, *flags)
        assert code == 0 and killed, err
        code, out, err = run("generate", fitted, "Add 3 and 4.", "--json", "--seed", 1, *SHORT, *flags)
        assert code == 0, err
        found[name] = (
            replies,
            json.loads((fitted / "mixture.json").read_text()),
            json.loads(out, object_hook=without_times),
        )
    assert found["alone"] == found["shared"] and all(len(row) == len(experts) for row in found["alone"][0])
    assert found["alone"][1]["combiner"]["judged"]


def test_seeds_are_run_as_one_after_another(run_folder, run, tmp_path):
    data = write_rows(tmp_path / "test.jsonl", tiny.make_rows(4, 80))
    words = ["eval", run_folder, "--data", data, "--device", "cpu", "--max-new-tokens", 4, "--methods", "base,elrea"]
    records, wanted = [], []
    for seed in (0, 1):
        output = tmp_path / f"seed-{seed}"
        assert run(*words, "--temperature", 1, "--seed", seed, "--output", output)[0] == 0
        wanted.append(lines(output / "rows.jsonl"))
        records.append(Path(shutil.copy(output / "run.yaml", tmp_path / f"{seed}.yaml")))
    with a_worker_killed("repeated") as killed:
        code, out, err = run("run", *records, "--overwrite", "--ray", "--workers", 2)
    assert code == 0 and killed, err
    assert {f"{record}: done" for record in records} <= set(out.splitlines()) and wanted[0] != wanted[1]
    assert [lines(tmp_path / f"seed-{seed}" / "rows.jsonl") for seed in (0, 1)] == wanted


def test_what_workers_cannot_open_is_told_as_by_one_process(experts, model_folder, tmp_path):
    bank_add(tmp_path / "bank", [experts["base"], experts["cluster-0"]], model=str(model_folder), device="cpu")
    next((tmp_path / "bank").glob("**/cluster-0/adapter_model.safetensors")).unlink()
    shots = str(write_rows(tmp_path / "shots.jsonl", tiny.make_rows(3, 77)))
    told = []
    for name, flags in (("alone", {}), ("shared", BY_WORKERS)):
        with pytest.raises(CoterieError) as caught:
            coterie.select(tmp_path / "bank", shots, output=tmp_path / name, keep=1, device="cpu", **flags)
        told.append((type(caught.value), str(caught.value)))
    assert told[0] == told[1] and "cluster-0" in told[0][1]
