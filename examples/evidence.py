"""Does a mixture help? Fit, judge and compare on real tasks, inside and outside of what was trained on.

    python examples/evidence.py DATA OUTPUT --parts maths,general,domains --seeds 0,1,2 --minutes 9

DATA is a folder of data sets, `NAME/train.jsonl` and so on. Everything is a step with an output of its own in OUTPUT:
what was done is not done again, and a step that runs out of time is interrupted and goes on where it stopped when the
same command is typed again. The first seed of every part comes before the second of any. A part's `tables.md` compares
the methods over the seeds that are done, which answer the same rows, and OUTPUT/tables.md has those of all parts;
OUTPUT/mixes.svg is a picture of those of the mixes:

    maths, general, domains   a fit by evidence with its controls, inside, outside, and across domains
    unlike                    the general mix, fitted with a few rows of the kinds that it meets outside
    kshot                     few examples of six targets: a choice among sixteen adapters, beside a random one
    recruit                   questions of five kinds to the base model and the domains' adapters
    influence                 rows chosen by gradients, by meaning, and at random, for a few that are aimed at
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from evidence_picture import Panel, picture
from evidence_rows import MIXES, TARGETS, UNLIKE
from evidence_steps import METHODS, PARTS, Plan, Step, fits, sides
from evidence_tables import PAIRS, PAPER, table, table_of_tasks

ROOM = 60  # seconds before the end in which no further step begins


def done_in_time(step: Step, end: float) -> bool:
    """Run a step until the end; one that runs out of time is interrupted and tells so."""
    process = subprocess.Popen((sys.executable, "-m", "coterie", *step.words))
    try:
        code = process.wait(timeout=max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()  # as Ctrl-C, which a shell in the background would keep from it
        process.wait()
        return False
    if code:
        sys.exit(f"this failed with {code}: coterie {' '.join(step.words)}")
    return True


def left(plan: Plan, parts: list[str]) -> list[Step]:
    """Write the rows of some parts, and return their steps that are not done yet, each once, seed by seed."""
    by_seed = [plan._replace(seeds=[seed]) for seed in plan.seeds]
    steps = {step.output: step for own in by_seed for part in parts for step in PARTS[part](own)}
    return [step for output, step in steps.items() if not output.exists()]


def evaluations(plan: Plan, path: Path) -> list[Path]:
    """Return the evaluations that are done, of the seeds whose numbers end a path."""
    return [own for seed in plan.seeds if (own := path.with_name(f"{path.name}-{seed}")).exists()]


def tables(plan: Plan, part: str) -> Iterator[str]:
    """Yield the tables of a part, over the seeds that are done."""
    for title, name, *how in compared(plan, part):
        if done := evaluations(plan, plan.output / part / name):
            yield table(title, done, *how)
    for count in plan.flags.shots.split(",") if part == "kshot" else ():
        places = {target: plan.output / part / target for target in plan.flags.targets.split(",")}
        found = {target: evaluations(plan, place / f"loss-test-{count}") for target, place in places.items()}
        if done := {target: folders for target, folders in found.items() if folders}:
            title = f"all targets, {count} shots alone, experts by their loss"
            yield table_of_tasks(title, done, "random-experts", ("best-by-shots",))


def _panels(plan: Plan, part: str) -> Iterator[Panel]:
    for side in sides(part, plan.flags.draw):
        if (done := evaluations(plan, plan.output / part / side)) and (panel := Panel.of(side, done)):
            yield panel


def compared(plan: Plan, part: str) -> Iterator[tuple[Any, ...]]:
    """Yield a part's tables: title, folder without the seed, control, and what else `table` is told."""
    if part in (*MIXES, "unlike"):
        for side in sides(UNLIKE) if part == "unlike" else sides(part, plan.flags.draw):
            paper = PAPER if (part, side) == ("maths", "inside") else {}
            yield f"{part}, {side}", side, "base", *((PAIRS, paper) if part in MIXES else ())
    if part == "domains":
        for side in ("inside", "crossing"):
            yield f"an adapter for each domain, {side}", f"tokens-{side}", "token-level:every=inf"
    if part == "kshot":
        for target, count in product(plan.flags.targets.split(","), plan.flags.shots.split(",")):
            published, *chosen = fits(int(count))[::-1]
            pairs = [(published, "best-tuned"), (published, "kshot-only")]
            pairs += [(name, rival) for name in chosen for rival in ("best-by-shots", published)]
            yield f"{target}, {count} shots", f"{target}/test-{count}", "random-experts", pairs
            title = f"{target}, {count} shots alone, experts by their loss"
            trained, *chosen = fits(int(count), alone=True)[::-1]
            pairs = [(name, "best-by-shots") for name in (trained, *chosen)] + [(name, trained) for name in chosen]
            yield title, f"{target}/loss-test-{count}", "random-experts", pairs
    if part == "recruit":
        yield part, "test", "best-single"
    if part == "influence":
        pairs = (("expert:adam", "expert:nearest"), ("expert:subspace", "expert:adam"))
        yield part, "test", "expert:random", pairs


def main() -> None:
    """Read the arguments, do what is left within the time, and write `tables.md` of what is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parts", default="maths", help=f"of {', '.join(PARTS)}, with commas")
    parser.add_argument(
        "--seeds", type=lambda text: [*map(int, text.split(","))], default="0", help="numbers with commas"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", type=int, default=300, help="rows that a mix is trained on, or chosen from")
    parser.add_argument("--test", type=int, default=300, help="rows of each test")
    parser.add_argument(
        "--draw", type=int, default=0, help="of the mixes' tests: 1, 2, ... are other rows than any before"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="that mixes are compared by, `base` among them")
    parser.add_argument("--targets", default=",".join(TARGETS), help="tasks of kshot")
    parser.add_argument("--shots", default="5,20,50", help="numbers of examples of kshot")
    parser.add_argument("--budget", type=int, default=60, help="rows that kshot gathers and influence chooses")
    parser.add_argument("--pool", type=int, default=4000, help="rows of open data that kshot gathers from")
    parser.add_argument("--answers", type=int, default=0, help="write answers of so many tokens, too; 0: none")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop then; the same command goes on")
    flags = parser.parse_args()
    plan = Plan(flags.data, flags.output, flags, flags.seeds)
    parts, end = flags.parts.split(","), time.monotonic() + 60 * flags.minutes
    if strange := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {strange[0]!r}; give some of {', '.join(PARTS)}")
    steps = left(plan, parts)
    undone = len(steps)
    for step in steps:
        print(f"step {len(steps) - undone + 1} of {len(steps)}: {step.output}", file=sys.stderr)
        if end - time.monotonic() < min(ROOM, 6 * flags.minutes) or not done_in_time(step, end):
            break
        undone -= 1
    for part in parts:
        if text := "\n".join(tables(plan, part)):
            (plan.output / part / "tables.md").write_text(text, encoding="utf-8")
            print(text)
    done = [file for part in PARTS if (file := plan.output / part / "tables.md").exists()]
    whole = "\n".join(file.read_text(encoding="utf-8") for file in done)
    (plan.output / "tables.md").write_text(whole, encoding="utf-8")
    mixes = {part: panels for part in parts if part in MIXES and (panels := list(_panels(plan, part)))}
    if mixes:
        (plan.output / "mixes.svg").write_text(picture(mixes), encoding="utf-8")
    if undone:
        sys.exit(f"{undone} steps are left: type the same command again")


if __name__ == "__main__":
    main()
