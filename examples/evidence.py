"""Does a mixture help? Fit, judge and compare on real tasks, inside and outside of what was trained on.

    python examples/evidence.py DATA OUTPUT --parts maths,general,domains --seeds 0,1,2 --minutes 9

DATA is a folder of data sets, `NAME/train.jsonl` and so on. Everything is a step with an output of its own in OUTPUT:
what was done is not done again, and a step that runs out of time is interrupted and goes on where it stopped when the
same command is typed again. When a part is done, its `tables.md` compares the methods over the seeds, which answer the
same rows, and OUTPUT/tables.md has those of all parts. The parts:

    maths, general, domains   a fit by evidence with its controls, inside, outside, and across domains
    kshot                     few examples of six targets: a choice among sixteen adapters, beside a random one
    recruit                   questions of five kinds to the base model and the domains' adapters
    influence                 rows chosen by gradients, by meaning, and at random, for a few that are aimed at
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from evidence_rows import MIXES, TARGETS
from evidence_steps import PARTS, Plan, Step, sides
from evidence_tables import PAIRS, PAPER, table

ROOM = 60  # seconds before the end in which no further step begins


def done_in_time(step: Step, end: float) -> bool:
    """Run a step until the end; one that runs out of time is interrupted and tells so."""
    process = subprocess.Popen((sys.executable, "-m", "coterie", *step.words))
    try:
        code = process.wait(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    if code:
        sys.exit(f"this failed with {code}: coterie {' '.join(step.words)}")
    return True


def left(plan: Plan, parts: list[str]) -> list[Step]:
    """Write the rows of some parts, and return their steps that are not done yet, each once."""
    steps = {step.output: step for part in parts for step in PARTS[part](plan)}
    return [step for output, step in steps.items() if not output.exists()]


def tables(plan: Plan, part: str) -> Iterator[str]:
    """Yield the tables of a part."""
    place = plan.output / part
    if part in MIXES:
        for side in sides(part):
            folders = [place / f"{side}-{seed}" for seed in plan.seeds]
            paper = PAPER if (part, side) == ("maths", "inside") else {}
            yield table(f"{part}, {side}", folders, "base", PAIRS, paper)
    if part == "domains":
        for side in ("inside", "crossing"):
            folders = [place / f"tokens-{side}-{seed}" for seed in plan.seeds]
            yield table(f"an adapter for each domain, {side}", folders, "token-level:every=inf")
    if part == "kshot":
        for target in plan.flags.targets.split(","):
            for count in plan.flags.shots.split(","):
                folders = [place / target / f"test-{count}-{seed}" for seed in plan.seeds]
                pairs = (("kshot-moe", "best-tuned"), ("kshot-moe", "kshot-only"))
                yield table(f"{target}, {count} shots", folders, "random-experts", pairs)
    for name, control in (("recruit", "best-single"), ("influence", "expert:random")):
        if part == name:
            pairs = (("expert:adam", "expert:nearest"), ("expert:subspace", "expert:adam"))
            yield table(part, [place / f"test-{seed}" for seed in plan.seeds], control, pairs)


def main() -> None:
    """Read the arguments, do what is left within the time, and write `tables.md` when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parts", default="maths", help=f"of {', '.join(PARTS)}, with commas")
    parser.add_argument("--seeds", default="0", help="numbers with commas")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", type=int, default=300, help="rows that a mix is trained on, or chosen from")
    parser.add_argument("--test", type=int, default=300, help="rows of each test")
    parser.add_argument("--targets", default=",".join(TARGETS), help="tasks of kshot")
    parser.add_argument("--shots", default="5,20,50", help="numbers of examples of kshot")
    parser.add_argument("--budget", type=int, default=60, help="rows that kshot gathers and influence chooses")
    parser.add_argument("--pool", type=int, default=4000, help="rows of open data that kshot gathers from")
    parser.add_argument("--answers", type=int, default=0, help="write answers of so many tokens, too; 0: none")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop then; the same command goes on")
    flags = parser.parse_args()
    plan = Plan(flags.data, flags.output, flags, [int(seed) for seed in flags.seeds.split(",")])
    parts, end = flags.parts.split(","), time.monotonic() + 60 * flags.minutes
    if strange := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {strange[0]!r}; give some of {', '.join(PARTS)}")
    steps = left(plan, parts)
    for number, step in enumerate(steps):
        print(f"step {number + 1} of {len(steps)}: {step.output}", file=sys.stderr)
        if end - time.monotonic() < min(ROOM, 6 * flags.minutes) or not done_in_time(step, end):
            sys.exit(f"{len(steps) - number} steps are left: type the same command again")
    for part in parts:
        text = "\n".join(tables(plan, part))
        (plan.output / part / "tables.md").write_text(text, encoding="utf-8")
        print(text)
    done = [file for part in PARTS if (file := plan.output / part / "tables.md").exists()]
    whole = "\n".join(file.read_text(encoding="utf-8") for file in done)
    (plan.output / "tables.md").write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    main()
