"""Told to stop under load, a server finishes what it has begun and takes nothing new (vLLM's test_shutdown.py)."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from coterie.serve.app import create_app, listening
from coterie.serve.catalogue import Catalogue
from coterie.serve.lifetime import Lifetime, Server
from coterie.serve.worker import Worker
from coterie.settings.reading import from_flat
from coterie.settings.serving import ServeSettings
from helpers import unused_port
from served import AskingAgain

STREAM = {"model": "elrea", "prompt": "add", "max_tokens": 30, "stream": True, "temperature": 0}
COMPLETIONS = "/v1/completions"


class Serving:
    """A server in a thread that is told to stop as by a signal."""

    def __init__(self, run_folder, worker, patience):
        settings = from_flat(ServeSettings, {"mixtures": [f"elrea={run_folder}"], "device": "cpu", "port": 0})
        catalogue, lifetime = Catalogue(settings), Lifetime()
        worker.put(catalogue.load_all).result()
        self.listener = listening(settings.address)
        self.uvicorn = Server(create_app(catalogue, worker, settings, lifetime), lifetime, patience)
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.listener],))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def stop(self):
        self.uvicorn.handle_exit(signal.SIGTERM, None)


def lines(response):
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_what_has_begun_ends_and_nothing_new_begins(run_folder):
    with Worker() as worker:
        serving, held = Serving(run_folder, worker, patience=60), threading.Event()
        with httpx2.stream("POST", serving.url + COMPLETIONS, json=STREAM) as response:
            worker.put(held.wait)
            serving.stop()
            with pytest.raises(httpx2.HTTPError):
                while httpx2.post(serving.url + COMPLETIONS, json=STREAM).status_code == 503:
                    pass
            held.set()
            found = lines(response)
        serving.thread.join()
    assert found[-1] == "[DONE]" and json.loads(found[-2])["choices"][0]["finish_reason"]


def test_without_patience_what_has_begun_is_cut_off(run_folder):
    with Worker() as worker:
        serving, held = Serving(run_folder, worker, patience=0), threading.Event()
        with httpx2.stream("POST", serving.url + COMPLETIONS, json=STREAM) as response:
            worker.put(held.wait)
            serving.stop()
            with pytest.raises(httpx2.RemoteProtocolError):
                lines(response)
        serving.thread.join()
        held.set()


class Clients(AskingAgain):
    """Four clients that ask whatever happens, and note what they got."""

    def __init__(self, url):
        super().__init__(url, 4)
        self.seen = []

    def ask(self, client):
        try:
            with client.stream("POST", COMPLETIONS, json=STREAM) as response:
                self.seen.append(self._got(response))
        except httpx2.HTTPError:  # nobody has answered
            time.sleep(0.2)

    def _got(self, response):
        try:
            return "whole" if response.status_code == 200 and lines(response)[-1] == "[DONE]" else response.status_code
        except httpx2.HTTPError as error:
            return error

    def wait(self, answers):
        wanted = len(self.seen) + answers
        while len(self.seen) < wanted:
            time.sleep(0.01)


@contextlib.contextmanager
def booted(run_folder, port):
    command = [sys.executable, "-m", "coterie", "serve", f"elrea={run_folder}", "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in iter(process.stderr.readline, ""):
            if line.startswith("{") and json.loads(line)["event"] == "ready":
                break
        reading = threading.Thread(target=process.stderr.read)
        reading.start()
        yield process
        reading.join()


@pytest.mark.slow
def test_a_server_that_is_restarted_under_load_breaks_no_answer(run_folder):
    """SIGTERM, exit code 0, and again on the same port; clients see whole answers, 503, or no connection."""
    port = unused_port()
    with Clients(f"http://127.0.0.1:{port}") as clients:
        for _ in range(2):
            with booted(run_folder, port) as process:
                clients.wait(8)
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=60) == 0
    assert set(clients.seen) <= {"whole", 503} and clients.seen.count("whole") >= 12
