"""Answers in company are those alone up to rounding; bit for bit with one place and no shared prompts."""

from concurrent.futures import ThreadPoolExecutor

import httpx2

from served import chat, started


def test_one_place_and_no_shared_prompts_give_every_bit_of_an_answer_again(run_folder):
    """vllm#5898, Thinking Machines: the size of a batch changes the order of sums, and thereby the last bits."""
    with started(f"elrea={run_folder}", places=1, prefix_memory=0.0) as server:

        def ask(number: int) -> list[dict]:
            with httpx2.Client(base_url=server.url, timeout=60) as client:
                return chat(client, messages=[{"role": "user", "content": f"add {number}"}], seed=1, logprobs=True)[
                    "choices"
                ]

        alone = [ask(number) for number in range(6)]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, range(6))) == alone
