"""A2 line 8: a character whose bytes come in several tokens is told when it is whole, streamed and not.

ggml-org/llama.cpp#4446, mudler/LocalAI#677, mlx-vlm#1076 (decoding all and slicing is not enough).
"""

import pytest

from served import chat, chat_stream


@pytest.mark.parametrize("sign", ["é", "한", "🙂"])
def test_characters_of_several_tokens_come_whole(client, mixture, sign):
    ids = mixture.tokenizer(sign)["input_ids"]
    assert len(ids) == len(sign.encode())
    asked = {"logit_bias": {str(token): 100 for token in ids}, "max_tokens": 40, "temperature": 2.0, "n": 8}
    for seed in range(20):  # until the bytes happen to come in their order
        contents = []
        for whole in chat(client, **asked, seed=seed, logprobs=True)["choices"]:
            raw = bytes(byte for entry in whole["logprobs"]["content"] for byte in entry["bytes"])
            contents.append(whole["message"]["content"])
            assert contents[-1] == raw.decode(errors="replace")
        if any(sign in content for content in contents):
            break
    assert any(sign in content for content in contents)
    streamed = [""] * len(contents)
    for frame in chat_stream(client, **asked, seed=seed):
        for choice in frame["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == contents


def test_what_is_unfinished_at_the_end_is_flushed(client, mixture):
    first = mixture.tokenizer("é")["input_ids"][0]
    asked = {"logit_bias": {str(first): 100}, "max_tokens": 1}
    assert chat(client, **asked)["choices"][0]["message"]["content"] == "\ufffd"
    deltas = [frame["choices"][0]["delta"] for frame in chat_stream(client, **asked)]
    assert [delta.get("content") for delta in deltas] == ["", "\ufffd", None]
