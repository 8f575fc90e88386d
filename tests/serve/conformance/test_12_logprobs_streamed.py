"""A2 line 12: a stream tells the log-probabilities that the whole answer does, each token with its own alternatives.

ml-explore/mlx-lm#1630, modular#5085 (null in streams), sgl-project/sglang#30188, tabbyAPI#141.
"""

from typing import Any

import pytest

from served import chat, chat_stream, frames_of

ASKED: dict[str, Any] = {"logprobs": True, "top_logprobs": 4, "temperature": 0, "max_tokens": 12}


def test_a_chat_streams_the_logs_of_the_whole(client):
    whole = chat(client, **ASKED)["choices"][0]["logprobs"]["content"]
    parts = [frame["choices"][0]["logprobs"] for frame in chat_stream(client, **ASKED)]
    streamed = [entry for part in parts if part for entry in part["content"]]
    for there, here in zip(streamed, whole, strict=True):
        assert (there["token"], there["bytes"]) == (here["token"], here["bytes"])
        for own, other in zip([there, *there["top_logprobs"]], [here, *here["top_logprobs"]], strict=True):
            assert own["token"] == other["token"] and own["logprob"] == pytest.approx(other["logprob"], abs=1e-5)
    assert len({str(entry["top_logprobs"]) for entry in whole}) == len(whole)
    for entry in whole:  # greedy: each token leads its own alternatives
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]


def test_a_completion_streams_the_logs_of_the_whole(client):
    body = {"model": "elrea", "prompt": "add", "logprobs": 2, "temperature": 0}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    frames = frames_of(client.post("/v1/completions", json={**body, "stream": True}))
    parts = [part for frame in frames if (part := frame["choices"][0]["logprobs"])]
    joined = {field: [one for part in parts for one in part[field]] for field in whole}
    assert joined["tokens"] == whole["tokens"] and joined["text_offset"] == whole["text_offset"]
    assert joined["token_logprobs"] == pytest.approx(whole["token_logprobs"], abs=1e-5)
    for there, here in zip(joined["top_logprobs"], whole["top_logprobs"], strict=True):
        assert there == pytest.approx(here, abs=1e-5)
