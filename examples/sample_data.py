r"""Write the sample data: short instructions of five kinds, each with one checkable answer.

    python examples/sample_data.py --seed 0 --train 150 --test 60

The kinds differ in what they ask and in how they are answered, so that a mixture has something to route:

    maths     a word problem with one step             3 * 4 = \boxed{12}
    choices   which of three words is of a category    The answer is (B).
    grammar   a sentence to put in the past tense      Anna walked to the park.
    spelling  a word to spell                          r i v e r
    python    what an expression prints                [1, 4, 7]

Every answer is right by construction, no instruction comes twice, and the same seed and sizes give the same bytes.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Laura", "Mark")
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "toys")

# No word fits two of the categories: an orange would be a fruit and a colour.
CATEGORIES = {
    "an animal": ("horse", "rabbit", "tiger", "sheep", "monkey", "camel", "zebra", "mouse", "donkey", "goat"),
    "a fruit": ("apple", "banana", "grape", "mango", "pear", "melon", "papaya", "cherry", "lemon", "apricot"),
    "a tool": ("hammer", "wrench", "shovel", "rake", "chisel", "pliers", "screwdriver", "axe", "crowbar", "spanner"),
    "a vehicle": ("car", "bus", "train", "truck", "tram", "bicycle", "taxi", "tractor", "scooter", "wagon"),
    "clothing": ("shirt", "jacket", "sock", "skirt", "scarf", "glove", "coat", "sweater", "trousers", "blouse"),
    "part of the body": ("arm", "nose", "elbow", "knee", "shoulder", "finger", "ankle", "ear", "thumb", "neck"),
    "an instrument": ("piano", "violin", "flute", "guitar", "trumpet", "drum", "harp", "cello", "banjo", "tuba"),
    "a building": ("castle", "school", "church", "museum", "hospital", "library", "barn", "hotel", "theatre", "mosque"),
}

# Verb now, verb then, and how the sentence goes on.
DEEDS = (
    ("bakes", "baked", "a cake"),
    ("calls", "called", "a friend"),
    ("carries", "carried", "the bag"),
    ("cleans", "cleaned", "the kitchen"),
    ("closes", "closed", "the window"),
    ("cooks", "cooked", "soup"),
    ("counts", "counted", "the stars"),
    ("drops", "dropped", "the keys"),
    ("fixes", "fixed", "the bike"),
    ("helps", "helped", "a neighbour"),
    ("jumps", "jumped", "over the fence"),
    ("kicks", "kicked", "the ball"),
    ("likes", "liked", "the song"),
    ("moves", "moved", "the chair"),
    ("opens", "opened", "the door"),
    ("paints", "painted", "the wall"),
    ("picks", "picked", "a flower"),
    ("plans", "planned", "a trip"),
    ("plays", "played", "the drums"),
    ("pushes", "pushed", "the cart"),
    ("stops", "stopped", "at the corner"),
    ("studies", "studied", "the map"),
    ("visits", "visited", "the museum"),
    ("walks", "walked", "to the park"),
    ("washes", "washed", "the car"),
    ("watches", "watched", "a film"),
)


class Draft(NamedTuple):
    """One instruction with the response to learn and the answer that a grader looks for in it."""

    instruction: str
    response: str
    answer: str


def draw_maths(random: Random) -> Draft:
    """Draw a word problem of one multiplication, addition or subtraction."""
    name, things = random.choice(NAMES), random.choice(THINGS)
    match random.choice("*+-"):
        case "*":
            first, second = random.randint(2, 9), random.randint(2, 9)
            text = f"A shop sells {things} at {first} dollars each. How many dollars do {second} {things} cost?"
            sign, result = "*", first * second
        case "+":
            first, second = random.randint(2, 20), random.randint(2, 9)
            text = f"{name} has {first} {things} and gets {second} more. How many {things} does {name} have now?"
            sign, result = "+", first + second
        case _:
            first, second = random.randint(10, 20), random.randint(2, 9)
            text = f"{name} had {first} {things} and gave {second} away. How many {things} are left?"
            sign, result = "-", first - second
    return Draft(text, f"{first} {sign} {second} = \\boxed{{{result}}}", str(result))


def draw_choices(random: Random) -> Draft:
    """Draw three words of three categories and ask which one is of the first."""
    asked, *others = random.sample(sorted(CATEGORIES), 3)
    right = random.choice(CATEGORIES[asked])
    options = [right, *(random.choice(CATEGORIES[category]) for category in others)]
    random.shuffle(options)
    letter = "ABC"[options.index(right)]
    lines = "\n".join(f"({label}) {option}" for label, option in zip("ABC", options, strict=True))
    return Draft(f"Which of these is {asked}?\nOptions:\n{lines}", f"The answer is ({letter}).", letter)


def draw_grammar(random: Random) -> Draft:
    """Draw a sentence in the present tense to be put in the past."""
    name = random.choice(NAMES)
    now, then, rest = random.choice(DEEDS)
    past = f"{name} {then} {rest}."
    return Draft(f"Put this in the past tense: {name} {now} {rest}.", past, past)


def draw_spelling(random: Random) -> Draft:
    """Draw a word to be spelled with a space after each letter."""
    word = random.choice([word for category in sorted(CATEGORIES) for word in CATEGORIES[category]])
    spelled = " ".join(word)
    return Draft(f"Spell the word {word}, one letter at a time.", spelled, spelled)


def draw_python(random: Random) -> Draft:
    """Draw a Python expression over small numbers or a short word; the answer is what it prints."""
    numbers = random.sample(range(10), 3)
    short = random.choice([word for words in CATEGORIES.values() for word in words if len(word) <= 4])
    code, value = random.choice(
        [
            (f"sorted({numbers})", sorted(numbers)),
            (f"list('{short}')", list(short)),
            (f"'{short}'.upper()", short.upper()),
            (f"'{short}' * 2", short * 2),
            (f"max({numbers})", max(numbers)),
        ]
    )
    return Draft(f"What does this Python line show?\nprint({code})", str(value), str(value))


KINDS: dict[str, Callable[[Random], Draft]] = {
    "maths": draw_maths,
    "choices": draw_choices,
    "grammar": draw_grammar,
    "spelling": draw_spelling,
    "python": draw_python,
}


def distinct(draw: Callable[[Random], Draft], random: Random) -> Iterator[Draft]:
    """Yield drafts whose instructions have not come before.

    Raises:
        ValueError: ten thousand draws in a row brought nothing new, so the kind has nothing left to give.
    """
    seen: set[str] = set()
    misses = 0
    while misses < 10_000:
        draft = draw(random)
        misses = misses + 1 if draft.instruction in seen else 0
        if not misses:
            seen.add(draft.instruction)
            yield draft
    kind = draw.__name__.removeprefix("draw_")
    raise ValueError(f"the kind {kind!r} has only {len(seen)} different instructions; ask for fewer rows")


def make_rows(sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Make the rows of each split: kinds in equal parts (the first get what is left over), order shuffled.

    Each kind draws from a stream of its own, split after split, so no instruction stands in two splits.
    """
    drafts = {kind: distinct(draw, Random(f"{seed} {kind}")) for kind, draw in KINDS.items()}
    splits = {}
    for split, size in sizes.items():
        kinds = [list(KINDS)[number % len(KINDS)] for number in range(size)]
        Random(f"{seed} order of {split}").shuffle(kinds)
        splits[split] = [
            {"id": f"{split}-{number:03d}", "source": kind, **next(drafts[kind])._asdict()}
            for number, kind in enumerate(kinds)
        ]
    return splits


def main() -> None:
    """Read the command line and write one JSONL file for each split."""
    parser = argparse.ArgumentParser(description="Write the sample data: train.jsonl and test.jsonl.")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other rows (default: %(default)s)")
    parser.add_argument("--train", type=int, default=150, help="rows to train on (default: %(default)s)")
    parser.add_argument("--test", type=int, default=60, help="rows to test on (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data", help="folder (default: data)")
    arguments = parser.parse_args()

    try:
        splits = make_rows({"train": arguments.train, "test": arguments.test}, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = arguments.output / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
