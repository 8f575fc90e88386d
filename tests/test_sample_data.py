"""The sample data: as its generator writes it, balanced, without overlap, and right by code that shares nothing."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = {"train": 150, "test": 60}
KINDS = {"maths", "choices", "grammar", "spelling", "python"}
ROWS = {
    split: [json.loads(line) for line in (EXAMPLES / "data" / f"{split}.jsonl").read_text().splitlines()]
    for split in SIZES
}
ALL_ROWS = [row for rows in ROWS.values() for row in rows]


def generate(output: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / "sample_data.py", "--output", output, *settings]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def of_kind(kind: str) -> list[dict[str, str]]:
    return [row for row in ALL_ROWS if row["source"] == kind]


def test_generating_again_gives_the_committed_bytes(tmp_path):
    assert generate(tmp_path).returncode == 0
    for split in SIZES:
        committed = (EXAMPLES / "data" / f"{split}.jsonl").read_bytes()
        assert (tmp_path / f"{split}.jsonl").read_bytes() == committed


def test_another_seed_gives_other_rows(tmp_path):
    assert generate(tmp_path, "--seed", "1").returncode == 0
    assert (tmp_path / "train.jsonl").read_text() != (EXAMPLES / "data" / "train.jsonl").read_text()


def test_asking_for_more_rows_than_there_are_instructions_is_refused_in_one_line(tmp_path):
    refused = generate(tmp_path / "none", "--train", "5000")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith("ask for fewer rows")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("split", SIZES)
def test_every_kind_has_the_same_number_of_rows(split):
    assert Counter(row["source"] for row in ROWS[split]) == dict.fromkeys(KINDS, SIZES[split] // len(KINDS))


@pytest.mark.parametrize("split", SIZES)
def test_kinds_are_mixed_and_not_in_blocks(split):
    sources = [row["source"] for row in ROWS[split]]
    changes = sum(before != after for before, after in zip(sources, sources[1:], strict=False))
    assert changes > len(sources) / 2


def test_ids_are_unique_over_both_splits():
    assert len({row["id"] for row in ALL_ROWS}) == len(ALL_ROWS)


def test_no_instruction_stands_twice_not_even_in_the_other_split():
    assert len({row["instruction"].casefold() for row in ALL_ROWS}) == len(ALL_ROWS)


def test_every_row_has_the_same_fields_and_all_are_filled():
    for row in ALL_ROWS:
        assert list(row) == ["id", "source", "instruction", "response", "answer"]
        assert all(value.strip() == value != "" for value in row.values()), row["id"]


def test_rows_are_short():
    assert max(len(row["instruction"]) for row in ALL_ROWS) <= 100
    assert max(len(row["response"]) for row in ALL_ROWS) <= 50


@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_constant_answer_is_right_for_more_than_half_of_a_kind(split, kind):
    answers = Counter(row["answer"] for row in ROWS[split] if row["source"] == kind)
    assert answers.most_common(1)[0][1] <= SIZES[split] / len(KINDS) / 2


def test_maths_answers_follow_from_the_words_of_the_problem():
    for row in of_kind("maths"):
        first, second = map(int, re.findall(r"\d+", row["instruction"]))
        if "each" in row["instruction"]:
            expected, sign = sum([first] * second), "*"
        elif "more" in row["instruction"]:
            expected, sign = first + second, "+"
        else:
            assert "gave" in row["instruction"]
            expected, sign = first - second, "-"
        assert int(row["answer"]) == expected > 0, row["id"]
        assert row["response"] == rf"{first} {sign} {second} = \boxed{{{expected}}}", row["id"]


# Written down apart from the generator's table: which words may stand as the right answer, and nowhere else.
MEMBERS = {
    "an animal": "camel donkey goat horse monkey mouse rabbit sheep tiger zebra",
    "a fruit": "apple apricot banana cherry grape lemon mango melon papaya pear",
    "a tool": "axe chisel crowbar hammer pliers rake screwdriver shovel spanner wrench",
    "a vehicle": "bicycle bus car scooter taxi tractor train tram truck wagon",
    "clothing": "blouse coat glove jacket scarf shirt skirt sock sweater trousers",
    "part of the body": "ankle arm ear elbow finger knee neck nose shoulder thumb",
    "an instrument": "banjo cello drum flute guitar harp piano trumpet tuba violin",
    "a building": "barn castle church hospital hotel library mosque museum school theatre",
}


def test_exactly_one_option_fits_and_it_is_the_answer():
    for row in of_kind("choices"):
        question, heading, *lines = row["instruction"].splitlines()
        assert heading == "Options:"
        category = re.fullmatch(r"Which of these is (.+)\?", question)[1]
        options = dict(re.fullmatch(r"\(([A-C])\) (\w+)", line).groups() for line in lines)
        assert list(options) == ["A", "B", "C"]
        assert [letter for letter, word in options.items() if word in MEMBERS[category].split()] == [row["answer"]]
        assert row["response"] == f"The answer is ({row['answer']})."


def past_tense(verb: str) -> str:
    """The past of a regular verb in the third person, by the rules of spelling."""
    if verb.endswith("ies"):
        return verb.removesuffix("ies") + "ied"
    stem = verb.removesuffix("es") if re.search(r"(sh|ch|x)es$", verb) else verb.removesuffix("s")
    if stem.endswith("e"):
        return stem + "d"
    one_syllable = len(re.findall("[aeiou]+", stem)) == 1
    doubled = one_syllable and re.search(r"[^aeiou][aeiou][^aeiouwxy]$", stem)
    return stem + stem[-1] + "ed" if doubled else stem + "ed"


def test_grammar_answers_change_the_verb_to_its_past_and_nothing_else():
    for row in of_kind("grammar"):
        name, verb, *rest = row["instruction"].removeprefix("Put this in the past tense: ").split(" ")
        assert row["answer"] == row["response"] == " ".join([name, past_tense(verb), *rest])


def test_spelled_words_give_the_word_back_when_joined():
    for row in of_kind("spelling"):
        word = re.fullmatch(r"Spell the word (\w+), one letter at a time\.", row["instruction"])[1]
        letters = row["answer"].split(" ")
        assert all(len(letter) == 1 for letter in letters)
        assert "".join(letters) == word
        assert row["response"] == row["answer"]


def shown(code: str) -> str:
    """What Python shows for one of the five expressions, worked out from the syntax tree."""
    expression = ast.parse(code, mode="eval").body.args[0]
    match expression:
        case ast.Call(func=ast.Name("sorted"), args=[numbers]):
            values = ast.literal_eval(numbers)
            ordered = [number for number in range(100) if number in values]
            return f"[{', '.join(map(str, ordered))}]"
        case ast.Call(func=ast.Name("list"), args=[ast.Constant(word)]):
            return "[" + ", ".join(f"'{letter}'" for letter in word) + "]"
        case ast.Call(func=ast.Name("max"), args=[numbers]):
            return next(str(n) for n in range(100, -1, -1) if n in ast.literal_eval(numbers))
        case ast.Call(func=ast.Attribute(ast.Constant(word), "upper"), args=[]):
            return "".join(chr(ord(letter) - 32) for letter in word)
        case ast.BinOp(ast.Constant(word), ast.Mult(), ast.Constant(2)):
            return word + word
    raise AssertionError(f"no rule for {code}")


def test_python_answers_are_what_the_expression_shows():
    forms = set()
    for row in of_kind("python"):
        _, code = row["instruction"].splitlines()
        assert row["answer"] == row["response"] == shown(code), row["id"]
        forms.add(re.sub(r"\[.*?\]|'\w+'", "_", code))
    assert forms == {"print(sorted(_))", "print(list(_))", "print(_.upper())", "print(_ * 2)", "print(max(_))"}
