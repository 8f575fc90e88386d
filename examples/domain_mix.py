"""Write one training file per domain, and a mixed test file, from a folder of data sets.

    python examples/domain_mix.py FOLDER OUTPUT --train 160 --test 25 --longest 700 --crossing 3

maths = gsm8k, science = arc_challenge, reading = squad_v2, code = codealpaca. SQuAD is split by article and CodeAlpaca
by drawing, since they bring no test split; ARC's and GSM8K's own test splits go to the test file alone. Rows whose
instruction and response together are longer than `--longest` characters are left out. `crossing.jsonl` holds requests
that cross domains: two held-out questions of different domains in one, answered one after the other, so many for every
ordered pair of domains.
"""

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

DOMAINS = {
    "maths": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"),
    "science": ("arc_challenge/train.jsonl", "arc_challenge/test.jsonl"),
    "reading": ("squad_v2/dev.jsonl", None),
    "code": ("codealpaca/train.jsonl", None),
}

Rows = list[dict[str, Any]]


def read(file: Path, longest: int) -> Rows:
    """Read a file's short rows."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    return [row for row in rows if len(row["instruction"]) + len(row["response"]) <= longest]


def halves(rows: Rows, generator: random.Random) -> tuple[Rows, Rows]:
    """Split rows so that no category (an article) stands on both sides; rows without one are split one by one."""
    groups = sorted({row["category"] or row["id"] for row in rows})
    held_out = set(generator.sample(groups, max(1, len(groups) // 3)))
    sides: tuple[Rows, Rows] = ([], [])
    for row in rows:
        sides[(row["category"] or row["id"]) in held_out].append(row)
    return sides


def write(file: Path, rows: Rows) -> None:
    """Write rows as JSONL."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def crossing(by_domain: dict[str, Rows], each: int) -> Rows:
    """Join questions of two domains, and their answers, for every ordered pair of domains."""
    found: Rows = []
    for one, other in itertools.permutations(by_domain, 2):
        for first, second in zip(by_domain[one][:each], by_domain[other][-each:], strict=True):
            found.append(
                {
                    "id": f"{first['id']}+{second['id']}",
                    "source": f"{one}+{other}",
                    "instruction": f"Do two things.\n\nFirst: {first['instruction']}\n\nThen: {second['instruction']}",
                    "response": f"{first['response']}\n\n{second['response']}",
                }
            )
    return found


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=160)
    parser.add_argument("--test", type=int, default=25)
    parser.add_argument("--longest", type=int, default=700)
    parser.add_argument("--crossing", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Rows] = {}
    for domain, (train, test) in DOMAINS.items():
        generator = random.Random(arguments.seed)
        rows = read(arguments.folder / train, arguments.longest)
        learnt, held_out = (rows, read(arguments.folder / test, arguments.longest)) if test else halves(rows, generator)
        write(arguments.output / f"{domain}.jsonl", generator.sample(learnt, arguments.train))
        drawn[domain] = generator.sample(held_out, arguments.test)
    write(arguments.output / "mixed.jsonl", [row for rows in drawn.values() for row in rows])
    write(arguments.output / "crossing.jsonl", crossing(drawn, arguments.crossing))


if __name__ == "__main__":
    main()
