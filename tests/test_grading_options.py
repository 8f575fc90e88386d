"""Options as published sets list them, and the answers that choose them."""

import random
import time

import pytest

from coterie.grading.answers import Grade, answer_kind, grade, read_answer
from coterie.grading.options import listed_options

TEXTS = ("couch", "bed", "kitchen table", "floor")
QUESTION = "Where does a tired boy sleep?"
ARC = (  # commonsense_170k: ARC, OpenBookQA, Social IQa
    f"Please choose the correct answer to the question: {QUESTION}\n\n"
    "Answer1: couch Answer2: bed Answer3: kitchen table Answer4: floor\n\n"
    "Answer format: answer1/answer2/answer3/answer4"
)
WINOGRANDE = (
    "Please choose the correct answer to fill in the blank to complete the given sentence: The boy slept on the _.\n\n"
    "Option1: couch\n\nOption2: bed\n\nAnswer format: option1/option2"
)
PIQA = (
    "Please choose the correct solution to the question: How do I rest?\n\nSolution1: Lie down on the bed.\n\n"
    "Solution2: Lie down on the bed and run.\n\nAnswer format: solution1/solution2"
)
HELLASWAG = (
    "Please choose the correct ending to complete the given sentence: A boy is tired. He\n\n"
    + "\n\n".join(f"Ending{number}: sleeps on the {text}." for number, text in enumerate(TEXTS, 1))
    + "\n\nAnswer format: ending1/ending2/ending3/ending4"
)
LETTERS = f"{QUESTION}\nOptions:\n(A) couch\n(B) bed\n(C) kitchen table\n(D) floor"  # BBH, FLAN
MMLU = f"{QUESTION}\nA. couch\nB. bed\nC. kitchen table\nD. floor\nAnswer:"
IN_A_ROW = f"{QUESTION} A. couch B. bed C. kitchen table D. floor"  # CommonsenseQA's prompts
MATHQA = "How many boys sleep?\noptions: a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"
NUMBERED = f"{QUESTION}\n1. couch\n2. bed\n3. kitchen table\n4. floor\nAnswer:"
SENTENCES = (  # ComVE in FLAN
    "Of the following two sentences, which one is against common sense?\nOptions:\n"
    '- Sentence A: "He poured orange juice on his cereal."\n- Sentence B: "He poured milk on his cereal."'
)
CALLED = f"{QUESTION}\nOptions:\n- Text 1: couch\n- Text 2: bed\n- Text 3: kitchen table\n- Text 4: floor"
FLAN = f"{QUESTION}\nOPTIONS:\n- couch\n- bed\n- kitchen table\n- floor"

PAIRS: tuple[tuple[str, str, str, bool], ...] = (
    (ARC, "answer2", "answer2", True),
    (ARC, "answer2", "the correct answer is answer2", True),
    (ARC, "answer2", "The correct answer is Answer2.", True),
    (ARC, "answer2", "Answer2: bed", True),
    (ARC, "answer3", "Answer3: kitchen table", True),
    (ARC, "answer3", "Answer3: Kitchen table.", True),
    (ARC, "answer3", "Answer 3", True),
    (ARC, "answer3", "The answer is 3.", True),
    (ARC, "answer3", "Option 3: kitchen table", True),
    (ARC, "answer3", "\\boxed{answer3}", True),
    (ARC, "answer3", "**Answer3: kitchen table**", True),
    (ARC, "answer3", "kitchen table", True),
    (ARC, "answer3", "A kitchen table.", True),
    (ARC, "answer3", "The answer is the kitchen table, because it is flat.", True),
    (ARC, "answer3", "Boys rest anywhere, so I would take answer3", True),
    (ARC, "answer3", "Answer3: kitchen table\nAnswer1 is wrong since it is soft.", True),
    (ARC, "answer3", "the correct answer is answer2", False),
    (ARC, "answer3", "Answer3: bed", False),  # the label of one, the text of another
    (ARC, "answer2", "Answer3: bed", False),
    (ARC, "answer3", "answer3 or answer4", False),
    (ARC, "answer3", "The answer is answer3 or answer4.", False),
    (ARC, "answer3", "answer1, answer2, answer3 and answer4", False),
    (ARC, "answer3", "kitchen table or floor", False),
    (ARC, "answer3", "kitchen", False),
    (ARC, "answer3", "answer33", False),
    (ARC, "answer1", "answer10", False),
    (ARC, "answer3", "", False),
    (ARC, "kitchen table", "answer3", True),
    (ARC, "3", "answer3", True),
    (WINOGRANDE, "option2", "option2", True),
    (WINOGRANDE, "option2", "The correct answer is option2: bed.", True),
    (WINOGRANDE, "option2", "The correct answer is option2 (bed).", True),
    (WINOGRANDE, "option2", "The correct option is bed.", True),
    (WINOGRANDE, "option2", "bed", True),
    (WINOGRANDE, "option2", "option1", False),
    (WINOGRANDE, "option2", "The correct answer is option2: couch.", False),
    (WINOGRANDE, "option2", "option1/option2", False),
    (PIQA, "solution1", "the correct answer is solution1", True),
    (PIQA, "solution1", "Lie down on the bed.", True),
    (PIQA, "solution1", "The best solution is solution1", True),
    (PIQA, "solution1", "Lie down on the bed and run.", False),
    (HELLASWAG, "ending4", "the correct answer is ending4", True),
    (HELLASWAG, "ending4", "Ending4: sleeps on the floor.", True),
    (HELLASWAG, "ending4", "sleeps on the floor", True),
    (HELLASWAG, "ending4", "sleeps on the bed", False),
    (LETTERS, "B", "bed", True),
    (LETTERS, "(B)", "The answer is bed.", True),
    (LETTERS, "B", "(B) bed", True),
    (LETTERS, "B", "The answer is B: bed.", True),
    (LETTERS, "B", "The answer is option B.", True),
    (LETTERS, "B", "I would choose option B here", True),
    (LETTERS, "B", "The correct choice is (B).", True),
    (LETTERS, "bed", "B", True),
    (LETTERS, "bed", "The answer is (B).", True),
    (LETTERS, "bed", "(A)", False),
    (LETTERS, "B", "(B) couch", False),
    (LETTERS, "A", "(B) couch", False),
    (LETTERS, "B", "bed or floor", False),
    (MMLU, "B", "B", True),
    (MMLU, "B", " B. bed", True),
    (MMLU, "B", "Bed.", True),
    (MMLU, "B", "D. bed", False),
    (IN_A_ROW, "D", "floor", True),
    (IN_A_ROW, "D", "D. floor", True),
    (IN_A_ROW, "D", "bed", False),
    (MATHQA, "c", "c", True),
    (MATHQA, "c", "The answer is 30.", True),
    (MATHQA, "c", "c ) 30", True),
    (MATHQA, "30", "c", True),
    (MATHQA, "30", "10 * 3 = 30 boys", True),
    (MATHQA, "30", "The answer is 38.", False),
    (MATHQA, "e", "none of these", True),
    (MATHQA, "c", "a", False),
    (NUMBERED, "2", "2", True),
    (NUMBERED, "2", "2. bed", True),
    (NUMBERED, "2", "The answer is 2.", True),
    (NUMBERED, "2", "The answer is (2).", True),
    (NUMBERED, "2", "Option 2", True),
    (NUMBERED, "2", "bed", True),
    (NUMBERED, "bed", "2", True),
    (NUMBERED, "2", "2. couch", False),
    (NUMBERED, "2", "The answer is 12.", False),
    (SENTENCES, "Sentence A", "Orange juice does not taste good on cereal.\nThe answer is Sentence A.", True),
    (SENTENCES, "Sentence A", "Sentence A", True),
    (SENTENCES, "Sentence A", "A", True),
    (SENTENCES, "A", "sentence a", True),
    (SENTENCES, "Sentence A", "He poured orange juice on his cereal.", True),
    (SENTENCES, "Sentence A", 'Sentence A: "He poured orange juice on his cereal."', True),
    (SENTENCES, "Sentence A", "The answer is Sentence B.", False),
    (SENTENCES, "Sentence A", "Sentence A or Sentence B", False),
    (SENTENCES, "Sentence A", "Sentence A: He poured milk on his cereal.", False),
    (CALLED, "Text 2", "The answer is text 2.", True),
    (CALLED, "Text 2", "bed", True),
    (CALLED, "Text 2", "2", True),
    (CALLED, "Text 2", "Text 1", False),
    (FLAN, "bed", "bed", True),
    (FLAN, "bed", "The answer is bed.", True),
    (FLAN, "bed", "- bed", True),
    (FLAN, "bed", "floor", False),
    (FLAN, "bed", "bed or floor", False),
    ("Is it so?\nOPTIONS:\n- yes\n- no", "yes", "Yes, it is.", True),
    ("Is it so?\nOPTIONS:\n- yes\n- no", "yes", "No.", False),
    ("Is it so?\nOPTIONS:\n- yes\n- no", "yes", "yes and no", False),
)


def test_there_are_enough_pairs_and_none_is_decided_twice():
    assert len(PAIRS) >= 80
    assert len({pair[:3] for pair in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize(("prompt", "answer", "text", "correct"), PAIRS)
def test_a_published_form_is_decided(prompt, answer, text, correct):
    assert answer_kind(answer, prompt) == "choice"
    assert grade(text, answer, prompt=prompt).correct == correct


@pytest.mark.parametrize("prompt", [ARC, HELLASWAG, LETTERS, MMLU, IN_A_ROW, NUMBERED, FLAN])
def test_an_option_is_right_for_itself_alone_and_voted_for_alike_however_it_is_named(prompt):
    options = listed_options(prompt)
    assert len(options.texts) == 4
    for label, own in options.texts.items():
        for text in (label, own, f"The answer is {own}", f"{own}, since it is so.\nThe answer is {label}."):
            assert read_answer(text, prompt) == label
            for answer in options.texts:
                assert grade(text, answer, prompt=prompt) == Grade(label == answer, label)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Which?\n(A) x\n(B) both (A) and nothing\n(C) y", {"A": "x", "B": "both (A) and nothing", "C": "y"}),
        ("Which?\n(A) x\n(B) y\nReply with (A) or (B).", {"A": "x", "B": "y"}),
        ("Which?\nA. u\nB. v\nC. w\nAnswer: A\n\nWhich?\nA. x\nB. y\nAnswer:", {"A": "x", "B": "y"}),
        (
            "Statement 1 | a. Statement 2 | b.\n(A) True, True\n(B) False, False",
            {"A": "True, True", "B": "False, False"},
        ),
        ("Which? (A) x, (B) y, or (C) z", {"A": "x", "B": "y", "C": "z"}),
        ("Which?\nOption A: x\nOption B: y", {"A": "x", "B": "y"}),
        ("Which one?\nChoice 1 - x\nChoice 2 - y", {"choice1": "x", "choice2": "y"}),
        ("Which?\n(A) -5\n(B) 5", {"A": "-5", "B": "5"}),
        ("Read these facts.\n1. Tom has 3 apples.\n2. Ann has 4.\nHow many have they?", {}),
        ("Tom met A. Smith and B. Jones.", {}),
        ("Answer yes or no.", {}),
    ],
)
def test_options_are_read_from_the_prompt(prompt, texts):
    assert listed_options(prompt).texts == texts


def test_options_of_one_text_are_told_apart_by_their_labels_alone():
    prompt = "Which?\n(A) worried\n(B) proud\n(C) worried"
    assert not grade("worried", "A", prompt=prompt).correct
    assert grade("(A) worried", "A", prompt=prompt).correct
    assert grade("worried", "worried", prompt=prompt).correct


def test_own_texts_that_differ_in_case_or_brackets_alone_are_told_apart():
    prompt = "Which?\n(A) RR\n(B) Rr\n(C) (L • H) ∨ I\n(D) L • (H ∨ I)"
    for letter, text in listed_options(prompt).texts.items():
        for one in (text, f"The answer is {text}."):
            assert grade(one, letter, prompt=prompt) == Grade(True, letter)
    assert grade("(C) L • (H ∨ I)", "C", prompt=prompt) == Grade(False, None)


ODD = [
    *"(A1.:)-\n ?$",
    "A) ", "(A) (B) ", "A) x\nB) y\n", "Answer1: ", "Answer1: x Answer2: y ", "?\n1. x 2. y\n", "Options:\n- x\n- y\n",
    "- x\n", "option 1 ", "option A ", "answer1 or ", "bed\n", "bed ", "answer is bed\n", "option is ",
    "a ) 1 , b ) 2 , ", "0: x 1: y ", "\\boxed{bed} ",
]  # fmt: skip


@pytest.mark.parametrize("piece", ODD, ids=ascii)
def test_200_000_odd_characters_are_read_in_little_time(piece):
    text = piece * (200_000 // len(piece))
    started = time.monotonic()
    listed_options(text)
    listed_options(f"{LETTERS}\n{text}x")
    for prompt, answer in ((ARC, "answer4"), (LETTERS, "D"), (NUMBERED, "4"), (f"{text}\n{LETTERS}", "D")):
        assert not grade(text, answer, prompt=prompt).correct
    assert time.monotonic() - started < 60  # a fraction of a second; where a pattern backtracks it is hours


def test_no_mix_of_forms_breaks_the_reading():
    draw = random.Random(0)
    for _ in range(500):
        prompt, text = ("".join(draw.choices([*ODD, *TEXTS], k=12)) for _ in range(2))
        grade(text, "B", prompt=prompt, kind="choice")
        read_answer(text, prompt)
