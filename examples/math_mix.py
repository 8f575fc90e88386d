"""Write an even mix of short rows of several sources, train and test, from a folder with train.jsonl and test.jsonl.

    python examples/math_mix.py FOLDER OUTPUT --train 600 --test 200 --longest 420

Rows whose instruction and response together are longer than `--longest` characters are left out, so that a run on two
CPU cores ends within an hour; rows are drawn with a seed, evenly over the sources.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path


def draw(file: Path, count: int, longest: int, generator: random.Random) -> list[str]:
    """Draw `count` short rows of a JSONL file, evenly over its sources, and return their lines shuffled."""
    by_source = defaultdict(list)
    for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        row = json.loads(line)
        if len(row["instruction"]) + len(row["response"]) <= longest:
            by_source[row["source"]].append(line)
    each = count // len(by_source)
    drawn = [line for source in sorted(by_source) for line in generator.sample(by_source[source], each)]
    generator.shuffle(drawn)
    return drawn


def main() -> None:
    """Read the arguments and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--longest", type=int, default=420)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", arguments.train), ("test", arguments.test)):
        lines = draw(arguments.folder / f"{split}.jsonl", count, arguments.longest, generator)
        (arguments.output / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
