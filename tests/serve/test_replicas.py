"""Replicas on a local Ray cluster: the same answers, and one that is killed takes only what it held with it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coterie.serve.replicas import beside_each_other
from helpers import unused_port
from served import QUESTION, AskingAgain, chat, started

CLIENTS = 6
LONG = {
    "model": "elrea",
    "prompt": "add",
    "max_tokens": 150,
    "stream": True,
    "temperature": 0,
    "logit_bias": {},
}


@pytest.fixture(scope="module")
def deployed(run_folder):
    """`coterie serve --ray --replicas 2`, a process of its own, from when it is ready to when it has ended."""
    port = unused_port()
    flags = ["--port", str(port), "--device", "cpu", "--ray", "--replicas", "2"]
    command = [sys.executable, "-m", "coterie", "serve", f"elrea={run_folder}", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in iter(process.stderr.readline, ""):
            if line.startswith("{") and json.loads(line)["event"] == "ready":
                break
        reading = threading.Thread(target=process.stderr.read)
        reading.start()
        yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}")
        process.terminate()
        process.wait(timeout=60)
        reading.join()


@pytest.fixture
def client(deployed):
    with httpx2.Client(base_url=deployed.url, timeout=60) as http:
        yield http


def measured(client, name):
    """The values of a metric, summed by replica."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                replica = sample.labels["replica"]
                found[replica] = found.get(replica, 0) + sample.value
    return found


def replicas():
    """The processes of replicas, as Ray names them."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"ray::ServeReplica" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


def until(condition):
    while not condition():
        time.sleep(0.02)


class Clients(AskingAgain):
    """Clients that ask for long streams, and note when each began, when it ended, and whether it is whole."""

    def __init__(self, url):
        super().__init__(url, CLIENTS)
        self.asked = []

    def ask(self, client):
        began = time.monotonic()
        try:
            whole = client.post("/v1/completions", json=LONG).text.endswith("data: [DONE]\n\n")
        except httpx2.HTTPError:
            whole = False
        self.asked.append((began, time.monotonic(), whole))


@pytest.mark.ray
def test_every_replica_answers_as_the_mixture_in_this_process(client, mixture):
    wanted = mixture.generate(QUESTION, max_new_tokens=8, temperature=0)[0].text
    count = 0
    while len([replica for replica, value in measured(client, "coterie_generation_tokens_total").items() if value]) < 2:
        assert chat(client, temperature=0)["choices"][0]["message"]["content"] == wanted
        count += 1
    assert sum(measured(client, "coterie_generation_tokens_total").values()) == 8 * count


@pytest.mark.ray
def test_a_replica_that_is_killed_fails_no_request_but_those_it_held_and_comes_again(deployed, client):
    before = replicas()
    with Clients(deployed.url) as clients:
        until(lambda: all(measured(client, "coterie_num_requests_running").values()) and len(clients.asked) > CLIENTS)
        alive = time.monotonic()
        os.kill(min(before), signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: sum(began > killed for began, _, _ in clients.asked) > 3 * CLIENTS)
        until(lambda: len(replicas() - before) == 1 and len(measured(client, "coterie_num_requests_running")) == 2)
    failed = [(began, ended) for began, ended, whole in clients.asked if not whole]
    assert len(failed) < CLIENTS  # the other replica held some
    assert all(began < killed and alive < ended for began, ended in failed)


@pytest.mark.ray
def test_who_goes_is_answered_no_longer(client):
    with client.stream("POST", "/v1/completions", json=LONG | {"n": 8}) as response:
        next(response.iter_lines())
    until(lambda: not any(measured(client, "coterie_num_requests_running").values()))


@pytest.mark.ray
def test_a_deployment_that_is_told_to_stop_ends_what_it_has_begun(deployed, client):
    with client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        deployed.process.terminate()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert deployed.process.wait(timeout=60) == 0


def test_what_only_one_replica_would_hear_of_is_refused(run_folder, tmp_path):
    admin = {"Authorization": "Bearer admin-0000000000001"}
    keys = tmp_path / "keys.txt"
    keys.write_text("admin-0000000000001 role=admin\n")
    with started(f"elrea={run_folder}", ray=True, api_key_file=str(keys)) as server:
        for path, body in (
            ("load_lora_adapter", {"lora_name": "a", "lora_path": "a"}),
            ("unload_lora_adapter", {"lora_name": "a"}),
            ("load_mixture", {"name": "a", "path": "a"}),
            ("unload_mixture", {"name": "elrea"}),
        ):
            answer = httpx2.post(f"{server.url}/v1/{path}", json=body, headers=admin)
            assert answer.status_code == 400 and "every replica serves the same" in answer.text


def test_the_values_of_all_replicas_stand_beside_each_other():
    page = b'# HELP a_total What.\n# TYPE a_total counter\na_total{model="m"} %d.0\n'
    joined = beside_each_other([("one", page % 3), ("two", page % 4)]).decode()
    assert joined.splitlines() == [
        "# HELP a_total What.",
        "# TYPE a_total counter",
        'a_total{model="m",replica="one"} 3.0',
        'a_total{model="m",replica="two"} 4.0',
    ]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--replicas", 2], "--replicas 2 does not act without --ray"),
        (["--ray", "--allow-folder", "."], "--allow-folder loads into one process, and --ray has several"),
    ],
)
def test_what_replicas_cannot_do_is_refused_before_anything_starts(run, run_folder, flags, told):
    code, _, err = run("serve", run_folder, "--port", 0, *flags)
    assert code == 2 and told in err
