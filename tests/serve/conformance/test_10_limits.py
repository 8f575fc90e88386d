"""A2 line 10: the newer name of the limit wins, null means until the context is full, and no limit is cut silently.

abetlen/llama-cpp-python#1907, ik_llama.cpp#2321, modular/modular#6673, xorbitsai/inference#1061.
"""

import pytest

from served import chat, chat_body

LONG = "add " * 112


def counted(answer):
    return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]


@pytest.fixture
def endless(mixture):
    return {"logit_bias": {str(mixture.tokenizer.eos_token_id): -100}}


def test_max_completion_tokens_wins(client, endless):
    assert counted(chat(client, max_tokens=3, max_completion_tokens=5, **endless)) == (5, "length")
    assert counted(chat(client, max_tokens=None, max_completion_tokens=5, **endless)) == (5, "length")


@pytest.mark.parametrize("given", [{}, {"max_tokens": None}, {"max_tokens": 10**9}])
def test_a_chat_without_a_limit_ends_where_the_context_does_and_says_so(client, mixture, endless, given):
    body = chat_body(messages=[{"role": "user", "content": LONG}], **endless)
    del body["max_tokens"]
    answer = client.post("/v1/chat/completions", json=body | given).json()
    room = mixture.backbone.context + 1 - answer["usage"]["prompt_tokens"]
    assert counted(answer) == (room, "length") and room < 40


def test_a_completion_has_16_tokens_unless_it_is_told_otherwise(client, mixture, endless):
    body = {"model": "elrea", "prompt": "add", **endless}
    assert counted(client.post("/v1/completions", json=body).json()) == (16, "length")
    full = client.post("/v1/completions", json={**body, "prompt": LONG, "max_tokens": None}).json()
    assert counted(full) == (mixture.backbone.context + 1 - full["usage"]["prompt_tokens"], "length")


def test_a_prompt_that_is_longer_than_the_context_is_refused_whole(client):
    body = chat_body(messages=[{"role": "user", "content": "add " * 200}])
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "512" in answer.json()["error"]["message"]
