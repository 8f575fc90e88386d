"""The server: what it answers is what the mixture answers in Python."""

import itertools
import json
import time
from types import SimpleNamespace

import httpx2
import pytest

from coterie.mixture import Mixture
from served import QUESTION, chat, chat_body, chat_stream, frames_of, started


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 7}])
def test_a_chat_is_answered_as_python_and_the_command_line_answer_it(client, mixture: Mixture, run, options):
    wanted = mixture.generate(QUESTION, max_new_tokens=12, **options)[0]
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    words = ["generate", mixture.folder, QUESTION, "--json", "--max-new-tokens", 12, "--device", "cpu", *flags]
    assert json.loads(run(*words)[1])["text"] == wanted.text
    whole = chat(client, max_tokens=12, **options)
    choice = whole["choices"][0]
    assert choice["message"]["content"] == wanted.text and choice["finish_reason"] == wanted.finish_reason
    assert whole["usage"]["completion_tokens"] == len(wanted.token_ids)
    frames = chat_stream(client, max_tokens=12, **options)
    assert "".join(frame["choices"][0]["delta"].get("content", "") for frame in frames) == wanted.text
    assert frames[-1]["choices"][0]["finish_reason"] == wanted.finish_reason


def test_a_text_is_gone_on_with_as_it_stands(client, mixture: Mixture):
    body = {"model": "elrea", "prompt": "add 3", "max_tokens": 5, "temperature": 0}
    answer = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    ids = mixture.tokenizer("add 3")["input_ids"]
    assert answer == client.post("/v1/completions", json={**body, "prompt": ids}).json()["choices"][0]["text"]
    assert (
        answer
        and "".join(
            frame["choices"][0]["text"]
            for frame in frames_of(client.post("/v1/completions", json={**body, "stream": True}))
        )
        == answer
    )


def test_a_request_that_takes_too_long_is_told_so_and_leaves_nothing_behind(run_folder):
    with started(f"elrea={run_folder}", timeout=1e-6) as server, httpx2.Client(base_url=server.url) as client:
        for stream in (False, True):
            answer = client.post("/v1/chat/completions", json=chat_body(stream=stream))
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert server.catalogue.desks[0].engine.load[:3] == (0, 0, 0.0)


def test_a_deadline_that_passes_in_the_middle_of_a_stream_ends_it_with_an_error(server, client, monkeypatch):
    engine = server.catalogue.desks[0].engine
    step, taken = engine.step, itertools.count()

    def late():
        if next(taken) == 3:
            clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 1e6, perf_counter=time.perf_counter)
            monkeypatch.setattr("coterie.engine.engine.time", clock)
        return step()

    monkeypatch.setattr(engine, "step", late)
    frames = chat_stream(client, temperature=0)
    assert len(frames) < 8 and frames[-1]["error"]["code"] == "timeout"
    assert engine.load[:3] == (0, 0, 0.0)
