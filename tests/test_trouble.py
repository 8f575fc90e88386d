"""Trouble with streams, homes and names is one line and exit code 2, whatever the command."""

import os
import pwd
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import yaml

from conftest import FIT
from coterie.cli.process import finish
from crashing import started
from helpers import refused

LONG = "x" * 300
METHODS = ["methods", "--json"]


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in the list of users."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def fit(run, model_folder, train_file, output, **changes: object):
    settings = {"model": model_folder, "data": train_file, "output": output, **FIT, "epochs": 1, **changes}
    return run("fit", "elrea", *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items()))


def test_a_user_without_home_or_name_needs_a_cache_and_nothing_else(
    homeless, run, model_folder, train_file, tmp_path, monkeypatch
):
    assert fit(run, model_folder, train_file, tmp_path / "run")[0] == 0
    monkeypatch.delenv("COTERIE_CACHE")
    code, _, err = fit(run, model_folder, train_file, tmp_path / "other")
    assert code == 2 and "nobody knows the home folder in '~/.cache/coterie'; set COTERIE_CACHE to a folder" in err
    assert os.listdir(tmp_path) == ["run"]


def test_an_interrupt_that_python_ignores_comes_again(capsys):
    """An error in `__del__` goes nowhere: so did the first signal there, and the work went on."""

    class Leaving:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)  # a job in the background ignores SIGINT
            time.sleep(0.01)

    reached = []

    def work(words: list[str]) -> None:
        leaving = Leaving()
        del leaving
        reached.append("went on")
        time.sleep(20)
        reached.append("to the end")

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with pytest.raises(SystemExit) as ended:
        finish(work)
    assert ended.value.code == 143 and reached == ["went on"]
    assert capsys.readouterr().err == "stopped; the same command goes on where it stopped\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == handlers


@pytest.mark.parametrize("setting", ["model", "output", "data"])
def test_the_home_of_nobody_is_told(setting, run, model_folder, train_file, tmp_path):
    output = "~nosuchuser/x" if setting == "output" else tmp_path / "run"
    changes = {} if setting == "output" else {setting: "~nosuchuser/x"}
    code, out, err = fit(run, model_folder, train_file, output, **changes)
    assert (code, out) == (2, "") and "~nosuchuser/x" in err.splitlines()[-1] and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "words",
    [
        ["eval", LONG, "--data", "DATA", "--output", "OUT"],
        ["eval", "MIXTURE", "--data", LONG, "--output", "OUT"],
        ["eval", "MIXTURE", "--data", "DATA", "--output", LONG],
        ["generate", "MIXTURE", "hi", "--output", LONG],
        ["generate", "MIXTURE", "--input", LONG],
        ["route", LONG, "hi"],
        ["bank", "add", LONG, "ADAPTER", "--model", "MODEL"],
        ["bank", "list", LONG],
        ["bank", "verify", LONG],
        ["experts", "init", LONG, "--expert", "a=MODEL"],
        ["profile", LONG, "--data", "DATA"],
        ["gather", "--shots", "DATA", "--pool", "DATA", "--output", LONG],
        ["report", LONG],
        ["spread", LONG],
        ["run", LONG],
        ["train-extras", LONG],
    ],
    ids=lambda words: " ".join(word[:8] for word in words),
)
def test_a_name_that_is_too_long_is_one_line(words, run, run_folder, model_folder, train_file, tmp_path, monkeypatch):
    known = {"DATA": train_file, "OUT": tmp_path / "out", "MIXTURE": run_folder, "MODEL": model_folder}
    known |= {"ADAPTER": run_folder / "experts" / "base", "a=MODEL": f"a={model_folder}"}
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*(known.get(word, word) for word in words))
    assert (code, out) == (2, "") and LONG[:80] in err.splitlines()[-1] and "Traceback" not in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"], ids=["NUL", "half a character"])
def test_a_name_that_is_no_text_is_one_line(name, run, run_folder, train_file, tmp_path):
    refused(run("eval", run_folder, "--data", train_file, "--output", tmp_path / name), "no text")
    settings = {"mixture": str(run_folder), "data": [str(train_file)], "output": f"{tmp_path}/{name}"}
    record = tmp_path / "run.yaml"
    record.write_text(yaml.safe_dump({"command": "eval", "settings": settings}))
    code, out, err = run("run", record)
    assert (code, out) == (2, "") and "Traceback" not in err and os.listdir(tmp_path) == ["run.yaml"]


@contextmanager
def full(folder):
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    yield


@contextmanager
def unread(folder):
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    yield


def test_a_full_stdout_is_one_line(tmp_path):
    process = started(METHODS, tmp_path, [full])
    process.join()
    (line,) = (tmp_path / "std2").read_text().splitlines()
    assert process.exitcode == 2 and line.startswith("error: ") and "No space left on device" in line


def test_a_reader_that_has_gone_ends_the_work_quietly(tmp_path):
    process = started(METHODS, tmp_path, [unread])
    process.join()
    assert (process.exitcode, (tmp_path / "std2").read_text()) == (141, "")


def test_a_log_has_no_bars_but_a_line_now_and_then():
    code = """
import sys, time, os
from coterie.cli import process
sys.argv = ["coterie"]
def work(words):
    from tqdm.auto import tqdm
    for seconds in (0, 10.5):
        with tqdm(total=3, desc=f"bar of {seconds} s") as bar:
            bar.update(1)
            bar.start_t -= seconds
            bar.last_print_t -= 3 * seconds
            bar.update(2)
process.finish(work)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    lines = [line.strip() for line in result.stderr.decode().splitlines() if line.strip()]
    assert result.returncode == 0 and lines and all(line.startswith("bar of 10.5 s: 3 of 3") for line in lines)
