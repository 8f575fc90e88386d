"""The rows of the evidence: which data sets each part is trained and tested on, and how they are drawn."""

import json
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from domain_mix import crossing
from task_bank import SETS

Rows = list[dict[str, Any]]


class Mix(NamedTuple):
    """Data sets to train on, sets like them and unlike them to test on, and the longest row in characters."""

    train: Mapping[str, str]
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    longest: int = 420
    crosses: bool = False


MATHS = ("math", "gsm8k", "svamp", "mathqa")
MIXES = {
    "maths": Mix(
        {name: f"{name}/train" for name in MATHS},
        {name: f"{name}/test" for name in MATHS},
        {"boolq": "boolq/validation", "arc_challenge": "arc_challenge/test", "dolly": "dolly/train"},
    ),
    "general": Mix(
        {
            **{"dolly": "dolly/train", "flan_cot": "flan_cot/train", "arc_challenge": "arc_challenge/train"},
            **{"boolq": "boolq/train", "commonsenseqa": "commonsenseqa/train", "codealpaca": "codealpaca/train"},
        },
        {
            **{"dolly": "dolly/train", "flan_cot": "flan_cot/train", "arc_challenge": "arc_challenge/test"},
            **{"boolq": "boolq/validation", "commonsenseqa": "commonsenseqa/validation"},
            "codealpaca": "codealpaca/train",
        },
        {"mmlu": "mmlu/test", "bbh": "bbh/test"},
    ),
    "domains": Mix(
        {
            **{"maths": "gsm8k/train", "science": "arc_challenge/train"},
            **{"reading": "squad_v2/dev", "code": "codealpaca/train"},
        },
        {
            **{"maths": "gsm8k/test", "science": "arc_challenge/test"},
            **{"reading": "squad_v2/dev", "code": "codealpaca/train"},
        },
        {"boolq": "boolq/validation", "dolly": "dolly/train", "mmlu": "mmlu/test"},
        longest=700,
        crosses=True,
    ),
}
"""By part. Rows that were trained on are never tested, nor is any passage of an article that was."""
TARGETS = {
    "arc_challenge": "arc_challenge/test",
    "arc_easy": "arc_easy/test",
    "boolq": "boolq/validation",
    "piqa": "piqa/validation",
    "gsm8k": "gsm8k/test",
    "svamp": "svamp/test",
}
"""The tasks of k-shot learning, and their tests: those of the paper (arXiv 2408.15915) with SVAMP in place of MBPP."""
POOL = ("dolly/train", "flan_cot/train")
SKILLS = {
    "commonsenseqa": ("commonsenseqa/train", "commonsenseqa/validation"),
    "arc_challenge": ("arc_challenge/train", "arc_challenge/test"),
    "svamp": ("svamp/train", "svamp/test"),
    "boolq": ("boolq/train", "boolq/validation"),
    "medmcqa": ("medmcqa/train", "medmcqa/test"),
}
"""The tasks of recruiting: what experts are profiled on, and tested on."""
UNLIKE, UNLIKE_ROWS = "general", 60
"""The mix whose refusal is told rows from outside, and how many of these are given; its runs tell influence."""
AIM, AIMED = "commonsenseqa", 20
"""The set that rows are chosen for by influence, and how many of its rows are known."""
BANK_ROWS, LONGEST, ALL = 160, 500, 10**9  # rows of every adapter of the bank; characters of a row; rows of a file


def group(row: Mapping[str, Any]) -> str:
    """Return what stands on one side only: the article of a question about a passage, else the question."""
    return f"article {row['category']}" if row["id"].startswith("squad_v2/") else row["instruction"]


def draw(data: Path, file: str, count: int, longest: int, seed: int, without: Collection[str] = ()) -> Rows:
    """Draw short rows of a file, none of whose group is among `without`; all of them where there are no more."""
    short = [row for row in read(data / f"{file}.jsonl") if len(row["instruction"]) + len(row["response"]) <= longest]
    new = [row for row in short if group(row) not in without]
    return random.Random(seed).sample(new, min(count, len(new)))


def draw_evenly(
    data: Path, files: Mapping[str, str], count: int, longest: int, seed: int, without: Collection[str]
) -> Rows:
    """Draw rows evenly over sets, which become their sources, in a random order."""
    drawn = [
        {**row, "source": name}
        for name in sorted(files)
        for row in draw(data, files[name], count // len(files), longest, seed, without)
    ]
    random.Random(seed).shuffle(drawn)
    return drawn


def read(file: Path) -> Rows:
    """Read rows of JSONL, in whose texts other line ends may stand."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def write(file: Path, rows: Rows) -> None:
    """Write rows as JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def named(side: str, draw: int) -> str:
    """Return the name of a mix's test rows on a side: those of the first draw have the side's own."""
    return f"{side}-draw{draw}" if draw else side


def write_mix(data: Path, place: Path, mix: Mix, seeds: Sequence[int], train: int, test: int, draw: int = 0) -> None:
    """Write the test rows of a mix, the same for all seeds, then each seed's training rows.

    Test rows of another draw are written last, of what is neither among the first tests nor trained on by a seed.
    """
    known = _write_tests(data, place, mix, test, 0, set())
    trained: set[str] = set()
    for seed in seeds:
        rows = draw_evenly(data, mix.train, train, mix.longest, seed, known)
        trained |= {group(row) for row in rows}
        write(place / f"train-{seed}.jsonl", rows)
        if mix.crosses:
            for name in mix.train:
                write(place / f"train-{seed}" / f"{name}.jsonl", [row for row in rows if row["source"] == name])
    if draw:
        _write_tests(data, place, mix, test, draw, known | trained)


def _write_tests(data: Path, place: Path, mix: Mix, test: int, draw: int, known: set[str]) -> set[str]:
    """Write test rows of which no group is known yet; return the groups that are known then."""
    for side in ("inside", "outside"):
        rows = draw_evenly(data, getattr(mix, side), test, mix.longest, draw, known)
        known = known | {group(row) for row in rows}
        write(place / f"{named(side, draw)}.jsonl", rows)
        if mix.crosses and side == "inside":
            by_domain = {name: [row for row in rows if row["source"] == name] for name in mix.inside}
            write(place / f"{named('crossing', draw)}.jsonl", crossing(by_domain, max(1, test // 25)))
    return known


def write_unlike(data: Path, place: Path, mix: Path, seeds: Sequence[int]) -> None:
    """Write rows of the kinds that a mix meets outside, none of which is among its tests."""
    tested = {group(row) for row in read(mix / "outside.jsonl")}
    for seed in seeds:
        rows = draw_evenly(data, MIXES[UNLIKE].outside, UNLIKE_ROWS, MIXES[UNLIKE].longest, seed, tested)
        write(place / f"unlike-{seed}.jsonl", rows)


def write_kshot(data: Path, place: Path, counts: Sequence[int], seeds: Sequence[int], test: int, pool: int) -> None:
    """Write what the bank's adapters are trained on, every target's shots and tests, and the open pool.

    A target's shots are of the rows that its own adapter knows, so that this one is a leak that can be found.
    """
    known: dict[str, Rows] = {}
    for name, file in SETS.items():
        rows = draw(data, file, ALL, LONGEST, 0)
        own = [row for row in rows if row["category"] == name] if file.startswith("flan_cot") else rows
        known[name] = own[:BANK_ROWS]
        write(place / "bank-rows" / f"{name}.jsonl", known[name])
    without = {group(row) for rows in known.values() for row in rows}
    for name, file in TARGETS.items():
        tests = draw(data, file, test, LONGEST, 0, without)
        write(place / name / "test.jsonl", tests)
        without |= {group(row) for row in tests}
        for seed in seeds:
            order = random.Random(seed).sample(known[name], len(known[name]))
            for count in counts:
                write(place / name / f"shots-{count}-{seed}.jsonl", order[:count])
    write(place / "pool.jsonl", [row for file in POOL for row in draw(data, file, pool // 2, LONGEST, 0, without)])


def write_skills(data: Path, place: Path, count: int) -> None:
    """Write questions to profile experts on, and others to test them on."""
    parts: tuple[Rows, Rows] = ([], [])
    for name, files in SKILLS.items():
        for rows, file in zip(parts, files, strict=True):
            rows.extend({**row, "source": name} for row in draw(data, file, count // len(SKILLS), LONGEST, 0))
    write(place / "profile.jsonl", parts[0])
    write(place / "test.jsonl", parts[1])


def write_influence(data: Path, place: Path, mix: Path, seeds: Sequence[int], test: int, many: int, few: int) -> None:
    """Write the rows that are aimed at, their test, many rows of all sets to choose from, and a few random ones.

    None of them is among the rows that the mix's runs were trained on.
    """
    sets = MIXES[UNLIKE]
    tests = draw(data, sets.inside[AIM], test, sets.longest, 1)
    write(place / "test.jsonl", tests)
    for seed in seeds:
        without = {group(row) for row in [*tests, *read(mix / f"train-{seed}.jsonl")]}
        aimed = draw(data, sets.train[AIM], AIMED, sets.longest, seed, without)
        write(place / f"aimed-{seed}.jsonl", aimed)
        without |= {group(row) for row in aimed}
        rows = draw_evenly(data, sets.train, many, sets.longest, seed, without)
        write(place / f"many-{seed}.jsonl", rows)
        write(place / f"random-{seed}.jsonl", random.Random(seed).sample(rows, few))
