"""Does a mixture help? Fit, judge and compare on mixes of real tasks, inside and outside of what was trained on.

    python examples/evidence.py DATA OUTPUT --mix maths --seeds 0,1,2 --train 300 --test 300 --minutes 9

DATA is a folder of data sets, `NAME/train.jsonl` and so on. Everything is a step with an output of its own in OUTPUT:
what was done is not done again, and a step that runs out of time is interrupted and goes on where it stopped when the
same command is typed again. When all is done, one table for each mix tells how the methods differ from the base
adapter, over the seeds and for each, and which share of the oracle's gain they have. All seeds answer the same rows.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MATHS = ("math", "gsm8k", "svamp", "mathqa")
MIXES: dict[str, dict[str, dict[str, str]]] = {
    "maths": {
        "train": {name: f"{name}/train" for name in MATHS},
        "inside": {name: f"{name}/test" for name in MATHS},
        "outside": {"boolq": "boolq/validation", "arc_challenge": "arc_challenge/test", "dolly": "dolly/train"},
    },
    "general": {
        "train": {
            **{"dolly": "dolly/train", "flan_cot": "flan_cot/train", "arc_challenge": "arc_challenge/train"},
            **{"boolq": "boolq/train", "commonsenseqa": "commonsenseqa/train", "codealpaca": "codealpaca/train"},
        },
        "inside": {
            **{"dolly": "dolly/train", "flan_cot": "flan_cot/train", "arc_challenge": "arc_challenge/test"},
            **{"boolq": "boolq/validation", "commonsenseqa": "commonsenseqa/validation"},
            "codealpaca": "codealpaca/train",
        },
        "outside": {"mmlu": "mmlu/test", "bbh": "bbh/test"},
    },
}
"""By mix: what is trained on, what is like it, and what is not. Rows that were trained on are never tested."""
METHODS = (
    *("backbone", "base", "one-lora-same-budget", "random-weights", "random-cluster", "uniform-weights"),
    *("elrea", "elrea-refusing", "membership-routing", "loss-routing", "loss-routing:caution=off", "prefill", "auto"),
)
FIT = ("--clusters", "4", "--cluster-rounds", "1", "--system-prompt", "")
ROOM = 60  # seconds before the end in which no further step begins

Rows = list[dict[str, Any]]


class Step(NamedTuple):
    """A command, and the path that is there when it is done."""

    command: tuple[str, ...]
    output: Path


def rows_of(data: Path, files: dict[str, str], count: int, longest: int, seed: int, without: frozenset[str]) -> Rows:
    """Draw `count` short rows, evenly over the sets; none whose question is among `without`."""
    drawn: Rows = []
    for name in sorted(files):
        lines = (data / f"{files[name]}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{**json.loads(line), "source": name} for line in lines]
        fit = [row for row in rows if len(row["instruction"]) + len(row["response"]) <= longest]
        new = [row for row in fit if row["instruction"] not in without]
        drawn += random.Random(seed).sample(new, count // len(files))
    random.Random(seed).shuffle(drawn)
    return drawn


def write_rows(arguments: argparse.Namespace, mix: str, seeds: Sequence[int]) -> None:
    """Write the test rows of a mix, the same for all seeds, then each seed's training rows."""
    place = arguments.output / mix
    place.mkdir(parents=True, exist_ok=True)
    tested: set[str] = set()
    parts = [(side, arguments.test, 0) for side in ("inside", "outside")]
    for side, count, seed in [*parts, *((f"train-{seed}", arguments.train, seed) for seed in seeds)]:
        files = MIXES[mix][side.partition("-")[0]]
        rows = rows_of(arguments.data, files, count, arguments.longest, seed, frozenset(tested))
        tested |= {row["instruction"] for row in rows} if side in ("inside", "outside") else set()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (place / f"{side}.jsonl").write_text(text, encoding="utf-8")


def steps(arguments: argparse.Namespace, mix: str, seeds: Sequence[int]) -> Iterator[Step]:
    """Yield a mix's steps: for each seed a fit, each control by itself, and an evaluation on either side."""
    place, coterie = arguments.output / mix, (sys.executable, "-m", "coterie")
    for seed in seeds:
        run = place / f"run-{seed}"
        what = ("--model", arguments.model, "--data", str(place / f"train-{seed}.jsonl"), "--seed", str(seed))
        yield Step((*coterie, "fit", "auto", *what, "--output", str(run), *FIT), run)
        for method, extra in (
            ("one-lora-same-budget", "one-lora"),
            ("random-weights", "random-weights"),
            ("random-cluster", "random-clusters"),
        ):
            yield Step((*coterie, "train-extras", str(run), "--methods", method), run / "methods" / extra)
        for side in ("inside", "outside"):
            output = place / f"{side}-{seed}"
            methods = ",".join((*METHODS, "oracle"))
            rows = ("--data", str(place / f"{side}.jsonl"), "--output", str(output))
            told = ("--methods", methods, "--control", "base", "--no-generate")
            yield Step((*coterie, "eval", str(run), *rows, *told), output)


def done_in_time(step: Step, end: float) -> bool:
    """Run a step until the end; one that runs out of time is interrupted and tells so."""
    process = subprocess.Popen(step.command)
    try:
        code = process.wait(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    if code:
        sys.exit(f"this failed with {code}: {' '.join(step.command)}")
    return True


def table(place: Path, side: str, seeds: Sequence[int]) -> str:
    """Return the table of one mix and side."""
    import coterie
    from coterie.records.files import read_summary

    folders = [place / f"{side}-{seed}" for seed in seeds]
    lines = [f"## {place.name}, {side}, {len(seeds)} seeds", ""]
    if len(folders) > 1:
        lines += [coterie.format_spread(coterie.read_spread(folders)), ""]
    for seed, folder in zip(seeds, folders, strict=True):
        for row in read_summary(folder).table:
            if row.source != "all" or row.method == "base":
                continue
            ends = "[{:+.4f}, {:+.4f}]".format(*row.nll_interval) if row.nll_interval else ""
            share = "" if row.oracle_share is None else f"{100 * row.oracle_share:.0f}% of the oracle's gain"
            p = "" if row.nll_p is None else f"p {row.nll_p:.3f}"
            lines.append(f"seed {seed}  {row.method:26} {row.nll_difference or 0:+.4f} {ends:20} {p:8} {share}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the arguments, do what is left within the time, and write `tables.md` when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mix", default="maths", help=f"of {', '.join(MIXES)}, or several with commas")
    parser.add_argument("--seeds", default="0", help="numbers with commas")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--longest", type=int, default=420, help="characters of a row")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop then; the same command goes on")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    mixes, end = arguments.mix.split(","), time.monotonic() + 60 * arguments.minutes
    for mix in mixes:
        write_rows(arguments, mix, seeds)
    left = [step for mix in mixes for step in steps(arguments, mix, seeds) if not step.output.exists()]
    for number, step in enumerate(left):
        print(f"step {number + 1} of {len(left)}: {step.output}", file=sys.stderr)
        if end - time.monotonic() < min(ROOM, 6 * arguments.minutes) or not done_in_time(step, end):
            sys.exit(f"{len(left) - number} steps are left: type the same command again")
    tables = "\n".join(table(arguments.output / mix, side, seeds) for mix in mixes for side in ("inside", "outside"))
    (arguments.output / "tables.md").write_text(tables, encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    main()
