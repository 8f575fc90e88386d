"""Write the data of a bank of adapters, of target tasks and of an open pool, from a folder of data sets.

    python examples/task_bank.py FOLDER OUTPUT --train 160 --shots 50 --test 100 --longest 500

`train/NAME.jsonl` holds the rows that the adapter NAME is trained on (sixteen sets; creak, qasc and sensemaking are
parts of flan_cot). For every target, `TARGET/shots.jsonl` holds the first rows of that set's own training file, so that
the target's own adapter is a leak that can be found, and `TARGET/test.jsonl` rows of the set's held-out split.
`pool.jsonl` holds all rows of dolly and flan_cot that no adapter was trained on. Rows whose instruction and response
together are longer than `--longest` characters are left out.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

SETS = {
    "arc_challenge": "arc_challenge/train",
    "arc_easy": "arc_easy/train",
    "boolq": "boolq/train",
    "commonsenseqa": "commonsenseqa/train",
    "siqa": "siqa/train",
    "piqa": "piqa/validation",
    "medmcqa": "medmcqa/train",
    "mmlu": "mmlu/validation",
    "svamp": "svamp/train",
    "mawps": "mawps/train",
    "gsm8k": "gsm8k/train",
    "mathqa": "mathqa/train",
    "creak": "flan_cot/train",
    "qasc": "flan_cot/train",
    "sensemaking": "flan_cot/train",
    "dolly": "dolly/train",
}
TARGETS = {
    "arc_challenge": "arc_challenge/test",
    "commonsenseqa": "commonsenseqa/validation",
    "svamp": "svamp/test",
    "boolq": "boolq/validation",
}
POOL = ("dolly/train", "flan_cot/train")

Rows = list[dict[str, Any]]


def read(folder: Path, name: str, longest: int) -> Rows:
    """Read a file's short rows."""
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if len(row["instruction"]) + len(row["response"]) <= longest]


def write(file: Path, rows: Rows) -> None:
    """Write rows as JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=160)
    parser.add_argument("--shots", type=int, default=50)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--longest", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    taken: set[str] = set()
    for name, file in SETS.items():
        rows = read(arguments.folder, file, arguments.longest)
        own = [row for row in rows if row["category"] == name] if file.startswith("flan_cot") else rows
        drawn = random.Random(arguments.seed).sample(own, arguments.train)
        taken |= {row["id"] for row in drawn}
        write(arguments.output / "train" / f"{name}.jsonl", drawn)
        if name in TARGETS:
            write(arguments.output / name / "shots.jsonl", drawn[: arguments.shots])
    for name, file in TARGETS.items():
        rows = read(arguments.folder, file, arguments.longest)
        write(arguments.output / name / "test.jsonl", random.Random(arguments.seed).sample(rows, arguments.test))
    pool = [row for file in POOL for row in read(arguments.folder, file, arguments.longest) if row["id"] not in taken]
    write(arguments.output / "pool.jsonl", pool)


if __name__ == "__main__":
    main()
