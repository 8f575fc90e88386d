"""Several processes that do one command together: who does what, and that the files are those of one process.

The processes of the slow tests are real ones over gloo, as a launcher starts them.
"""

import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from conditions import OUTPUTS
from conftest import write_rows
from coterie import launcher, ranks
from coterie.artifacts import RunFolder, write_text
from coterie.backbone.loading import load_backbone
from coterie.data.devices import tell_idle
from coterie.errors import CoterieError
from coterie.settings.groups import ModelSettings
from crashing import started
from helpers import table, unused_port
from kshot_place import rows_of

# -------------------------------------------------------------------------------------------------------- who does what


def test_work_is_shared_out_by_weight_the_heaviest_first():
    weights = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 1.0}
    assert ranks.shared_out(weights, 2) == [["a", "d"], ["b", "c", "e"]]
    assert ranks.shared_out(weights, 1) == [list(weights)]
    assert ranks.shared_out({"a": 1.0}, 3) == [["a"], [], []]


LAUNCHED = table(
    ("nobody", {}, (0, 1)),
    ("torchrun", {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2)),
    ("torchrun with one process", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1)),
    ("mpirun", {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, (3, 4)),
)


@pytest.mark.parametrize(("variables", "found"), LAUNCHED)
def test_a_launcher_says_which_process_this_is_until_one_works_alone(variables, found, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher.launched() == found
    with ranks.alone():
        assert launcher.launched() == (0, 1)
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
    assert launcher.launched() == found


def test_a_launcher_that_does_not_say_which_process_this_is_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(CoterieError, match="WORLD_SIZE is '4' and RANK is None.*accelerate launch"), ranks.joined():
        pass


def test_processes_that_cannot_reach_each_other_say_so(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CoterieError, match="process 0 of 2 cannot reach the others .*MASTER_ADDR"), ranks.joined():
        pass


def test_every_process_has_a_gpu_of_its_own_and_one_alone_names_those_that_stay_idle(model_folder, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with caplog.at_level("INFO", "coterie"):
        tell_idle(torch.device("cuda"))
        tell_idle(torch.device("cpu"))
    (told,) = caplog.messages
    assert "to use cuda:1, cuda:2 too" in told
    token = ranks._NOW.set(ranks._Processes(local=1))
    try:
        with pytest.raises(CoterieError, match="a GPU each, not all 'cuda:0'; leave --device out"):
            load_backbone(ModelSettings(model=str(model_folder), device="cuda:0"))
        with pytest.raises(CoterieError, match="device 'cuda:1' is not there"):
            load_backbone(ModelSettings(model=str(model_folder), device="cuda"))
        tell_idle(torch.device("cuda:1"))
        assert len(caplog.messages) == 1
    finally:
        ranks._NOW.reset(token)


# ------------------------------------------------------------------------------------------------- together, in threads


class Threads:
    """Processes that are threads: what they tell each other goes through a barrier."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.slots = count, threading.Barrier(count, timeout=120), [None] * count

    def tell(self, value: Any) -> list[Any]:
        now = ranks._NOW.get()
        if now.count == 1:
            return [value]
        self.slots[now.rank] = json.loads(json.dumps(value))
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def run(self, do: Callable[[int], Any]) -> list[Any]:
        """What each of them returns or raises."""
        results: list[Any] = [None] * self.count

        def body(number: int) -> None:
            ranks._NOW.set(ranks._Processes(number, self.count, is_quiet=number > 0, local=number))
            try:
                results[number] = do(number)
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=body, args=(number,)) for number in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def three(monkeypatch) -> Threads:
    threads = Threads(3)
    monkeypatch.setattr(ranks, "_told", threads.tell)
    return threads


def test_the_first_makes_what_is_one_and_all_know_what_it_made(three):
    made = []

    def make() -> list[int]:
        made.append((ranks.rank(), ranks.count()))
        return [1, 2]

    assert three.run(lambda _: ranks.by_first(make)) == [[1, 2]] * 3
    assert made == [(0, 1)]  # and it worked alone


def test_trouble_of_the_first_and_of_any_is_the_trouble_of_all(three):
    def fail(number: int) -> None:
        raise CoterieError(f"no luck {number}")

    found = three.run(lambda _: ranks.by_first(lambda: fail(0)))
    assert [(type(one), str(one)) for one in found] == [(ranks.SharedError, "no luck 0")] * 3
    found = three.run(lambda number: ranks.each(lambda: fail(number) if number else "fine"))
    assert [(type(one), str(one)) for one in found] == [(ranks.SharedError, "process 1 of 3: no luck 1")] * 3
    assert three.run(lambda number: ranks.each(lambda: number)) == [0, 1, 2]


def test_what_is_not_the_same_everywhere_is_named(three):
    found = three.run(lambda number: ranks.check_same({"data": "x", "model": "y" if number < 2 else "z"}))
    assert {str(one) for one in found} == {"process 2 of 3 has another model than the first; give all the same files"}


def test_tasks_are_done_once_each_by_one_alone_and_together_where_they_are_few(three, caplog):
    done: list[tuple[str, int, int]] = []

    def task(name: str, number: int) -> Callable[[], None]:
        return lambda: done.append((name, number, ranks.count()))

    def share(names: Sequence[str]) -> list[Any]:
        weights = {name: float(10 - place) for place, name in enumerate(names)}
        return three.run(lambda n: ranks.spread({name: task(name, n) for name in names}, weights, "things"))

    with caplog.at_level("INFO", "coterie"):
        share("abcd")
    assert sorted(done) == [("a", 0, 1), ("b", 1, 1), ("c", 2, 1), ("d", 2, 1)]
    assert caplog.messages[0] == "things: process 0 does a; process 1 does b; process 2 does c, d"
    done.clear()
    share("ab")
    assert sorted(done) == [(name, number, 3) for name in "ab" for number in range(3)]


def test_alike_pieces_of_work_are_dealt_out_in_turn(three):
    batches = [[0, 1], [2, 3], [4, 5], [6]]
    assert three.run(lambda _: list(ranks.share(batches))) == [[[0, 1], [6]], [[2, 3]], [[4, 5]]]
    assert list(ranks.share(batches)) == batches


def test_a_stage_is_made_by_the_first_or_by_all_and_files_are_the_firsts(three, tmp_path):
    made: list[tuple[str, int]] = []

    def run(number: int) -> tuple[str, str]:
        folder = RunFolder(tmp_path)

        def make(name: str) -> Callable[[Path], None]:
            def fill(working: Path) -> None:
                made.append((name, number))
                write_text(working / "who", f"{ranks.rank()} of {ranks.count()}")

            return fill

        alone = folder.stage("alone", make("alone"), {})
        together = folder.stage("deep/together", make("together"), {}, together=True)
        return (alone / "who").read_text(), (together / "who").read_text()

    assert three.run(run) == [("0 of 1", "0 of 3")] * 3
    assert sorted(made) == [("alone", 0), ("together", 0), ("together", 1), ("together", 2)]
    made.clear()
    assert three.run(run) == [("0 of 1", "0 of 3")] * 3
    assert made == []
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"who", "stages.jsonl"}


def test_nobody_reads_a_mixtures_description_before_the_first_has_written_it(three, mixture, tmp_path):
    def write(number: int) -> str:
        time.sleep(0.0 if number else 0.3)  # the first is the last to be there
        mixture.write_description(tmp_path)
        return (tmp_path / "mixture.json").read_text()

    for name in mixture.bank.names:
        (tmp_path / "experts").mkdir(exist_ok=True)
        (tmp_path / "experts" / name).symlink_to(mixture.folder / "experts" / name)
    assert [json.loads(text)["method"] for text in three.run(write)] == [mixture.method] * 3


def test_the_first_does_what_one_process_does_and_the_others_load_it(three):
    class Settings:
        command = "fit something"

    fit = ranks.by_one(lambda settings: f"loaded by {ranks.rank()}")(lambda settings, _: f"made by {ranks.count()}")
    assert fit(Settings, None) == "made by 1"
    assert three.run(lambda _: fit(Settings, None)) == ["made by 1", "loaded by 1", "loaded by 2"]


# ----------------------------------------------------------------------------------------------------- real processes

FIT = ["--clusters", "3", "--rank", "4", "--epochs", "2", "--expert-epochs", "1", "--batch-size", "4", "--d-proj", "64"]
FIT += ["--micro-batch-size", "2", "--learning-rate", "1e-2", "--device", "cpu", "--judge-folds", "2"]


class Member(NamedTuple):
    """A process, and where it writes what it prints and tells."""

    process: BaseProcess
    folder: Path


def start(words: list[str], folder: Path, count: int = 1) -> list[Member]:
    """Start a command in as many processes, as a launcher does."""
    found, port = [], str(unused_port())
    for number in range(count):
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "MASTER_PORT": port}
        launcher = {**place, "MASTER_ADDR": "127.0.0.1"} if count > 1 else {}
        own = Path(tempfile.mkdtemp(dir=folder))
        found.append(Member(started(words, own, variables=launcher), own))
    return found


def end(members: Sequence[Member]) -> list[tuple[int | None, str, str]]:
    """Wait for processes; return their exit codes, what they printed, and what they told."""
    with ExitStack() as stack:
        for process, _ in members:
            stack.callback(process.kill)
        for process, _ in members:
            process.join(300)
        return [(one.process.exitcode, *((one.folder / name).read_text() for name in OUTPUTS)) for one in members]


def files_of(folder: Path) -> dict[str, Any]:
    """All files of a run by name: tensors as they are, records without what differs between any two runs."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = {key: value.tolist() for key, value in load_file(path).items()}
        elif name == "run.yaml":
            record = yaml.safe_load(path.read_text())
            found[name] = {key: record[key] for key in ("command", "inputs", "files")}
        else:
            found[name] = re.sub('"seconds": [0-9.]+', "", path.read_text().replace(str(folder), ""))
    return found


@pytest.mark.slow
def test_two_processes_choose_for_a_task_as_one_does(bank, pool_file, tmp_path):
    shots = write_rows(tmp_path / "shots.jsonl", rows_of("pick", 6, seed=77))
    words = ["fit", "kshot-auto", "--bank", str(bank), "--shots", str(shots), "--pool", str(pool_file), "--budget", "4"]
    words += ["--encoder", "hidden", "--keep", "2", "--judge-folds", "2", "--device", "cpu"]
    words += ["--epochs", "1", "--batch-size", "4", "--learning-rate", "5e-3", "--expert-dropout", "0"]
    ((code, _, trouble),) = end(start([*words, "--output", str(tmp_path / "one")], tmp_path))
    assert code == 0, trouble
    ended = end(start([*words, "--output", str(tmp_path / "two")], tmp_path, 2))
    assert [code for code, _, _ in ended] == [0, 0], ended
    one, two = (json.loads((tmp_path / name / "auto.json").read_text()) for name in ("one", "two"))
    assert one["chosen"] == two["chosen"] and one["adapters"] == two["adapters"]
    for own, other in zip(one["candidates"], two["candidates"], strict=True):
        assert own["name"] == other["name"] and own["nll"] == pytest.approx(other["nll"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(model_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", tiny.make_rows(31))
    words = ["fit", "auto", "--model", str(model_folder), "--data", str(rows), *FIT]
    ((code, _, trouble),) = end(start([*words, "--output", str(tmp_path / "one")], tmp_path))
    assert code == 0, trouble
    ended = end(start([*words, "--output", str(tmp_path / "two")], tmp_path, 2))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert yaml.safe_load((tmp_path / "two" / "run.yaml").read_text())["processes"] == 2
    (_, printed, told), (_, nothing, silent) = ended
    assert printed
    assert nothing == ""
    assert "experts" not in silent
    for share in (
        "training base: each of 2 processes takes 2 of the 4 rows of a step",
        "experts of cluster: process 0 does cluster-",
        "folds to judge: process 0 does fold 1; process 1 does fold 2",
    ):
        assert share in told


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_in_one_line_and_the_run_goes_on_later(model_folder, tmp_path):
    rows, output = write_rows(tmp_path / "rows.jsonl", tiny.make_rows(31)), tmp_path / "run"
    words = ["fit", "elrea", "--model", str(model_folder), "--data", str(rows), *FIT[:-2], "--epochs", "12"]
    words += ["--output", str(output)]
    members = start(words, tmp_path, 2)
    while not list(output.with_name("run.partial").rglob("checkpoint-*")):  # they train together
        assert members[0].process.is_alive()
        time.sleep(0.05)
    members[1].process.kill()
    (code, _, told), _ = end(members)
    assert code == 2
    line = "error: process 0 of 2 has lost another one, which says why it ended; the same command goes on"
    assert told.splitlines()[-1].startswith(line)
    assert "Traceback" not in told
    ended = end(start(words, tmp_path, 2))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert (output / "mixture.json").exists()


@pytest.mark.slow
def test_what_is_wrong_for_all_is_told_once(model_folder, tmp_path):
    words = ["fit", "elrea", "--model", str(model_folder), "--data", str(tmp_path / "none"), "--output", "x", *FIT[:2]]
    (first, *_, told), (second, printed, nothing) = end(start(words, tmp_path, 2))
    assert (first, second) == (2, 2)
    assert told.splitlines()[-1].startswith("error: ")
    assert (printed, "error" in nothing) == ("", False)


def test_what_cannot_be_shared_is_done_and_told_by_the_first_alone(run, monkeypatch):
    found = []
    for number in "10":  # the first one last, so that what is logged stays as it is in one process
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv("WORLD_SIZE", "2")
        found.append(run("methods"))
    other, (code, printed, told) = found
    assert code == 0
    assert "symbolic-moe" in printed
    assert told.startswith("methods is done by one of the 2 processes alone\n")
    assert other == (0, "", "")
