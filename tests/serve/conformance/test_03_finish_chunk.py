"""A2 line 3: the chunk that ends an answer is one of its own, with an empty delta.

BerriAI/litellm#2692, vllm-project/vllm#35705, and what llama.cpp asserts; vLLM's own test_chat.py says the opposite.
"""

from served import chat_stream


def test_the_last_chunk_has_no_content_and_no_other_chunk_has_a_reason(client):
    frames = chat_stream(client, temperature=0)
    assert frames[-1]["choices"][0]["delta"] == {} and frames[-1]["choices"][0]["finish_reason"] == "length"
    assert all(frame["choices"][0]["delta"]["content"] for frame in frames[1:-1])
