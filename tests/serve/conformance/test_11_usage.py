"""A2 line 11: usage is exact, and tokens of a prompt that are still known from before count as the others do.

ml-explore/mlx-lm#342 counted only those that were read anew; vLLM's tests read `cached_tokens`.
"""

from coterie.combiners.texts import SAMPLES
from served import chat, chat_stream


def test_tokens_that_are_known_count_too_and_are_told(client, mixture):
    messages = [{"role": "user", "content": "spell this word twice " * 6}]
    first, again = (chat(client, messages=messages)["usage"] for _ in range(2))
    assert first["prompt_tokens"] == again["prompt_tokens"] == len(mixture.tokens(messages)[0].ids)
    assert first["prompt_tokens_details"]["cached_tokens"] == 0 < again["prompt_tokens_details"]["cached_tokens"]
    assert again["total_tokens"] == again["prompt_tokens"] + again["completion_tokens"]


def test_the_token_that_ends_an_answer_counts(client, mixture):
    ends = {"logit_bias": {str(mixture.tokenizer.eos_token_id): 100}}
    assert chat(client, **ends)["usage"]["completion_tokens"] == 1


def test_a_stream_counts_as_the_whole_does(client):
    whole = chat(client, temperature=0)["usage"]["completion_tokens"]
    assert (
        chat_stream(client, temperature=0, stream_options={"include_usage": True})[-1]["usage"]["completion_tokens"]
        == whole
    )


def test_answers_that_lose_a_vote_were_written_too(client, mixture):
    ends = mixture.backbone.stop_ids | mixture.prompts.end_ids
    asked = {"model": "elrea:self-consistency", "max_tokens": 4, "logit_bias": {str(token): -100 for token in ends}}
    usage = chat(client, **asked)["usage"]
    assert (
        usage["completion_tokens"] == 4 * SAMPLES and usage["prompt_tokens"] == chat(client)["usage"]["prompt_tokens"]
    )
    assert chat_stream(client, **asked, stream_options={"include_usage": True})[-1]["usage"]["completion_tokens"] == 20
