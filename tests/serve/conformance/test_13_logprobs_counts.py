"""A2 line 13: exactly as many alternatives as were asked for, none where 0 were, and null, not {}, where none were.

ml-explore/mlx-lm#342 ({} crashes LiteLLM); the floor of -9999.0 is vLLM's.
"""

import math

import pytest

from served import chat, chat_body, chat_stream


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_a_chat_shows_so_many_alternatives(client, count):
    for entry in chat(client, logprobs=True, top_logprobs=count)["choices"][0]["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == count


def test_without_being_asked_there_are_none(client):
    assert chat(client)["choices"][0]["logprobs"] is None
    assert all(frame["choices"][0]["logprobs"] is None for frame in chat_stream(client))


@pytest.mark.parametrize("given", [{"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}])
@pytest.mark.parametrize("stream", [True, False])
def test_too_many_or_without_logprobs_are_refused(client, given, stream):
    answer = client.post("/v1/chat/completions", json=chat_body(**given, stream=stream))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "top_logprobs"


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_completion_has_one_entry_a_token_with_its_alternatives_and_itself(client, count):
    body = {"model": "elrea", "prompt": "add", "max_tokens": 4, "logprobs": count}
    logs = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    for name, own, top in zip(logs["tokens"], logs["token_logprobs"], logs["top_logprobs"], strict=True):
        assert top[name] == own and len(top) in (max(1, count), count + 1)


def test_a_number_that_json_cannot_write_has_a_floor(client, mixture):
    entry = chat(client, temperature=0, logprobs=True, top_logprobs=20)["choices"][0]["logprobs"]["content"][0]
    assert all(-9999.0 <= one["logprob"] <= 0 and math.isfinite(one["logprob"]) for one in entry["top_logprobs"])
