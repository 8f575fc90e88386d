"""A2 line 1: every choice has a finish reason, null until its end: `stop` at the end of a turn, `length` at the limit.

vllm-project/vllm#19650, ollama/ollama#4357, vllm-mlx#628 (only `length` was ever told), ik_llama.cpp#2321.
"""

import pytest

from served import chat, chat_stream, frames_of


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_chat_ends_for_its_reason_and_says_so_once(client, mixture, reason):
    ends = {"logit_bias": {str(mixture.tokenizer.eos_token_id): 100 if reason == "stop" else -100}}
    assert chat(client, **ends)["choices"][0]["finish_reason"] == reason
    reasons = [frame["choices"][0]["finish_reason"] for frame in chat_stream(client, **ends)]
    assert reasons == [None] * (len(reasons) - 1) + [reason]


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_text_ends_for_its_reason_and_says_so_once(client, mixture, reason):
    ends = {"logit_bias": {str(mixture.tokenizer.eos_token_id): 100 if reason == "stop" else -100}}
    body = {"model": "elrea", "prompt": "add", "max_tokens": 4, **ends}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["finish_reason"] == reason
    frames = frames_of(client.post("/v1/completions", json={**body, "stream": True}))
    reasons = [frame["choices"][0]["finish_reason"] for frame in frames]
    assert reasons == [None] * (len(reasons) - 1) + [reason]
