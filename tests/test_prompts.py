"""Wherever several prompts, names or folders are taken, one alone is taken for one, not for its letters."""

import pytest

import coterie
from coterie import methods
from coterie.data.examples import Message, from_prompt
from coterie.errors import CoterieError
from coterie.mixture import as_examples

CONVERSATION = [
    {"role": "user", "content": "add 3 4"},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "and 2 more"},
]
ONE = ["Hello", from_prompt("Hello"), CONVERSATION, {"instruction": "Hello", "response": "no matter"}]


@pytest.mark.parametrize("prompt", ONE, ids=["text", "example", "conversation", "row"])
def test_one_prompt_alone_is_one_prompt(mixture, prompt):
    (answer,) = mixture.generate(prompt, max_new_tokens=4)
    assert answer == mixture.generate([prompt], max_new_tokens=4)[0]
    assert mixture.route(prompt).weights.equal(mixture.route([prompt]).weights)
    assert [row.ids for row in mixture.tokens(prompt)] == [row.ids for row in mixture.tokens([prompt])]
    assert "".join(token.text for token in mixture.stream(prompt, max_new_tokens=4)) == answer.text


def test_prompts_keep_their_places_and_conversations_their_turns():
    examples = as_examples(["Hello", CONVERSATION, tuple(CONVERSATION[:1])])
    assert [example.id for example in examples] == ["0", "1", "2"]
    assert examples[1].messages[1] == Message("assistant", "7") and examples[2].instruction == "add 3 4"
    assert as_examples([]) == []
    rows = as_examples([{"question": "Hello", "id": "own"}, {"messages": CONVERSATION}])
    assert [row.messages for row in rows] == [as_examples(one)[0].messages for one in ("Hello", CONVERSATION)]


def test_a_stream_refuses_several_prompts(mixture):
    with pytest.raises(CoterieError, match="one prompt, but 2 are given; use generate"):
        list(mixture.stream(["Hello", "there"]))


def test_one_adapter_alone_is_one_adapter(run_folder, model_folder, tmp_path):
    (added,) = methods.bank_add(tmp_path / "bank", str(run_folder / "experts" / "base"), model=str(model_folder))
    assert added.name == "base" and added.refusal is None


def test_one_method_and_one_evaluation_alone_are_one(mixture, run_folder, train_file, tmp_path, run):
    rows = coterie.load_examples(train_file, limit=2)
    found = coterie.evaluate(mixture, rows, methods="base,elrea", generate=False, resamples=100)
    assert {row["method"] for row in found.summary["table"]} == {"base", "elrea"}
    with pytest.raises(CoterieError, match=f"{tmp_path}"):
        coterie.read_spread(str(tmp_path))
