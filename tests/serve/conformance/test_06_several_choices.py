"""A2 line 6: of several answers each chunk is of one, each ends once, and under one seed they differ from each other.

vLLM test_completion.py, SGLang test_openai_server.py.
"""

from served import chat, chat_stream


def test_streamed_answers_are_told_apart_by_index_and_are_those_of_the_whole(client):
    asked = {"n": 3, "seed": 7, "temperature": 1.0}
    whole = [choice["message"]["content"] for choice in chat(client, **asked)["choices"]]
    texts, ends = {0: "", 1: "", 2: ""}, []
    for frame in chat_stream(client, **asked):
        (choice,) = frame["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(ends) == [0, 1, 2] and list(texts.values()) == whole and len(set(whole)) == 3


def test_usage_counts_the_tokens_of_all_answers_and_the_prompt_once(client, mixture):
    endless = {"logit_bias": {str(mixture.tokenizer.eos_token_id): -100}, "temperature": 1.0}
    one, three = (chat(client, n=n, **endless)["usage"] for n in (1, 3))
    assert three["prompt_tokens"] == one["prompt_tokens"] and three["completion_tokens"] == 24
