"""Commands that are killed at random moments, in processes of their own, beside the same commands left alone."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import tiny
from coterie import cli
from coterie.cli import process as ending
from coterie.cli.process import STOPPED

SERVER = multiprocessing.get_context("forkserver")  # its children have everything imported, and no threads
ON_CPU = ["--device", "cpu"]
TRAINED = ["--learning-rate", "1e-2", "--batch-size", "4", *ON_CPU]
CLUSTERED = ["--clusters", "2", "--cluster-rounds", "1", "--d-proj", "64", *TRAINED]
SHORT = ["--max-new-tokens", "4", *ON_CPU]
MODEL, ROWS = ["--model", "model"], ["--data", "rows.jsonl"]
FITTED = ["fit", "elrea", *MODEL, *ROWS, "--output", "run", *CLUSTERED]
EXPERTS = [f"{name}=run/experts/{name}" for name in ("base", "cluster-0", "cluster-1")]
SHELF = ["--adapter", EXPERTS[1], "--adapter", EXPERTS[2], "--centroid-data", "cluster-0=rows.jsonl"]
TASK = ["--shots", "shots.jsonl"]
CHOICE = ["--keep", "2", "--group-size", "1", *SHORT]
OPEN = ["--pool", "rows.jsonl", "--budget", "4", "--encoder", "hidden", "--embeddings", "kept"]
COMMANDS = {
    "fit elrea": FITTED,
    "fit auto": ["fit", "auto", *MODEL, *ROWS, "--output", "auto", *CLUSTERED],
    "fit token-level": [
        *("fit", "token-level", *MODEL, "--data", "one=rows.jsonl", "--data", "two=shots.jsonl", "--output", "domains"),
        *("--encoder", "hidden", *TRAINED),
    ],
    "fit from-adapters": [
        *("fit", "from-adapters", *SHELF, "--router", "arrow", "--encoder", "hidden", "--output", "shelf", *ON_CPU)
    ],
    "fit kshot-moe": [
        *("fit", "kshot-moe", "--bank", "bank", *TASK, "--output", "task", "--epochs", "1", "--batch-size", "4"),
        *(*OPEN, *CHOICE),
    ],
    "train-extras": ["train-extras", "run", "--methods", "lora-ensembles,mole", "--ensemble-size", "2", *ON_CPU],
    "bank add": ["bank", "add", "new", *EXPERTS, *MODEL, *ON_CPU],
    "profile": ["profile", "pool", *ROWS, "--skills", "choice", "--skill-list", "sums,words", *SHORT],
    "eval": ["eval", "run", *ROWS, "--output", "eval", "--methods", "base,elrea", *SHORT],
    "gather": ["gather", *TASK, *OPEN, "--output", "gathered", *MODEL, *ON_CPU],
    "select": ["select", "bank", *TASK, "--output", "selected", *CHOICE],
}
RESULTS = {
    **dict.fromkeys(("fit elrea", "train-extras"), "run"),
    "fit auto": "auto",
    "fit token-level": "domains",
    "fit from-adapters": "shelf",
    "fit kshot-moe": "task",
    "bank add": "new",
    "profile": "pool/profile",
    "eval": "eval",
    "gather": "gathered",
    "select": "selected",
}
"""The folder that each command writes."""


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


def started(words: list[str], folder: Path, largest: int | None = None, cache: str | None = None) -> BaseProcess:
    """Start a command line; it is at work when this returns."""
    SERVER.set_forkserver_preload(["coterie.cli.commands", "coterie.methods", "coterie.evaluation.symbolic"])
    ready = SERVER.Event()
    given = (words, folder, cache or os.environ["COTERIE_CACHE"], ready, largest)
    process = SERVER.Process(target=command_line, args=given)
    process.start()
    if not ready.wait(120):
        raise TimeoutError(f"{words} did not start")
    return process


def finished(words: list[str], folder: Path, cache: str | None = None) -> float:
    """Run a command line to its end; return its seconds."""
    process, start = started(words, folder, cache=cache), time.perf_counter()
    process.join(300)
    assert process.exitcode == 0, (folder / "std2").read_text()[-2000:]
    return time.perf_counter() - start


def lay_out(folder: Path, model: Path) -> Path:
    """Make what the commands start from: a model, rows, a fitted run, a bank and a pool of its experts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").symlink_to(model)
    for name, rows in {"rows": tiny.make_rows(12), "shots": tiny.make_rows(4, seed=3)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished(FITTED, folder)
    finished(["bank", "add", "bank", *EXPERTS, *MODEL, *ON_CPU], folder)
    finished(["experts", "init", "pool", *(f"--expert={one}" for one in EXPERTS), "--base", "model"], folder)
    return folder


def place_for(command: str, start: Path, folder: Path) -> Path:
    """Copy what a command starts from."""
    shutil.copytree(start, folder, symlinks=True)
    if command == "fit elrea":
        shutil.rmtree(folder / "run")
    return folder


def results(folder: Path) -> dict[str, object]:
    """All files by name, without the times that work took, and without run.yaml, which has the time of its start."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: untimed(path) for name, path in found.items() if path.name != "run.yaml"}


def untimed(path: Path) -> object:
    """What a file holds, without the times that work took."""

    def without_times(record: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in record.items() if "seconds" not in name}

    if path.suffix == ".jsonl":
        return [json.loads(line, object_hook=without_times) for line in path.read_text().splitlines() if line]
    return json.loads(path.read_text(), object_hook=without_times) if path.suffix == ".json" else path.read_bytes()


def disturb(words: list[str], folder: Path, seconds: float, signals: Sequence[int], chance: random.Random) -> int:
    """Let a command be ended by signals, each at a random moment of what the last try had come to, then leave it alone.

    Returns:
        How many of them found it at work.
    """
    hits = 0
    for number in signals:
        process = started(words, folder)
        time.sleep(chance.uniform(0, 0.6 * seconds))
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, number)
        process.join(120)
        if process.exitcode == 0:  # it was faster
            return hits
        hits += 1
        told = (folder / "std2").read_text()
        assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number), told[-2000:]
        if number != signal.SIGKILL:
            assert told.splitlines()[-1] == STOPPED and "Traceback" not in told, told[-2000:]
    finished(words, folder)
    return hits


def check_alike(command: str, disturbed: Path, undisturbed: Path) -> None:
    """Hold what a disturbed command has left to what an undisturbed one has: the same files, and nothing besides."""
    assert results(disturbed / RESULTS[command]) == results(undisturbed / RESULTS[command])
    left = {str(path.relative_to(disturbed)) for path in disturbed.rglob("*")}
    whole = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*")}
    assert {name for name in left - whole if not name.startswith("kept/")} == set()
