"""Shots come from the same task, never from the row itself, and as many are shown as fit."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from coterie.data.batching import PromptFormat
from coterie.data.examples import Example, Message
from coterie.errors import CoterieError
from coterie.evaluation.few_shot import FewShot, with_shots
from coterie.grading.answers import grade

ENDLESS = 10**9
ANIMALS = "Which one?\nOptions:\n(A) a dog\n(B) a cat"


def solved(name: str, question: str, answer: str = "yes", *, source: str | None = "s", category: str | None = "c"):
    return Example(name, (Message("user", question), Message("assistant", answer)), source, category)


def characters(example: Example) -> int:
    return sum(len(message.content) for message in example.prompt)


def kept(rows: list[FewShot]) -> list[int]:
    return [row.kept for row in rows]


SHOTS = [solved(f"shot-{number}", f"Q{number}?", f"A{number}.") for number in range(4)]
ROW = solved("row", "Q?", "A.")


# ---------------------------------------------------------------------------------------------------------- prompt


def test_the_shots_and_the_question_are_one_user_turn_separated_by_blank_lines():
    [row] = with_shots([ROW], SHOTS, count=2, length=characters, longest=ENDLESS)
    assert row.example.messages == (
        Message("user", "Q0?\n\nA0.\n\nQ1?\n\nA1.\n\nQ?"),
        Message("assistant", "A."),
    )
    assert (row.kept, row.fits) == (2, True)


def test_only_the_last_question_of_a_conversation_gets_shots_and_all_else_stays():
    turns = (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Q?"),
    )
    chat = Example("row", turns, "s", "c", "yes", ("yes", "Yes"), {"n": 1})
    [row] = with_shots([chat], SHOTS[:1], count=1, length=characters, longest=ENDLESS)
    assert row.example == Example(
        "row", (*turns[:3], Message("user", "Q0?\n\nA0.\n\nQ?")), "s", "c", "yes", ("yes", "Yes"), {"n": 1}
    )


def test_of_a_conversation_as_a_shot_only_the_last_question_and_answer_are_shown():
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Q0?"), Message("assistant", "A0."))
    [row] = with_shots([ROW], [Example("shot", turns, "s", "c")], count=1, length=characters, longest=ENDLESS)
    assert row.example.instruction == "Q0?\n\nA0.\n\nQ?"


def test_no_shots_leave_the_example_as_it_is():
    for shots, count in ((SHOTS, 0), ([], 3)):
        [row] = with_shots([ROW], shots, count=count, length=characters, longest=ENDLESS)
        assert row == FewShot(ROW, 0, True)


def test_the_question_alone_tells_which_options_there_are():
    shot = solved("shot", "Which?\nOptions:\n(A) 1\n(B) 2\n(C) 3", "The answer is (C).")
    [row] = with_shots([solved("row", ANIMALS)], [shot], count=1, length=characters, longest=ENDLESS)
    text = "(B), as the third in line (C) said"
    assert grade(text, "(B)", prompt=ANIMALS).extracted == "B"
    assert grade(text, "(B)", prompt=row.example.instruction).extracted == "C"


# -------------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(("source", "category"), [("s", "other"), ("other", "c"), ("s", None), (None, "c")])
def test_shots_of_another_source_or_category_are_never_shown(source, category):
    other = solved("shot", "Q0?", source=source, category=category)
    assert kept(with_shots([ROW], [other], count=3, length=characters, longest=ENDLESS)) == [0]


def test_rows_without_a_category_take_shots_without_one():
    row, shot = (solved(name, name, category=None) for name in ("row", "shot"))
    assert kept(with_shots([row], [shot], count=3, length=characters, longest=ENDLESS)) == [1]


def test_a_row_is_no_shot_of_its_own_and_the_next_one_takes_its_place():
    rows = with_shots(SHOTS[:2], SHOTS, count=2, length=characters, longest=ENDLESS)
    assert [row.example.instruction for row in rows] == [
        "Q1?\n\nA1.\n\nQ2?\n\nA2.\n\nQ0?",
        "Q0?\n\nA0.\n\nQ2?\n\nA2.\n\nQ1?",
    ]


def test_another_wording_under_the_same_id_is_no_shot():
    [row] = with_shots([ROW], [solved("row", "Q, please?"), *SHOTS], count=1, length=characters, longest=ENDLESS)
    assert row.example.instruction == "Q0?\n\nA0.\n\nQ?"


def test_the_same_question_under_another_id_is_no_shot():
    twin = solved("twin", "Q?", "A.")
    [row] = with_shots([ROW], [twin, *SHOTS], count=1, length=characters, longest=ENDLESS)
    assert row.example.instruction == "Q0?\n\nA0.\n\nQ?"


def test_a_shot_without_a_response_and_a_negative_count_are_told():
    with pytest.raises(CoterieError, match="the shot bare has no response; give solved"):
        with_shots([ROW], [Example("bare", (Message("user", "Q?"),))], count=1, length=characters, longest=9)
    with pytest.raises(CoterieError, match="number of shots cannot be -1; give 0 or more"):
        with_shots([ROW], SHOTS, count=-1, length=characters, longest=9)


# --------------------------------------------------------------------------------------------------------- fitting


@pytest.mark.parametrize(
    ("longest", "shown", "fits"),
    # Q? has 2 characters, and every shot 3 + 2 + 3 + 2 more
    [
        (32, 3, True),
        (31, 2, True),
        (22, 2, True),
        (21, 1, True),
        (12, 1, True),
        (11, 0, True),
        (2, 0, True),
        (1, 0, False),
    ],
)
def test_the_last_shots_are_dropped_until_the_prompt_fits(longest, shown, fits):
    [row] = with_shots([ROW], SHOTS, count=3, length=characters, longest=longest)
    expected = "".join(f"Q{number}?\n\nA{number}.\n\n" for number in range(shown)) + "Q?"
    assert (row.example.instruction, row.kept, row.fits) == (expected, shown, fits)


def test_lengths_are_those_of_the_rendered_prompt():
    prompts = PromptFormat(tiny.make_tokenizer())

    def length(example: Example) -> int:
        return prompts.row(example).prompt_length

    [two] = with_shots([ROW], SHOTS, count=2, length=length, longest=ENDLESS)
    tokens = length(two.example)
    assert kept(with_shots([ROW], SHOTS, count=2, length=length, longest=tokens)) == [2]
    assert kept(with_shots([ROW], SHOTS, count=2, length=length, longest=tokens - 1)) == [1]


def test_the_number_of_rows_with_every_number_of_shots_is_logged(caplog):
    rows = [ROW, solved("long", "Q" * 12), solved("other", "Q", category="other"), solved("endless", "Q" * 40)]
    with caplog.at_level(logging.INFO, "coterie.evaluation.few_shot"):
        found = with_shots(rows, SHOTS, count=2, length=characters, longest=22)
    assert [(row.kept, row.fits) for row in found] == [(2, True), (1, True), (0, True), (0, False)]
    assert [record.getMessage() for record in caplog.records] == [
        "shots in a prompt: 2 in 1 rows, 1 in 1 rows, 0 in 2 rows",
        "1 of 4 prompts are longer than 22 tokens even without shots",
    ]


fields = st.tuples(
    st.sampled_from("abcdef"),
    st.text("xy", min_size=1, max_size=4),
    st.text("z", min_size=1, max_size=4),
    st.sampled_from("st"),
    st.sampled_from(["c", None]),
)


def made(drawn: list[tuple]) -> list[Example]:
    return [solved(*texts, source=source, category=category) for *texts, source, category in drawn]


@settings(deadline=None, max_examples=200)
@given(st.lists(fields, max_size=5), st.lists(fields, max_size=8), st.integers(0, 4), st.integers(0, 40))
def test_the_shots_are_the_first_that_may_be_shown_and_one_more_would_not_fit(row_fields, shot_fields, count, longest):
    rows, shots = made(row_fields), made(shot_fields)
    found = with_shots(rows, shots, count=count, length=characters, longest=longest)
    for row, result in zip(rows, found, strict=True):
        allowed = []
        for shot in shots:
            is_other = shot.id != row.id and shot.instruction != row.instruction
            if is_other and (shot.source, shot.category) == (row.source, row.category) and len(allowed) < count:
                allowed.append(shot)
        prompts = [row.instruction]
        for number in range(1, len(allowed) + 1):
            before = "".join(f"{shot.instruction}\n\n{shot.response}\n\n" for shot in allowed[:number])
            prompts.append(before + row.instruction)
        fitting = [prompt for prompt in prompts if len(prompt) <= longest]
        assert result.example.instruction == (fitting[-1] if fitting else row.instruction)
        assert result.kept == max(len(fitting) - 1, 0)
        assert result.fits == bool(fitting)
        assert result.example.response == row.response
