"""Commands that are killed or stopped at random moments, in processes of their own, end as undisturbed ones do."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from conditions import files_up_to, jumping_clock, only_reading, writable
from crashing import (
    COMMANDS,
    FITTED,
    FULL,
    check_alike,
    contents,
    disturb,
    finished,
    has_disks,
    inputs_of,
    lay_out,
    needs,
    place_for,
    results,
    started,
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, model_folder) -> Path:
    """What the commands start from, each in a place of its own: a model, rows, a fitted run, a bank and a pool."""
    return lay_out(tmp_path_factory.mktemp("killed") / "start", model_folder)


IN_CI = ("fit elrea", "bank add", "fit from-adapters", "profile", "eval", "select")
"""A handful; `benchmarks/crashes.py` does all commands, many times."""


@pytest.mark.parametrize("command", IN_CI)
def test_a_command_disturbed_at_random_moments_ends_as_an_undisturbed_one(command, fitted, tmp_path):
    """Killed, stopped and out of room, each where the last try had come to, then left alone.

    All the while the clock jumps, and what is only read cannot be written.
    """
    undisturbed, disturbed = (place_for(command, fitted, tmp_path / name) for name in ("undisturbed", "disturbed"))
    needed = needs(command, undisturbed)
    troubles = [signal.SIGKILL, FULL if has_disks() else signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
    conditions = [partial(jumping_clock, 0), partial(only_reading, inputs_of(command))]
    disturb(command, disturbed, needed, troubles, random.Random(command), conditions)
    check_alike(command, disturbed, undisturbed)


@pytest.mark.parametrize("command", COMMANDS)
def test_where_nothing_may_be_written_a_command_says_so_in_one_line(command, fitted, tmp_path):
    folder = place_for(command, fitted, tmp_path / "place")
    before = contents(folder)
    process = started(COMMANDS[command], folder, [partial(only_reading, ["."])])
    process.join(120)
    writable(folder)
    told = (folder / "std2").read_text().splitlines()
    assert process.exitcode == 2 and told[-1].startswith("error: ") and "cannot be" in told[-1], told
    assert not [line for line in told if "Traceback" in line]
    assert contents(folder) == before


def test_a_second_signal_ends_the_process_at_once(fitted, tmp_path):
    folder = place_for("fit elrea", fitted, tmp_path / "place")
    process = started([*FITTED, "--epochs", "100000"], folder)
    while not (folder / "run.partial" / "working").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)  # so that both are there before it can do anything about the first
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    process.join(120)
    assert process.exitcode in (130, 143)


def test_two_processes_on_one_output_are_told_of_each_other(fitted, tmp_path):
    folder = place_for("fit elrea", fitted, tmp_path / "place")
    first = started([*FITTED, "--epochs", "100000"], folder)
    try:
        while not (folder / "run.partial" / "run.yaml").exists():
            time.sleep(0.01)
        second = started([*FITTED, "--epochs", "100000"], folder)
        second.join(120)
        told = (folder / "std2").read_text()
        assert second.exitcode == 2 and f"run is being written by process {first.pid} of " in told
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    finished([*FITTED, "--epochs", "100000", "--limit", "8", "--output", "other", "--epochs", "1"], folder)


LIMITS = {
    "the check of a fresh adapter": (10_000, "while writing /tmp"),
    "the state of Adam": (50_000, "while writing run.partial/working/checkpoints/.epoch-0/adam.safetensors"),
    "the optimiser of the trainer": (67_000, "while writing run.partial/working/checkpoints"),
}


@pytest.mark.parametrize(("largest", "told"), LIMITS.values(), ids=LIMITS)
def test_a_limit_of_file_sizes_is_one_line_and_what_was_done_goes_on(largest, told, fitted, tmp_path):
    folder = place_for("fit elrea", fitted, tmp_path / "place")
    process = started(FITTED, folder, [partial(files_up_to, largest)])
    process.join(120)
    *before, line = (folder / "std2").read_text().splitlines()
    assert process.exitcode == 2 and line.startswith("error: no ") and told in line and "free some and start" in line
    assert not any("Traceback" in one for one in before)
    finished(FITTED, folder)
    assert results(folder / "run") == results(fitted / "run")
