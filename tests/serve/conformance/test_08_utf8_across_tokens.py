"""A2 line 8: a character whose bytes come in several tokens is told when it is whole, streamed and not.

ggml-org/llama.cpp#4446, mudler/LocalAI#677, mlx-vlm#1076 (decoding all and slicing is not enough).
"""

import pytest

from served import chat, chat_stream


@pytest.mark.parametrize("sign", ["é", "한", "🙂"])
def test_characters_of_several_tokens_come_whole(client, mixture, sign):
    ids = mixture.tokenizer(sign)["input_ids"]
    assert len(ids) == len(sign.encode())
    for seed in range(40):  # until the bytes happen to come in their order
        asked = {"logit_bias": {str(token): 100 for token in ids}, "seed": seed, "max_tokens": 40, "temperature": 2.0}
        whole = chat(client, **asked, logprobs=True)["choices"][0]
        content = whole["message"]["content"]
        raw = bytes(byte for entry in whole["logprobs"]["content"] for byte in entry["bytes"])
        assert content == raw.decode(errors="replace")
        if sign in content:
            break
    assert sign in content
    pieces = [frame["choices"][0]["delta"].get("content", "") for frame in chat_stream(client, **asked)]
    assert "".join(pieces) == content


def test_what_is_unfinished_at_the_end_is_flushed(client, mixture):
    first = mixture.tokenizer("é")["input_ids"][0]
    asked = {"logit_bias": {str(first): 100}, "max_tokens": 1}
    assert chat(client, **asked)["choices"][0]["message"]["content"] == "\ufffd"
    deltas = [frame["choices"][0]["delta"] for frame in chat_stream(client, **asked)]
    assert [delta.get("content") for delta in deltas] == ["", "\ufffd", None]
