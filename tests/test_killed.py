"""Commands that are killed or stopped at random moments, in processes of their own, end as undisturbed ones do."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

import tiny
from conftest import write_rows
from coterie import cli
from coterie.cli import process as ending
from coterie.cli.process import STOPPED

SERVER = multiprocessing.get_context("forkserver")  # its children have everything imported, and no threads
FIT = ["--clusters", "2", "--cluster-rounds", "1", "--d-proj", "64", "--learning-rate", "1e-2", "--batch-size", "4"]
ON_CPU = ["--device", "cpu"]
SHORT = ["--max-new-tokens", "4", *ON_CPU]


def command_line(words: list[str], folder: Path, cache: str, ready: Event, largest: int | None) -> None:
    """Run a command line in a folder, as a process of its own that may write files up to a size."""
    os.chdir(folder)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    os.environ |= {"COTERIE_CACHE": cache, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for number in (1, 2):
        os.dup2(os.open(folder / f"std{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    sys.argv = ["coterie", *words]
    run, ending._outcome = ending._outcome, lambda words: (ready.set(), run(words))[1]  # signals are awaited by then
    cli.main()


def started(words: list[str], folder: Path, largest: int | None = None) -> BaseProcess:
    """Start a command line; it is at work when this returns."""
    SERVER.set_forkserver_preload(["coterie.cli.commands", "coterie.methods", "coterie.evaluation.symbolic"])
    ready = SERVER.Event()
    process = SERVER.Process(target=command_line, args=(words, folder, os.environ["COTERIE_CACHE"], ready, largest))
    process.start()
    assert ready.wait(60)
    return process


def finished(words: list[str], folder: Path) -> float:
    """Run a command line to its end; return its seconds."""
    process, start = started(words, folder), time.perf_counter()
    process.join(120)
    assert process.exitcode == 0, (folder / "std2").read_text()[-2000:]
    return time.perf_counter() - start


FITTED = ["fit", "elrea", "--model", "model", "--data", "rows.jsonl", "--output", "run", "--device", "cpu", *FIT]
EXPERTS = [f"{name}=run/experts/{name}" for name in ("base", "cluster-0", "cluster-1")]
SHELF = ["--adapter", EXPERTS[1], "--adapter", EXPERTS[2], "--centroid-data", "cluster-0=rows.jsonl"]
COMMANDS = {
    "fit": FITTED,
    "bank add": ["bank", "add", "bank", *EXPERTS, "--model", "model", "--device", "cpu"],
    "shelf": ["fit", "from-adapters", *SHELF, "--router", "arrow", "--encoder", "hidden", "--output", "shelf", *ON_CPU],
    "profile": ["profile", "pool", "--data", "rows.jsonl", "--skills", "choice", "--skill-list", "sums,words", *SHORT],
    "eval": ["eval", "run", "--data", "rows.jsonl", "--output", "eval", "--methods", "base,elrea", *SHORT],
}
RESULTS = {"fit": "run", "bank add": "bank", "shelf": "shelf", "profile": "pool/profile", "eval": "eval"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, model_folder) -> Path:
    """What the commands start from, each in a place of its own: a model, rows, a fitted run, a pool of experts."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "model").symlink_to(model_folder)
    write_rows(folder / "rows.jsonl", tiny.make_rows(12))
    finished(FITTED, folder)
    finished(["experts", "init", "pool", *(f"--expert={one}" for one in EXPERTS), "--base", "model"], folder)
    return folder


def place_for(command: str, fitted: Path, folder: Path) -> Path:
    shutil.copytree(fitted, folder, symlinks=True)
    if command == "fit":
        shutil.rmtree(folder / "run")
    return folder


def results(folder: Path) -> dict[str, object]:
    """All files by name, without the times that work took, and without run.yaml, which has the time of its start."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: untimed(path) for name, path in found.items() if name != "run.yaml"}


def untimed(path: Path) -> object:
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()

    def without_times(record: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in record.items() if "seconds" not in name}

    return (
        [json.loads(line, object_hook=without_times) for line in path.read_text().splitlines()]
        if (path.suffix == ".jsonl")
        else json.loads(path.read_text(), object_hook=without_times)
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_stopped_at_random_moments_ends_as_an_undisturbed_one(command, fitted, tmp_path):
    """Killed, interrupted, terminated and killed again, each time where the last try had come to, then left alone."""
    words, chance = COMMANDS[command], random.Random(command)
    undisturbed, disturbed = (place_for(command, fitted, tmp_path / name) for name in ("undisturbed", "disturbed"))
    seconds = finished(words, undisturbed)
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = started(words, disturbed)
        time.sleep(chance.uniform(0, 0.6 * seconds))
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join(60)
        if process.exitcode == 0:  # it was faster
            break
        assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number)
        if number != signal.SIGKILL:
            lines = (disturbed / "std2").read_text().splitlines()
            assert lines[-1] == STOPPED and not any("Traceback" in line for line in lines)
    else:
        finished(words, disturbed)
    assert results(disturbed / RESULTS[command]) == results(undisturbed / RESULTS[command])
    left = {path.name for path in disturbed.rglob("*")} - {path.name for path in undisturbed.rglob("*")}
    assert not left


def test_a_second_signal_ends_the_process_at_once(fitted, tmp_path):
    folder = place_for("fit", fitted, tmp_path / "place")
    process = started([*FITTED, "--epochs", "100000"], folder)
    while not (folder / "run.partial" / "working").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)  # so that both are there before it can do anything about the first
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    process.join(10)
    assert process.exitcode in (130, 143)


def test_two_processes_on_one_output_are_told_of_each_other(fitted, tmp_path):
    folder = place_for("fit", fitted, tmp_path / "place")
    first = started([*FITTED, "--epochs", "100000"], folder)
    try:
        while not (folder / "run.partial" / "run.yaml").exists():
            time.sleep(0.01)
        second = started([*FITTED, "--epochs", "100000"], folder)
        second.join(60)
        told = (folder / "std2").read_text()
        assert second.exitcode == 2 and f"run is being written by process {first.pid} of " in told
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    finished([*FITTED, "--epochs", "100000", "--limit", "8", "--output", "other", "--epochs", "1"], folder)


LIMITS = {
    "the check of a fresh adapter": (10_000, "while writing /tmp"),
    "the state of Adam": (50_000, "while writing run.partial/working/training/base/.epoch-0/adam.safetensors"),
    "the optimiser of the trainer": (67_000, "while writing run.partial/working/training/base"),
}


@pytest.mark.parametrize(("largest", "told"), LIMITS.values(), ids=LIMITS)
def test_a_limit_of_file_sizes_is_one_line_and_what_was_done_goes_on(largest, told, fitted, tmp_path):
    folder = place_for("fit", fitted, tmp_path / "place")
    process = started(FITTED, folder, largest)
    process.join(120)
    *before, line = (folder / "std2").read_text().splitlines()
    assert process.exitcode == 2 and line.startswith("error: no ") and told in line and "free some and start" in line
    assert not any("Traceback" in one for one in before)
    finished(FITTED, folder)
    assert results(folder / "run") == results(fitted / "run")
