"""Grading by exact match; each awkward string is named for its trap."""

import os
import subprocess
import sys
import threading
import time

import pytest

from coterie.errors import CoterieError
from coterie.grading import maths
from coterie.grading.answers import Grade, answer_kind, checkable, grade, read_answer
from helpers import table

OPTIONS = "Which one?\nOptions:\n(A) a dog\n(B) a cat\n(C) a bird\n(D) a fish"


@pytest.fixture
def no_worker(monkeypatch):
    """Fail where strings and fractions should have decided, instead of starting a process."""

    class Forbidden:
        def same(self, answer, candidate):
            raise AssertionError(f"{answer!r} and {candidate!r} went to the worker")

    monkeypatch.setattr(maths, "_comparer", Forbidden())


# ------------------------------------------------------------------------------------------------- kinds of answer


@pytest.mark.parametrize(
    ("answer", "prompt", "kind"),
    table(
        ("integer", "72", "", "maths"),
        ("thousands comma", "1,234", "", "maths"),
        ("money", "\\$ 5.40", "", "maths"),
        ("number with a unit", "13 seconds", "", "maths"),
        ("latex unit", "20 \\text{ dollars}", "", "maths"),
        ("latex command without a digit", "\\pi", "", "maths"),
        ("environment name is no word", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "", "maths"),
        ("single variable", "x", "", "maths"),
        ("greek letter", "x+π", "", "maths"),
        ("function name is no word", "2 \\sin x + tan(y)", "", "maths"),
        ("letter without options is a variable", "B", "Find the point.", "maths"),
        ("letter among options", "B", OPTIONS, "choice"),
        ("letter in brackets", "(B)", OPTIONS, "choice"),
        ("latex letter", "\\text{(B)}", OPTIONS, "choice"),
        ("options written with full stops", "B", "Pick.\nA. one\nB. two", "choice"),
        ("letter beyond the options", "E", OPTIONS, "maths"),
        ("one bracketed letter is no list", "A", "Angle (A) is marked.", "maths"),
        ("yes", "yes", "Answer yes or no.", "text"),
        ("two-letter word", "No", "", "text"),
        ("latex word", "\\text{Monday}", "", "text"),
        ("words with digits", "the 1990s", "", "text"),
        ("short word and a number", "in 2003", "", "text"),
        ("large number in words", "5 million", "", "maths"),
        ("number in words", "forty-two", "", "maths"),
        ("words that begin with a number", "two towers", "", "text"),
        ("option named in words", "Sentence A", OPTIONS, "text"),
        ("brackets only", "] ] >", "", "text"),
    ),
)
def test_the_kind_of_an_answer_is_inferred(answer, prompt, kind):
    assert answer_kind(answer, prompt) == kind


def test_an_empty_answer_and_a_list_of_unit_tests_cannot_be_checked():
    assert [checkable(answer) for answer in (None, " ", "assert f(2) == 3", "72")] == [False, False, False, True]


def test_a_list_of_accepted_answers_can_be_checked_without_any_single_one():
    assert checkable(None, ["Paris"]) and checkable(None, [""])
    assert grade("Paris", "", answers=["Paris"]).correct
    with pytest.raises(CoterieError, match="null"):
        grade("5", "", answers=["5"], kind="maths")


def test_an_empty_reference_and_a_choice_without_a_letter_are_told_to_the_user():
    with pytest.raises(CoterieError, match="null"):
        grade("5", "  ")
    with pytest.raises(CoterieError, match="letter or a listed option; got 'Paris'"):
        grade("(A)", "Paris", kind="choice")


# ----------------------------------------------------------------------------------------------------------- maths


@pytest.mark.parametrize(
    ("text", "extracted"),
    table(
        ("last of two boxes", "\\boxed{3} no, \\boxed{5}", "5"),
        ("braces inside the box", "\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("escaped braces inside the box", "\\boxed{\\{5\\}}", "\\{5\\}"),
        ("box in a box", "\\boxed{x = \\boxed{5}}", "5"),
        ("box before a later statement", "\\boxed{5}. The answer is above 3.", "5"),
        ("box broken off", "\\boxed{3} so \\boxed{5", None),
        ("empty box", "\\boxed{}", None),
        ("full stop ends the sentence", "The answer is 5.", "5"),
        ("decimal point does not", "The answer is 5.25. Good.", "5.25"),
        ("reason after the number", "The answer is 18 because 3 * 6 = 18.", "18"),
        ("number in a sentence", "The answer is that she has 18 eggs.", "18"),
        ("last of two statements", "The answer is 3.\nWait: the answer is 5.", "5"),
        ("bold statement", "**Answer:** **5**", "5"),
        ("answer on the next line", "Final answer:\n\n5", "5"),
        ("question words in between", "The answer to the 2nd question is: 5", "5"),
        ("four hashes", "3 + 2 = 5\n#### 5", "5"),
        ("last number of a reasoning", "First 3 + 4 = 7, then 7 - 2 = 5", "5"),
        ("minus as operator is no sign", "He does 9-5", "5"),
        ("minus as sign", "The change is -5", "-5"),
        ("thousands comma", "It costs 12,500", "12,500"),
        ("list comma", "We have 1, 2, and 5", "5"),
        ("number with a full stop", "In total there are 5.", "5"),
        ("last formula", "so $x + 1$ becomes $2x$, done", "2x"),
        ("variable is no result", "there are 5 of them for $x$", "5"),
        ("two prices enclose no formula", "He has $5 and she has $6 too", "$6"),
        ("two-letter word before a number", "So 5", "5"),
        ("bare expression", "2x + 1", "2x + 1"),
        ("bare fraction", "hence it is \\frac{1}{2} here", "\\frac{1}{2}"),
        ("difference of prices encloses no formula", "He pays $5 - $3", "$3"),
        ("matrix is one formula", "so $\\begin{pmatrix}1\\\\2\\end{pmatrix}$", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("nothing said", "", None),
        ("no number", "I do not know the result", None),
    ),
)
def test_the_mathematical_answer_is_found(no_worker, monkeypatch, text, extracted):
    monkeypatch.setattr("coterie.grading.answers.same_expression", lambda answer, candidate: False)
    assert grade(text, "0", kind="maths").extracted == extracted


@pytest.mark.parametrize(
    ("answer", "text"),
    table(
        ("spaces", "2x+1", "\\boxed{2x + 1}"),
        ("dollars around", "5", "The answer is $5$."),
        ("dollar sign", "\\$ 5.40", "The answer is 5.40"),
        ("money in the candidate", "18", "The answer is $18 per day."),
        ("rupees", "rs . 1,200", "\\boxed{1200}"),
        ("unit in words", "13 seconds", "\\boxed{13}"),
        ("squared unit", "1134 cm ^ 2", "\\boxed{1134 \\text{ cm}^2}"),
        ("glued unit", "5", "The answer is 5cm."),
        ("degrees", "90^\\circ", "The answer is 90°."),
        ("percent sign against none", "50 %", "\\boxed{50}"),
        ("percent against the decimal", "50\\%", "\\boxed{0.5}"),
        ("decimal against the percent", "0.5", "\\boxed{50\\%}"),
        ("thousands", "10,\\!000", "The answer is 10,000."),
        ("braced comma", "10{,}000", "\\boxed{10000}"),
        ("trailing zeros", "5", "\\boxed{5.00}"),
        ("no leading zero", "0.5", "The answer is .5"),
        ("leading zeros", "7", "\\boxed{007}"),
        ("plus sign", "7", "\\boxed{+7}"),
        ("long minus", "-5", "\\boxed{−5}"),
        ("dfrac", "\\frac{1}{2}", "\\boxed{\\dfrac12}"),
        ("fraction against slash", "\\frac{1}{2}", "The answer is 1/2."),
        ("fraction against decimal", "\\frac{3}{4}", "The answer is 0.75"),
        ("fraction not in lowest terms", "1/2", "\\boxed{\\frac{2}{4}}"),
        ("negative fraction", "-\\frac{1}{2}", "\\boxed{\\frac{-1}{2}}"),
        ("mixed number", "3/2", "\\boxed{1\\frac{1}{2}}"),
        ("mixed number with a space", "1 1/2", "\\boxed{1.5}"),
        ("root without braces", "\\sqrt{2}", "\\boxed{\\sqrt2}"),
        ("size commands", "(3,\\frac{\\pi}{2})", "\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}"),
        ("left arrow keeps its name", "\\leftarrow", "\\boxed{\\leftarrow}"),
        ("variable before", "x = 5", "\\boxed{5}"),
        ("chain of equations", "15", "\\boxed{5 \\times 3 = 15}"),
        ("exponent braces", "x^2", "\\boxed{x^{2}}"),
        ("connecting word", "2,3", "\\boxed{2\\text{ and }3}"),
        ("formula brackets", "8{,}880", "The answer is \\( 8{,}880 \\)."),
        ("base in braces", "1011_2", "\\boxed{1011_{2}}"),
        ("root sign", "3\\sqrt{2}", "\\boxed{3√2}"),
        ("thin space", "10000", "\\boxed{10\\,000}"),
        ("unit with a slash", "20", "\\boxed{20 \\text{ m/s}}"),
    ),
)
def test_an_equal_answer_is_right_without_a_worker(no_worker, answer, text):
    assert grade(text, answer).correct


@pytest.mark.parametrize(
    ("answer", "text"),
    table(
        ("another number", "72", "The answer is 27."),
        ("number as a part", "5", "\\boxed{15}"),
        ("sign", "-5", "\\boxed{5}"),
        ("mixed number is no 11 halves", "11/2", "\\boxed{1 1/2}"),
        ("near miss", "12", "\\boxed{12.0000001}"),
        ("large near miss", "1000000000", "\\boxed{1000000001}"),
        ("other base", "123_4", "\\boxed{123_5}"),
        ("base where none is asked", "12", "\\boxed{12_5}"),
        ("anagram", "\\frac{\\text{listen}}{2}", "\\boxed{\\frac{\\text{silent}}{2}}"),
        ("a word", "5", "\\boxed{unknown}"),
        ("too long for the parser", "5", "\\boxed{5" + "+0" * 300 + "}"),
        ("hedge in words", "5", "\\boxed{5 or any number}"),
        ("broken off", "5", "The answer is \\boxed{5"),
    ),
)
def test_another_answer_is_wrong_without_a_worker(no_worker, answer, text):
    assert not grade(text, answer).correct


@pytest.mark.parametrize(
    ("answer", "text", "correct"),
    table(
        ("order of terms", "2x+1", "\\boxed{1+2x}", True),
        ("root simplified", "3\\sqrt{2}", "\\boxed{\\sqrt{18}}", True),
        ("fraction against its decimals", "1/3", "\\boxed{0.333333}", True),
        ("fraction against too few decimals", "1/3", "\\boxed{0.33}", False),
        ("open against closed interval", "[1,2]", "\\boxed{[1,2)}", False),
        ("order of a pair", "(1,2)", "\\boxed{(2,1)}", False),
        ("interval for an inequality", "x \\ge 3", "\\boxed{[3,\\infty)}", True),
        ("inequality for an interval", "[3,\\infty)", "\\boxed{x \\ge 3}", False),
        ("one of two roots", "5", "\\boxed{5, 6}", False),
        ("hedge", "5", "\\boxed{5 \\text{ or } 6}", False),
        ("interval that holds the answer", "5", "\\boxed{[0,10]}", False),
        ("undefined", "5", "\\boxed{0/0}", False),
        ("power of ten", "5", "\\boxed{1e999999999}", False),
        ("lone surrogate", "5", "\\boxed{\ud800+1}", False),
        ("python code", "5", "\\boxed{(lambda: 5)()}", False),
    ),
)
def test_expressions_are_compared_by_value(answer, text, correct):
    assert grade(text, answer).correct is correct


def test_values_are_compared_in_a_thread_too():
    grades: list[Grade] = []
    thread = threading.Thread(target=lambda: grades.append(grade("\\boxed{1 + x}", "x + 1")))
    thread.start()
    thread.join()
    assert grades == [Grade(True, "1 + x")]


def test_an_item_that_overruns_is_wrong_and_the_next_one_is_still_graded(monkeypatch):
    monkeypatch.setattr(maths._comparer, "seconds", 1.0)
    assert grade("\\boxed{1 + x}", "x + 1").correct
    start = time.monotonic()
    assert not grade("\\boxed{9^{9^{9^{9}}}}", "5").correct
    assert time.monotonic() - start < 60
    assert grade("\\boxed{1 + x}", "x + 1").correct


def test_a_worker_that_cannot_start_is_told_to_the_user(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CoterieError, match="does not start"):
        maths.ValueComparer().same("x+1", "1+x")


def test_a_script_without_a_main_guard_grades_and_ends_and_its_worker_does_not_load_torch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from coterie.grading.answers import grade\n"
        "print(grade('\\\\boxed{1+x}', 'x+1').correct, 'torch' in sys.modules)\n"
    )
    path = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path}
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "True False\n", "")


@pytest.mark.parametrize(
    "text",
    table(
        ("open boxes", "\\boxed{" * 14_000),
        ("nested boxes", "\\boxed{" * 7_000 + "}" * 7_000),
        ("open braces", "\\boxed{" + "{" * 100_000),
        ("nested braces", "\\boxed{" + "{" * 50_000 + "5" + "}" * 50_000 + "}"),
        ("digits", "\\boxed{" + "1" * 100_000 + "}"),
        ("digits after a letter", "a" + "1" * 100_000),
        ("dollars", "$1 " * 33_000),
        ("announcements", "answer is " * 10_000),
        ("spaces", "answer is" + " " * 100_000),
        ("line ends", "\n" * 100_000),
        ("brackets", "( " * 50_000),
        ("full stops", "a. " * 33_000),
    ),
)
@pytest.mark.parametrize(
    ("answer", "prompt", "answers"),
    table(
        ("maths", "5", "", ()),
        ("text", "yes", "", ()),
        ("choice", "B", OPTIONS, ()),
        ("brackets", "] }", "", ()),
        ("several", "yes", "", ("yes", "unanswerable")),
    ),
)
def test_long_nonsense_is_wrong_at_once(no_worker, text, answer, prompt, answers):
    start = time.process_time()
    result = grade(text, answer, prompt=prompt, answers=answers)
    assert not result.correct
    assert len(result.extracted or "") <= 500
    assert time.process_time() - start < 10


# ---------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("text", "letter"),
    table(
        ("bracketed", "(B)", "B"),
        ("stated", "The answer is B.", "B"),
        ("stated in brackets", "The answer is (B).", "B"),
        ("stated as an option", "The correct answer is option B", "B"),
        ("colon", "Answer: B", "B"),
        ("bold", "**Answer: B**", "B"),
        ("bare", "B", "B"),
        ("bare with a bracket", "B) a cat", "B"),
        ("bare with a full stop", "B. a cat", "B"),
        ("bare, then an explanation", "B\nCats purr.", "B"),
        ("boxed", "\\boxed{B}", "B"),
        ("boxed latex", "so $\\boxed{\\text{(B)}}$", "B"),
        ("boxed with its text", "\\boxed{B. a cat}", "B"),
        ("boxed small letter", "\\boxed{b}", "B"),
        ("bare small letter", "b.", "B"),
        ("box broken off", "(A) or \\boxed{B", None),
        ("latex text", "The answer is $\\text{B}$.", "B"),
        ("small letter in brackets", "It is (b).", "B"),
        ("last bracket of several", "Not (A), not (C), so (B)", "B"),
        ("others refuted after the statement", "The answer is B. (A) is wrong since dogs bark.", "B"),
        ("revised statement", "The answer is (A). No, the answer is (B).", "B"),
        ("statement that names no option", "The answer is clear: only (B) purrs", "B"),
        ("article at the start", "A cat purrs, so (B)", "B"),
        ("article after the statement", "The answer is a cat, (B)", "B"),
        ("plural ending", "The cat(s) are in (B), dog(s)", "B"),
        ("letter that is no option", "(I) think it is (B), (E) is none", "B"),
        ("stated letter beyond the options", "Not (B), not (C). The answer is (F).", "F"),
        ("stated letter beyond the options, then revised", "The answer is (F). No, the answer is B.", "B"),
        ("stated small letter that is a variable", "The answer is (x), which is (B)", "B"),
        ("hyphenated letter", "The answer is A-like, so (B)", "B"),
        ("two stated", "The answer is A or B.", None),
        ("two stated in brackets", "The answer is (B) and (C).", None),
        ("two bracketed", "(A) or (B)", None),
        ("two boxed", "\\boxed{(A) / (B)}", None),
        ("one stated twice", "The answer is (B) or (b).", "B"),
        ("two, then one", "(A) or (B)? The answer is (B).", "B"),
        ("article only", "A cat purrs", None),
        ("word that starts with a letter", "Because", None),
        ("nothing", "", None),
    ),
)
def test_the_chosen_letter_is_found(text, letter):
    assert grade(text, "B", prompt=OPTIONS) == Grade(letter == "B", letter)


def test_another_letter_is_wrong_and_a_bracketed_reference_is_the_same_letter():
    assert grade("The answer is (C).", "(B)", prompt=OPTIONS) == Grade(False, "C")
    assert grade("The answer is (C).", "(C)", prompt=OPTIONS) == Grade(True, "C")


def test_without_listed_options_any_letter_counts_for_a_choice():
    assert grade("The answer is (Q).", "Q", kind="choice").correct


# ------------------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("answer", "text"),
    table(
        ("case", "yes", "Yes"),
        ("full stop", "Yes", "yes."),
        ("stated", "no", "Some are. The answer is no."),
        ("reason after a verdict", "yes", "Yes, because it froze."),
        ("reason after a stated verdict", "no", "The answer is no, since five is more."),
        ("article", "Privy Council", "the Privy Council"),
        ("letter that is no article", "Sentence A", "sentence a."),
        ("hyphen", "e-mail", "The answer is email."),
        ("first line of several", "Paris", "Paris\nIt is the capital."),
        ("whole text of two lines", "one two", "one\ntwo"),
        ("abbreviation with full stops", "the U.S. Senate", "The answer is the U.S. Senate."),
        ("sentence after the answer", "Paris", "The answer is Paris. It lies in France."),
        ("boxed word", "\\text{Monday}", "It is $\\boxed{\\text{Monday}}$."),
        ("quoted", "Paris", "“Paris”"),
        ("brackets", "] ] >", "] ] >"),
        ("brackets after a statement", ") }", "Pop the stack: so the answer is ) }."),
        ("brackets without spaces", "] ) >", "The answer is ])>."),
        ("brackets in quotation marks", "] )", 'The answer is "]", ")"'),
        ("brackets in code marks", "> }", "Answer: `> }`"),
        ("brackets in a box", "] } ]", "so $\\boxed{] } ]}$."),
        ("escaped brackets in a box", "} >", "\\boxed{\\} >}"),
        ("one brace in a box", "}", "\\boxed{}}"),
        ("verdict as a word of logic", "invalid", "So the answer is invalid."),
        ("sorted words", "ash elm it&t oak", "So the answer is ash, elm, it&t, oak."),
        ("title with a comma", "Up, up & away", "So the answer is Up, up & away."),
        ("other language", "ça va", "Ça va !"),
    ),
)
def test_a_text_is_right(answer, text):
    assert grade(text, answer, kind="text").correct


@pytest.mark.parametrize(
    ("answer", "text"),
    table(
        ("other verdict", "yes", "No, yes would be wrong."),
        ("word that starts like the verdict", "no", "None of them"),
        ("answer among others", "Paris", "Paris or London"),
        ("both verdicts", "yes", "Yes and no."),
        ("either verdict", "no", "The answer is no or yes."),
        ("decimal point", "3.5 km", "35 km"),
        ("minus sign", "-5 degrees", "5 degrees"),
        ("symbol in a name", "C++", "C#"),
        ("article as a name", "Vitamin A", "Vitamin"),
        ("other sentence", "Sentence A", "Sentence B"),
        ("other brackets", "] ] >", "] > ]"),
        ("other punctuation", "...", ","),
        ("more brackets", "]", "\\boxed{] } ]}"),
        ("fewer brackets", "] }", "The answer is ]."),
        ("brackets broken off", "] }", "\\boxed{] "),
        ("longer word of logic", "valid", "So the answer is invalid."),
        ("words in another order", "ash elm oak", "So the answer is elm ash oak."),
        ("punctuation only", "yes", "..."),
        ("brackets against nothing", "]", "..."),
        ("box broken off", "Monday", "\\boxed{Monday"),
        ("nothing", "Paris", ""),
    ),
)
def test_a_text_is_wrong(answer, text):
    assert not grade(text, answer, kind="text").correct


# ---------------------------------------------------------------------------------------- text, by several references

# F1 is 2 x shared words / (words of the reference + words of the text).
SPANS = table(
    ("same", ["10th century"], "10th century", True, 1),
    ("one word more", ["10th century"], "in 10th century", False, 4 / 5),
    ("one word less", ["10th century"], "century", False, 2 / 3),
    ("case, article and full stop", ["10th century"], "The 10th Century.", True, 1),
    ("article inside a word", ["anthem"], "them", False, 0),
    ("any reference matches", ["first half of the 10th century", "10th century", "10th"], "10th", True, 1),
    (
        "nearest reference, not the first",
        ["century", "first half of the 10th century"],
        "half of century",
        False,
        6 / 8,
    ),
    ("every reference is worse than a match", ["red", "blue"], "red blue", False, 2 / 3),
    ("word repeated in the text counts once", ["New York"], "New New York", False, 4 / 5),
    ("word repeated in both", ["New New York"], "New New York City", False, 6 / 7),
    ("word repeated in the reference", ["New New York"], "New York", False, 4 / 5),
    ("other order", ["Gautama Buddha"], "Buddha Gautama", False, 1),
    ("nothing shared", ["Rollo"], "William", False, 0),
    ("apostrophe", ["Sant'Eufemia"], "SantEufemia", True, 1),
    ("hyphen joins", ["Italo-Norman"], "Italo Norman", False, 0),
    ("long dash is no ASCII", ["1054–1078"], "10541078", False, 0),
    ("punctuation counts for nothing", ["C++", "3.5 km"], "35 km", True, 1),
    ("verdict with a reason", ["yes"], "yes it is", False, 2 / 4),
    ("number is a text", ["1,974"], "1974", True, 1),
    ("number of another form", ["0.5"], "1/2", False, 0),
    ("after an announcement", ["Paris"], "The answer is Paris.", True, 1),
    ("abbreviation with full stops", ["U.S. Senate"], "The answer is the U.S. Senate.", True, 1),
    ("boxed", ["Monday"], "$\\boxed{\\text{Monday}}$", True, 1),
    ("first line", ["Paris"], "Paris\nIt is the capital.", True, 1),
    ("reference with line break", ["one\ntwo"], "one two", True, 1),
    ("reference without a word is ignored", [".", "Paris"], "Paris", True, 1),
    ("reference without a word matches nothing", [".", "Paris"], ".", False, 0),
    ("none is a span", ["None"], "None", True, 1),
    ("nothing", ["Paris"], "", False, 0),
    ("punctuation only", ["Paris"], "...", False, 0),
    ("article only", ["Paris"], "the", False, 0),
    ("refusal shares no word", ["no answer came"], "No answer.", False, 0),
    ("refusal of a question that has an answer", ["unanswerable", "Paris"], "unanswerable", False, 0),
    ("answer beside a refusal", ["unanswerable", "Paris"], "Paris", True, 1),
    ("span that begins like a refusal", ["no answer, he wrote"], "no answer, he wrote", True, 1),
)


@pytest.mark.parametrize(("answers", "text", "correct", "f1"), SPANS)
def test_a_text_is_compared_with_all_accepted_answers_as_squad_does(answers, text, correct, f1):
    result = grade(text, answers[0], answers=answers)
    assert (result.correct, result.f1) == (correct, pytest.approx(f1))


REFUSALS = table(
    ("word", "unanswerable", True),
    ("case and full stop", "Unanswerable.", True),
    ("stated", "The answer is unanswerable.", True),
    ("in a sentence", "The question is unanswerable.", True),
    ("negated", "This is not answerable.", True),
    ("in other words", "This question cannot be answered from the text.", True),
    ("shortened", "It can't be answered", True),
    ("no answer", "No answer", True),
    ("there is none", "There is no answer.", True),
    ("with a reason", "Unanswerable, since the text does not name him.", True),
    ("with a reason after a full stop", "Unanswerable. The text does not name him.", True),
    ("with a reason and no comma", "Unanswerable because the text does not name him.", True),
    ("boxed", "\\boxed{\\text{unanswerable}}", True),
    ("quoted", '"unanswerable"', True),
    ("silence", "", False),
    ("spaces", " \n ", False),
    ("punctuation only", "...", False),
    ("article only", "the", False),
    ("none may be a span", "none", False),
    ("a span", "Paris", False),
    ("answerable", "answerable", False),
    ("denial", "not unanswerable", False),
    ("box broken off", "\\boxed{unanswerable", False),
)


@pytest.mark.parametrize(
    ("answer", "answers"),
    [("unanswerable", ()), ("unanswerable", ("unanswerable",)), ("", ("",)), ("No answer.", ()), ("", ("", "."))],
    ids=["word", "list of the word", "empty list", "other words", "nothing but punctuation"],
)
@pytest.mark.parametrize(("text", "correct"), REFUSALS)
def test_where_there_is_no_answer_only_a_text_that_says_so_is_right(answer, answers, text, correct):
    result = grade(text, answer, answers=answers)
    assert (result.correct, result.f1) == (correct, float(correct))


@pytest.mark.parametrize(
    ("answer", "text", "f1"),
    table(
        ("right", "Paris", "The answer is Paris.", 1),
        ("half", "Privy Council", "The answer is the Council.", 2 / 3),
        ("verdict", "yes", "Yes, because it froze.", 1),
        ("other verdict", "yes", "No, yes would be wrong.", 0),
        ("order is not in it", "ash elm oak", "elm ash oak", 1),
        ("symbols are not in it", "C++", "C#", 1),
        ("nothing found", "Paris", "", 0),
        ("brackets are no words", "] ] >", "] ] >", None),
        ("wrong brackets are no words", "] ] >", "Paris", None),
        ("number", "72", "72", None),
        ("option", "(B)", "(B)", None),
    ),
)
def test_f1_is_given_for_words_alone(answer, text, f1):
    assert grade(text, answer, prompt=OPTIONS).f1 == (None if f1 is None else pytest.approx(f1))


def test_what_was_taken_for_the_answer_among_several_is_told():
    assert grade("It is cold.\nThe answer is Rome.", "Rome", answers=["Rome", "Roma"]) == Grade(True, "Rome", 1.0)
    assert grade("", "Rome", answers=["Rome", "Roma"]) == Grade(False, None, 0.0)
    assert grade("\\boxed{] ", "] }") == Grade(False, None)
    assert grade("so " * 300, "Rome", answers=["Rome"]).extracted == ("so " * 300)[:500]


LISTED = "Which?\n(A) red\n(B) blue"


@pytest.mark.parametrize(
    ("text", "prompt", "read"),
    [
        ("I think the answer is (B).", LISTED, "B"),
        ("(A) or (B)? So (A)", LISTED, "A"),
        ("no idea", LISTED, ""),
        (r"Thus \boxed{1{,}000}.", "", "1000"),
        ("So 3 + 4 = 7. The answer is 1,000 apples.", "", "1000"),
        ("First 3, then 4.\nThat makes 12 of them.", "", "12"),
        ("The answer is the Eiffel Tower.", "", "eiffel tower"),
        ("3 + 4 = 7.", "", "7"),
        ("**Paris**", "", "paris"),
        ("First this.\nThen that, which is long enough", "", "then that which is long enough"),
        ("", "", ""),
        (r"\boxed{", "", ""),
    ],
)
def test_an_answer_is_read_without_a_reference(text, prompt, read):
    assert read_answer(text, prompt) == read


def test_answers_that_are_graded_alike_are_read_alike():
    for one, other in [("The answer is 72.", r"\boxed{72}"), ("Paris", "The answer is Paris!")]:
        assert read_answer(one) == read_answer(other) != ""
