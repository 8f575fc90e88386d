"""What a request gets does not hang on who asks beside it, or has asked before."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from served import chat

CLIENTS = 16
KINDS: list[dict[str, Any]] = [
    {},
    {"model": "base"},
    {"model": "elrea:moe-merging"},
    {"coterie": {"weights": {"cluster-0": 0.7, "base": 0.3}, "combiner": "layers"}},
    {"coterie": {"router": "arrow"}},
    {"coterie": {"every": 2, "combiner": "layers"}},
    {"model": "tiny", "temperature": 0},
    {"n": 2},
]


def ask(client: httpx2.Client, number: int) -> list[tuple[str, list[float]]]:
    """Each client has a question, a kind of request and a seed of its own."""
    messages = [{"role": "user", "content": f"add {number} " + "and more " * (number % 5)}]
    asked = {"messages": messages, "max_tokens": 6 + number % 7, "seed": number, "logprobs": True}
    answer = chat(client, **asked, **KINDS[number % len(KINDS)])
    return [
        (choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]])
        for choice in answer["choices"]
    ]


def test_sixteen_clients_at_once_get_what_each_gets_alone(client):
    """mlx-lm#965: answers of other prompts with 16 clients at once."""
    alone = [ask(client, number) for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(lambda number: ask(client, number), range(CLIENTS)))
    for own, shared in zip(alone, together, strict=True):
        assert [text for text, _ in shared] == [text for text, _ in own]
        for (_, one), (_, other) in zip(own, shared, strict=True):
            assert other == pytest.approx(one, abs=1e-4)
    assert len({str(own) for own in alone}) == CLIENTS


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_same_prompt_twice_in_a_row_gets_the_same_answer(client, kind):
    """mlx-lm#1215: status 200 with an empty body, and a dead worker."""
    found = [chat(client, seed=3, **kind)["choices"] for _ in range(3)]
    assert found[0] == found[1] == found[2] and found[0][0]["message"]["content"]
