"""How long answers may be where nobody says: what their task needs."""

import pytest
import torch

from coterie.data.examples import load_examples
from coterie.grading import lengths
from coterie.grading.lengths import answer_tokens, lengths_in_words, longest_answer, with_length
from coterie.methods.symbolic.answer import RecruitingPlan, synthesis_ask
from coterie.routers.base import Routing
from coterie.settings.groups import SamplingSettings
from helpers import same_answers, table

OPTIONS = "Which one barks?\n(A) a dog\n(B) a cat"
REASONED = "The train leaves at noon and the trip takes two hours, so it cannot be there before two o'clock: no."


@pytest.mark.parametrize(
    ("row", "tokens"),
    table(
        ("a number", {"prompt": "1 + 1?", "response": "2", "answer": "2"}, 256),
        ("an option", {"prompt": OPTIONS, "response": "A", "answer": "A"}, 256),
        ("an option by its own text", {"prompt": OPTIONS, "response": "a dog", "answer": "a dog"}, 256),
        ("a short text", {"prompt": "Capital of France?", "response": "Paris", "answer": "Paris"}, 64),
        ("short texts", {"prompt": "Who?", "response": "Anna", "answers": ["Anna", "A."]}, 64),
        ("no answer to be found", {"prompt": "Who?", "answers": []}, 64),
        ("a short text after reasoning", {"prompt": "In time?", "response": REASONED, "answer": "no"}, 256),
        ("a program", {"prompt": "Write f.", "response": "def f(): ...", "tests": {"test_list": ["assert f()"]}}, 1024),
        ("tests in place of an answer", {"prompt": "Write f.", "response": "x", "answer": "assert f() == 1"}, 256),
        ("free text", {"prompt": "Tell a story.", "response": "Once."}, 256),
        ("a question alone", {"prompt": "1 + 1?"}, 256),
    ),
)
def test_an_answer_may_be_as_long_as_its_task_needs(row, tokens):
    (example,) = load_examples([row], need_response=False)
    assert answer_tokens(example) == tokens


def test_a_length_that_is_asked_for_wins():
    program, question = load_examples(
        [{"prompt": "Write f.", "tests": {"test_list": ["assert f()"]}}, {"prompt": "1 + 1?"}], need_response=False
    )
    asked = SamplingSettings(max_new_tokens=3, seed=4)
    assert longest_answer(asked, program) == longest_answer(asked, question) == 3
    assert with_length(asked, program) == asked
    assert with_length(SamplingSettings(seed=4), program) == SamplingSettings(max_new_tokens=1024, seed=4)


def test_prompts_that_are_answered_together_have_lengths_of_their_own(mixture, monkeypatch):
    monkeypatch.setattr(lengths, "SHORT_TOKENS", 2)
    monkeypatch.setattr(lengths, "ANSWER_TOKENS", 5)
    rows = [{"prompt": "add 3 4", "answer": "7"}, {"prompt": "SPELL ABCD NOW", "answer": "word"}, {"prompt": "add 1 2"}]
    examples = load_examples(rows, need_response=False)
    together = mixture.generate(examples, batch_size=3)
    alone = [mixture.generate(row, max_new_tokens=most)[0] for row, most in zip(examples, (5, 2, 5), strict=True)]
    same_answers(together, alone)
    assert [one.finish_reason for one in together] == ["length"] * 3  # so that each is as long as it may be
    assert [len(list(mixture.stream(row))) for row in examples] == [5, 2, 5]


def test_recruited_experts_are_asked_for_answers_of_the_tasks_length():
    number, program = load_examples(
        [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "Write f.", "tests": {"test_list": ["assert f()"]}}],
        need_response=False,
    )
    routing = Routing(("a",), torch.tensor([[2.0], [1.0]]))
    plan = RecruitingPlan(routing, torch.ones(2, 1), ["majority"] * 2, SamplingSettings(seed=3))
    asked = [[(own.sampling.max_new_tokens, own.sampling.seed) for own in plan.asks(n, number)] for n in (0, 1)]
    assert asked == [[(256, 3), (256, 4)], [(256, 3)]]
    assert synthesis_ask("a", program, ["x"], SamplingSettings()).sampling.max_new_tokens == 1024
    assert plan.asks(1, program)[0].sampling.max_new_tokens == 1024


def test_records_tell_how_long_answers_could_be():
    rows = load_examples(
        [{"prompt": f"{n} + 1?"} for n in range(3)] + [{"prompt": "Who?", "answer": "Anna"}], need_response=False
    )
    assert lengths_in_words(SamplingSettings(max_new_tokens=7), rows) == 7
    assert lengths_in_words(SamplingSettings(), rows[:3]) == "256, as the task wants"
    assert lengths_in_words(SamplingSettings(), rows) == "64 (1 of 4 rows), 256 (3 of 4 rows), as their tasks want"
