"""Functions called by the workers of a local Ray cluster: with their results and errors, once more for a death."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._common.usage import usage_lib

from coterie.cluster import done_by_workers, joined, share
from coterie.errors import CoterieError


@pytest.mark.parametrize(
    ("nodes", "processes", "device", "wanted"),
    [
        ([{"CPU": 16}], 2, "auto", {"num_cpus": 8}),
        ([{"CPU": 16}], 3, "auto", {"num_cpus": 5}),
        ([{"CPU": 8}, {"CPU": 8}], 3, "auto", {"num_cpus": 4}),  # 5 would leave room for two
        ([{"CPU": 2}, {"CPU": 32}], 3, "auto", {"num_cpus": 10}),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], 3, "auto", {"num_cpus": 1, "num_gpus": 1}),
        ([{"CPU": 8, "GPU": 2}], 2, "cpu", {"num_cpus": 4}),
    ],
)
def test_processes_share_the_cores_so_that_all_fit_or_take_a_gpu_each(nodes, processes, device, wanted):
    assert share(nodes, processes, device) == wanted


@pytest.mark.parametrize("nodes", [[{"CPU": 2.0}], [{"CPU": 64.0, "GPU": 2.0}], [{}]])
def test_more_processes_than_there_is_room_for_are_refused(nodes):
    with pytest.raises(CoterieError, match="3 processes want a .PU each, and the Ray cluster has"):
        share(nodes, 3)


def test_a_cluster_that_is_not_there_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(CoterieError, match="the Ray cluster '127.0.0.1:1' cannot be joined"), joined():
        pass


@pytest.fixture
def never_joined(monkeypatch):
    """Ray, which joins nothing; what the environment holds is as before afterwards."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "RAY_DEDUP_LOGS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, lambda *words, **options: None)


def test_a_cluster_without_a_token_is_warned_of(never_joined, monkeypatch, caplog):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with joined():
        assert "asks for no token" in caplog.text and "RAY_AUTH_MODE=token" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with joined():
        assert not caplog.text


def test_every_cluster_of_this_machine_has_a_token_of_its_own(never_joined, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as Ray says itself
    with joined():
        first = os.environ["RAY_AUTH_TOKEN"]
    assert len(first) == 64
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with joined():
        assert os.environ["RAY_AUTH_TOKEN"] != first


def test_nobody_is_told_that_ray_is_used(never_joined):
    with joined():
        assert not usage_lib.usage_stats_enabled()


def square(number: int) -> int:
    return number**2


def refuse(number: int) -> int:
    raise CoterieError(f"{number} is too large; give a smaller one")


def die_once(marker: str, number: int) -> int:
    if number == 1 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        with joined() as ray:
            yield ray


@pytest.mark.ray
def test_workers_return_what_this_process_would(cluster):
    found = dict(done_by_workers(square, [(n,) for n in range(10)], workers=2))
    assert found == {n: n**2 for n in range(10)}


@pytest.mark.ray
def test_an_error_of_a_worker_is_the_error_of_the_call(cluster, monkeypatch):
    cancelled = []
    monkeypatch.setattr(ray, "cancel", lambda *words, **how: cancelled.append(words))
    with pytest.raises(CoterieError) as caught:
        list(done_by_workers(refuse, [(3,)], workers=1))
    assert type(caught.value) is CoterieError and str(caught.value) == "3 is too large; give a smaller one"
    assert not cancelled  # Ray may abort the whole process where that meets the end of a call


@pytest.mark.ray
def test_a_worker_that_dies_costs_a_retry_and_nothing_else(cluster, tmp_path):
    found = dict(done_by_workers(die_once, [(str(tmp_path / "died"), n) for n in range(4)], workers=2))
    assert found == {n: n for n in range(4)} and (tmp_path / "died").exists()


@pytest.mark.ray
def test_a_worker_that_dies_again_and_again_is_told_in_one_line(cluster):
    with pytest.raises(CoterieError, match="a worker of die died 4 times"):
        list(done_by_workers(die, [(0,)], workers=1))


JOIN = """
from coterie.cluster import joined
from coterie.errors import CoterieError
try:
    with joined():
        print("joined")
except CoterieError as error:
    print(error)
"""


@pytest.mark.ray
def test_who_has_another_token_is_not_let_in(cluster):
    address = {"RAY_ADDRESS": cluster.get_runtime_context().gcs_address}
    for token, told in (("t" * 64, "cannot be joined"), (os.environ["RAY_AUTH_TOKEN"], "joined")):
        own = os.environ | address | {"RAY_AUTH_TOKEN": token}
        done = subprocess.run([sys.executable, "-c", JOIN], env=own, capture_output=True, text=True, check=True)
        assert told in done.stdout.splitlines()[-1]
    assert os.environ["RAY_AUTH_MODE"] == "token" and not (Path.home() / ".ray").exists()
