"""A2 line 14: the bytes of a token are its true ones, of half a character too; together they are the content.

ollama/ollama#13497 told [239, 191, 189] for them; standardcompletions/rfcs#2.
"""

from served import chat


def test_bytes_of_half_characters_are_their_own(client, mixture):
    ids = mixture.tokenizer("é")["input_ids"]
    for token, byte in zip(ids, (0xC3, 0xA9), strict=True):
        choice = chat(client, logit_bias={str(token): 100}, max_tokens=3, logprobs=True)["choices"][0]
        own = [entry["bytes"] for entry in choice["logprobs"]["content"]]
        assert own == [[byte]] * 3
        assert bytes([byte] * 3).decode(errors="replace") == choice["message"]["content"]


def test_tokens_together_are_the_content(client, mixture):
    bias = {str(mixture.tokenizer(letter)["input_ids"][0]): 100 for letter in "ab c"}
    choice = chat(client, logit_bias=bias, max_tokens=20, logprobs=True)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in entries)
