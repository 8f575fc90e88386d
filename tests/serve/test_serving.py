"""The server: what it answers is what the mixture answers in Python."""

import pytest

from conftest import QUESTION, chat, chat_stream, frames_of
from coterie.mixture import Mixture


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 7}])
def test_a_chat_is_answered_as_python_answers_it_streamed_and_whole(client, mixture: Mixture, options):
    wanted = mixture.generate(QUESTION, max_new_tokens=12, **options)[0]
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
