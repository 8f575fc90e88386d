"""A2 line 4: a chunk without choices comes only where usage was asked for, once, behind the finish chunk.

Clients index `choices[0]` (foundry-local#905, langchain-gradient#27, shell_gpt#457); vLLM test_chat.py.
"""

import pytest

from served import chat, chat_body, chat_stream


def test_without_being_asked_every_chunk_has_a_choice_and_none_has_usage(client):
    assert all(len(frame["choices"]) == 1 and "usage" not in frame for frame in chat_stream(client))


def test_usage_is_the_last_chunk_and_the_only_one(client):
    whole = chat(client, temperature=0)["usage"]
    frames = chat_stream(client, temperature=0, stream_options={"include_usage": True})
    assert frames[-1]["choices"] == [] and frames[-2]["choices"][0]["finish_reason"]
    assert frames[-1]["usage"] | {"prompt_tokens_details": None} == whole | {"prompt_tokens_details": None}
    assert all(frame["usage"] is None for frame in frames[:-1])


def test_usage_of_every_chunk_grows_to_that_of_the_whole(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        frame["usage"]["completion_tokens"] for frame in chat_stream(client, temperature=0, stream_options=options)
    ]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 8


@pytest.mark.parametrize("given", [{}, {"stream": False}])
def test_options_of_a_stream_without_a_stream_are_refused(client, given):
    answer = client.post("/v1/chat/completions", json=chat_body(stream_options={"include_usage": True}, **given))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "stream_options"
