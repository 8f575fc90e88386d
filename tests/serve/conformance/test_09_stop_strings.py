"""A2 line 9: stop strings end an answer wherever tokens and chunks part them; their text and what follows are not told.

mlxcel#1466 (ignored), lightseek smg#1524 (single tokens only), mlx-vlm#1069.
"""

import pytest

from served import chat, chat_stream


@pytest.fixture(scope="module")
def letters(mixture):
    """Options under which answers are of the letters a to d."""
    bias = {str(mixture.tokenizer(letter)["input_ids"][0]): 100 for letter in "abcd"}
    return {"logit_bias": bias, "seed": 5, "temperature": 1.0, "max_tokens": 14}


@pytest.mark.parametrize("length", [1, 2, 5])
def test_an_answer_ends_before_the_stop_string_in_every_form(client, server, letters, length):
    text = chat(client, **letters)["choices"][0]["message"]["content"]
    assert set(text) <= set("abcd") and len(text) == 14
    stop = text[7 : 7 + length]
    wanted = text[: text.index(stop)]
    for given in (stop, [stop], ["zz", "yy", stop, "xx"]):
        choice = chat(client, **letters, stop=given)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (wanted, "stop")
        frames = [frame["choices"][0] for frame in chat_stream(client, **letters, stop=given)]
        assert "".join(frame["delta"].get("content", "") for frame in frames) == wanted
        assert frames[-1]["finish_reason"] == "stop"
    assert server.catalogue.desks[0].engine.is_idle


def test_what_was_held_back_for_a_stop_string_that_never_came_is_flushed(client, letters):
    text = chat(client, **letters)["choices"][0]["message"]["content"]
    asked = {**letters, "stop": text[-2:] + "z"}
    frames = [frame["choices"][0] for frame in chat_stream(client, **asked)]
    assert "".join(frame["delta"].get("content", "") for frame in frames) == text
    assert frames[-1]["finish_reason"] == "length"


def test_logs_are_told_of_the_tokens_that_are_seen(client, letters):
    text = chat(client, **letters)["choices"][0]["message"]["content"]
    choice = chat(client, **letters, stop=text[6:9], logprobs=True)["choices"][0]
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["message"]["content"]
