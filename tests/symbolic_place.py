"""Three endpoints, each good at one thing, and what is asked of them: a pool that tests profile, fit and evaluate."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from stub_server import Got, Sent, Stub, completion

SUBJECTS = ("algebra", "history")
EXPERTS = {"maths": "mathematician", "past": "historian", "judge": "wise"}
KNOWS = {"mathematician": "algebra", "historian": "history", "wise": "neither"}
WRONG = {"mathematician": "1", "historian": "2", "wise": "3"}


def question(subject: str, number: int) -> str:
    return f"A question of {subject} with the number {number}?"


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {
            "id": f"q{number}",
            "category": SUBJECTS[number % 2],
            "instruction": question(SUBJECTS[number % 2], number),
            "response": f"The answer is {100 + number}.",
            "answer": str(100 + number),
        }
        for number in range(first, first + count)
    ]


def right_answer(text: str) -> str:
    return str(100 + int(re.search(r"the number (\d+)", text)[1]))


def respond(got: Got) -> Sent:
    """Three models: one knows algebra, one history, one only how to make one answer of several."""
    text, model = got.question, got.body["model"]
    if "Keywords:" in text:
        asked = re.findall(r"Question: .*of (\w+)", text)[-1]
        return completion(f"Keywords: {asked}, sample {got.body['seed']}")
    if "Several experts" in text:
        return completion(
            "<think>hm, 7</think>The answer is " + (right_answer(text) if model == "wise" else "13") + "."
        )
    number = right_answer(text) if f"of {KNOWS[model]}" in text else WRONG[model]
    return completion(f"<think>The answer is 5.</think> The answer is {number}.")


@dataclass
class Place:
    """A pool of three endpoints, and a folder for what is made of it."""

    stub: Stub
    folder: Path

    @property
    def pool(self) -> Path:
        return self.folder / "pool"

    def asked(self) -> Counter:
        return Counter(got.body["model"] for got in self.stub.requests)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
