"""Commands that are disturbed, in processes of their own, beside the same commands left alone."""

import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from types import MappingProxyType

import tiny
from conditions import BLOCK, OUTPUTS, disk_with, own_disk, writable
from coterie import cli
from coterie.cli import process as ending
from coterie.cli.process import STOPPED, TROUBLE

SERVER = multiprocessing.get_context("forkserver")  # its children have everything imported, and no threads
SERVER.set_forkserver_preload(
    "coterie.cli.commands coterie.methods coterie.evaluation.symbolic coterie.experts.trainer tiny".split()
)
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
PROFILED = ["profile", "pool", *ROWS, "--skills", "choice", "--skill-list", "sums,words", *SHORT]
EVALUATED = ["eval", "run", *ROWS, "--output", "eval", "--methods", "base,elrea", *SHORT]
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
    "fit kshot-auto": [
        *("fit", "kshot-auto", "--bank", "bank", "--shots", "rows.jsonl", "--limit", "6", "--judge-folds", "2"),
        *("--output", "chosen-task", "--epochs", "1", "--batch-size", "4", "--pool", "shots.jsonl", "--budget", "2"),
        *("--encoder", "hidden", "--embeddings", "kept", *CHOICE, "--rank-by", "both"),
    ],
    "fit symbolic-moe": ["fit", "symbolic-moe", "--experts", "pool", "--output", "recruits", *SHORT],
    "train-extras": ["train-extras", "run", "--methods", "lora-ensembles,mole", "--ensemble-size", "2", *ON_CPU],
    "bank add": ["bank", "add", "new", *EXPERTS, *MODEL, *ON_CPU],
    "profile": PROFILED,
    "eval": EVALUATED,
    "report": ["report", "eval"],
    "gather": ["gather", *TASK, *OPEN, "--output", "gathered", *MODEL, *ON_CPU],
    "select": ["select", "bank", *TASK, "--output", "selected", *CHOICE],
    "influence": [
        *("influence", "run", "--target", "shots.jsonl", *ROWS, "--share", "0.5", "--output", "chosen", *ON_CPU)
    ],
    "generate": ["generate", "run", "--input", "shots.jsonl", "--output", "answers.jsonl", *SHORT],
    "export": ["export", "run", "--for", "vllm", "--output", "exported", *ON_CPU],
}
RESULTS = {
    **dict.fromkeys(("fit elrea", "train-extras"), "run"),
    "fit auto": "auto",
    "fit token-level": "domains",
    "fit from-adapters": "shelf",
    "fit kshot-moe": "task",
    "fit kshot-auto": "chosen-task",
    "fit symbolic-moe": "recruits",
    "bank add": "new",
    "profile": "pool/profile",
    **dict.fromkeys(("eval", "report"), "eval"),
    "gather": "gathered",
    "select": "selected",
    "influence": "chosen",
    "generate": "answers.jsonl",
    "export": "exported",
}
"""The folder or file that each command writes."""
ADDING = ("train-extras", "report", "bank add")
"""The commands that add to what is there, and may be typed again when they are done."""
LAID_OUT = ("rows.jsonl", "shots.jsonl", "run", "bank", "pool", "eval")
FULL, NO_ROOM = "full disk", "no space left on the disk"
Condition = Callable[[Path], AbstractContextManager[None]]


def command_line(
    words: list[str], folder: Path, variables: dict[str, str], ready: Event, conditions: Sequence[Condition]
) -> None:
    """Run a command line in a folder, as a process of its own, under conditions."""
    gc.freeze()  # as in conftest.py; and what is shared with the other children stays shared
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    for number, name in enumerate(OUTPUTS, start=1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    os.chdir(folder)
    sys.argv = ["coterie", *words]
    run, ending._outcome = ending._outcome, lambda words: (ready.set(), run(words))[1]  # signals are awaited by then
    with ExitStack() as stack:
        for condition in conditions:
            stack.enter_context(condition(folder))
        cli.main()


def started(
    words: list[str],
    folder: Path,
    conditions: Sequence[Condition] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> BaseProcess:
    """Start a command line; it is at work when this returns."""
    ready = SERVER.Event()
    given = (words, folder, {"COTERIE_CACHE": os.environ["COTERIE_CACHE"], **variables}, ready, conditions)
    process = SERVER.Process(target=command_line, args=given)
    process.start()
    if not ready.wait(120):
        raise TimeoutError(f"{words} did not start")
    return process


def finished(words: list[str], folder: Path, conditions: Sequence[Condition] = ()) -> float:
    """Run a command line to its end; return its seconds."""
    process, start = started(words, folder, conditions), time.perf_counter()
    process.join(300)
    assert process.exitcode == 0, (folder / "std2").read_text()[-2000:]
    return time.perf_counter() - start


def needs(command: str, folder: Path) -> tuple[float, int]:
    """Run a command undisturbed; return the seconds that it takes and the bytes that it writes."""
    before = size_of(folder)
    return finished(COMMANDS[command], folder), size_of(folder) - before


def lay_out(folder: Path, model: Path) -> Path:
    """Make what the commands start from: a model, rows, a run, its evaluation, a bank and a profiled pool."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").symlink_to(model)
    for name, rows in {"rows": tiny.make_rows(12), "shots": tiny.make_rows(4, seed=3)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished(FITTED, folder)
    finished(["bank", "add", "bank", *EXPERTS, *MODEL, *ON_CPU], folder)
    finished(["experts", "init", "pool", *(f"--expert={one}" for one in EXPERTS), "--base", "model"], folder)
    finished(PROFILED, folder)
    finished(EVALUATED, folder)
    return folder


def place_for(command: str, start: Path, folder: Path) -> Path:
    """Copy what a command starts from, which is not what it makes."""
    shutil.copytree(start, folder, symlinks=True, ignore=shutil.ignore_patterns(*OUTPUTS))
    if command in RESULTS and command not in ADDING:
        shutil.rmtree(folder / RESULTS[command], ignore_errors=True)
    return folder


def inputs_of(command: str) -> list[str]:
    """Name the parts of such a place that a command reads and does not write to."""
    written = {RESULTS.get(command, "").partition("/")[0], "pool" if command == "fit symbolic-moe" else ""}
    return [name for name in LAID_OUT if name not in written]


def has_disks() -> bool:
    """Tell whether this system gives processes disks of their own."""
    with tempfile.TemporaryDirectory() as folder:
        process = SERVER.Process(target=own_disk, args=(Path(folder), BLOCK))
        process.start()
        process.join()
    return process.exitcode == 0


def size_of(folder: Path) -> int:
    """Count the bytes of all files."""
    return sum(map(len, contents(folder).values()))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder but the output of the commands in it."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in OUTPUTS)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def results(folder: Path, made_in: Path | None = None) -> dict[str, object]:
    """All files by name, without the times that work took, and without run.yaml, which has the time of its start.

    Where the model is called by its whole path, that of the place is left out: where it was made, or else where it is.
    """
    place = made_in or next((one for one in folder.parents if (one / "model").exists()), folder.parent)
    paths = [folder, *sorted(folder.rglob("*"))]
    found = {str(path.relative_to(folder)): path for path in paths if path.is_file()}
    return {name: untimed(path, place) for name, path in found.items() if path.name != "run.yaml"}


def without_times(record: dict[str, object]) -> dict[str, object]:
    """Return a record without the times that work took."""
    return {name: value for name, value in record.items() if "seconds" not in name}


def untimed(path: Path, place: Path) -> object:
    """What a file holds, without the place that it lies in and the times that work took."""
    content = path.read_bytes().replace(os.fsencode(place), b"")
    if path.suffix == ".jsonl":
        return [json.loads(line, object_hook=without_times) for line in content.decode().split("\n") if line]
    return json.loads(content, object_hook=without_times) if path.suffix == ".json" else content


def disturb(
    command: str,
    folder: Path,
    undisturbed: tuple[float, int],
    troubles: Sequence[int | str],
    chance: random.Random,
    conditions: Sequence[Condition] = (),
) -> Counter[int | str]:
    """Let a command meet troubles, each where the last try has left it, then leave it alone.

    Args:
        command: its name.
        folder: where it runs.
        undisturbed: the seconds that it takes and the bytes that it writes.
        troubles: signals, each at a random moment, and disks that get full at a random byte.
        chance: draws them.
        conditions: under which all tries run.

    Returns:
        How often each of them met it at work.
    """
    seconds, size = undisturbed
    words, result = COMMANDS[command], folder / RESULTS[command]
    met: Counter[int | str] = Counter()
    for trouble in troubles:
        is_full = trouble == FULL
        disk = [partial(disk_with, round(chance.uniform(0, size)))] if is_full else []
        process = started(words, folder, [*disk, *conditions])
        if isinstance(trouble, int):
            time.sleep(chance.uniform(0, 0.6 * seconds))
            assert process.pid is not None  # it was started
            with suppress(ProcessLookupError):
                os.kill(process.pid, trouble)
        process.join(120)
        writable(folder)
        if process.exitcode == 0:  # it was faster, or found room enough
            return met
        met[trouble] += 1
        if command not in ADDING and result.exists():  # it was done, and about to end
            return met
        told = (folder / "std2").read_text()
        ended = {FULL: TROUBLE, signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
        assert process.exitcode == ended[trouble] and "Traceback" not in told, f"{process.exitcode}: {told[-2000:]}"
        if trouble != signal.SIGKILL:
            assert (NO_ROOM if is_full else STOPPED) in told.splitlines()[-1], told[-2000:]
    finished(words, folder, conditions)
    writable(folder)
    return met


def check_alike(command: str, disturbed: Path, undisturbed: Path, made_in: Path | None = None) -> None:
    """Hold what a disturbed command has left to what an undisturbed one has: the same files, and nothing besides."""
    found, wanted = (results(place / RESULTS[command], made_in) for place in (disturbed, undisturbed))
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    assert not differing, f"these differ in {disturbed}: {', '.join(differing)}"
    left = {str(path.relative_to(disturbed)) for path in disturbed.rglob("*")}
    whole = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*")}
    more = {name for name in left - whole if not name.startswith("kept/")}
    assert not more, f"these are left in {disturbed}: {', '.join(sorted(more))}"
