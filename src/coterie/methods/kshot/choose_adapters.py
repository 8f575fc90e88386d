"""Adapters of a bank for a task of which a few examples are known (arXiv 2408.15915, algorithm 1).

Adapters are loaded some at a time, and those that are loaded answer and are scored together; with successive halving,
as LORAUTER (arXiv 2601.21795) does for banks of hundreds, most of them see a few shots only.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coterie.artifacts import JsonCache, check_output, read_json, run_folder, write_json, write_jsonl
from coterie.data.examples import Example
from coterie.errors import CoterieError
from coterie.experts.adapter_selection import (
    AdapterGroup,
    Ranked,
    ShotScores,
    agreement,
    groups,
    halving_rounds,
    ranked,
    similarities,
)
from coterie.experts.answering import Question, Reply
from coterie.experts.bank import load_bank
from coterie.experts.bank_folder import BankFolder, leaks
from coterie.grading.grade import is_right
from coterie.methods.kshot.rationales import with_rationales
from coterie.methods.kshot.task import Task, load_shots, open_task
from coterie.mixture.local_answers import LocalAnswerer
from coterie.mixture.scoring import answer_positions
from coterie.settings.commands import KshotSettings, SelectSettings
from coterie.settings.groups import SamplingSettings, SelectAdaptersSettings
from coterie.settings.reading import from_flat

logger = logging.getLogger(__name__)

SELECTION_FILE = "selection.json"
SCORES_FILE = "scores.jsonl"
GROUPS_KEPT = 20


@dataclass(frozen=True)
class Selected:
    """Which adapters were chosen, and why.

    Attributes:
        record: what `selection.json` holds.
        scores: what `scores.jsonl` holds: every adapter's answer to every shot that it saw.
    """

    record: dict[str, Any]
    scores: list[dict[str, Any]]

    @property
    def chosen(self) -> list[str]:
        """Names of the chosen adapters, best first."""
        return list(self.record["chosen"])

    def __str__(self) -> str:
        width = max(len(row["name"]) for row in self.record["adapters"])
        head = f"{'adapter':{width}}  right  perplexity  ranks  chosen"
        return "\n".join([head, *(_line(row, width) for row in self.record["adapters"])])


def _line(row: dict[str, Any], width: int) -> str:
    if row["rank_sum"] is None:
        reason = "knows shots or excluded rows" if row["dropped"] == "leak" else "left out by halving"
        return f"{row['name']:{width}}  {reason}"
    right = "     -" if row["accuracy"] is None else f"{row['accuracy']:6.0%}"
    perplexity = "-" if row["perplexity"] is None else f"{row['perplexity']:.3f}"
    mark = "*" if row["chosen"] else ""
    return f"{row['name']:{width}} {right}  {perplexity:>10}  {row['rank_sum']:5}  {mark}"


@dataclass(frozen=True)
class Scoring:
    """What adapters are scored with.

    Attributes:
        task: the bank and the shots.
        rationales: the shots with the responses whose perplexity counts.
        settings: how adapters are chosen.
        cached: keeps what was scored for another try.
    """

    task: Task
    rationales: Sequence[Example]
    settings: SelectAdaptersSettings
    cached: JsonCache


def select(folder: str | Path, shots: str | list[str], *, output: str | Path, **settings: Any) -> Selected:  # noqa: ANN401
    """Choose adapters of a bank for a task of which a few examples are known (arXiv 2408.15915, algorithm 1).

    Args:
        folder: the bank.
        shots: the task's examples: a JSONL file or `datasets` source, or several.
        output: folder to write `selection.json` and `scores.jsonl` to.
        **settings: fields of `SelectSettings` and its groups by their plain names, such as keep=4 or halving=5.

    Raises:
        CoterieError: for bad data or settings, a bank without enough adapters, or an output folder that exists.
    """
    sources = [shots] if isinstance(shots, str) else list(shots)
    flat = {"folder": str(folder), "shots": sources, "output": str(output), **settings}
    return select_adapters(from_flat(SelectSettings, flat))


def select_adapters(settings: SelectSettings) -> Selected:
    """Choose adapters of a bank, and write the choice into the output folder; an interrupted run goes on.

    Raises:
        CoterieError: for bad data, a bank without enough adapters, or an output folder that exists.
    """
    output = Path(settings.output)
    check_output(output, overwrite=settings.overwrite)
    data = load_shots(settings.shots, settings.adapters.exclude, settings.limit)
    task = open_task(settings.folder, data, settings.placement, settings.system_prompt)
    with run_folder(output, "select", settings.model_dump(), task.inputs()) as run:
        return select_into(run.path, task, settings, run.cached)


def select_into(folder: Path, task: Task, settings: SelectSettings | KshotSettings, cached: JsonCache) -> Selected:
    """Choose adapters, also as a part of a longer run, and write `selection.json` and `scores.jsonl` into its folder.

    Raises:
        CoterieError: as `select_adapters`.
    """
    batch = settings.adapters.scoring_batch_size
    rationales = with_rationales(task.shots, settings.rationale, settings.placement, batch)
    selected = choose(Scoring(task, rationales, settings.adapters, cached))
    write_jsonl(folder / SCORES_FILE, selected.scores)
    write_json(folder / SELECTION_FILE, selected.record)
    return selected


def choose(scoring: Scoring) -> Selected:
    """Score the bank's adapters on the shots and choose the group to keep.

    Raises:
        CoterieError: when too few adapters are left, or no shot can be graded though accuracy counts.
    """
    settings, task = scoring.settings, scoring.task
    bank = task.bank
    known = leaks(bank, [*task.shots, *task.excluded])
    _tell_leaks(known, excluded=settings.exclude_leaks)
    names = [name for name in bank.names if not (settings.exclude_leaks and name in known)]
    if len(names) < settings.keep:
        raise CoterieError(
            f"{bank.path} has {len(names)} adapters to choose from, fewer than --keep {settings.keep}; "
            "add adapters with coterie bank add, or lower --keep"
        )
    found = _halved(scoring, names)
    candidates = found.order[: max(settings.keep, settings.candidates)]
    adapters = load_bank({one.name: bank.folder_of(one.name) for one in candidates}, task.backbone.model).adapters
    likeness = similarities(adapters, "factors" if settings.diversity == "factors" else "updates")
    best = groups(candidates, likeness, settings.keep, diverse=settings.diversity != "none")
    places = {one.name: place for place, one in enumerate(candidates)}
    near = _similarity_to(best[0], likeness, places)
    record = {
        "settings": settings.model_dump(exclude={"exclude"}),
        "shots": len(task.shots),
        "chosen": list(best[0].names),
        "adapters": [
            *(_scored_row(one, near, best[0], bank, known, found) for one in found.order),
            *(_dropped_row(name, bank, known, found, by="halving") for name in names if name not in found.names),
            *(_dropped_row(name, bank, known, found, by="leak") for name in bank.names if name not in names),
        ],
        "subsets": [_group_row(group) for group in best[:GROUPS_KEPT]],
        "halving": found.rounds,
    }
    return Selected(record, found.answers)


def _tell_leaks(known: dict[str, int], *, excluded: bool) -> None:
    for name, count in known.items():
        done = "is left out" if excluded else "takes part; add --exclude-leaks to leave it out"
        logger.warning("%s was trained on %d of the shots and excluded rows and %s", name, count, done)


# ---------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class _Found:
    """What scoring gave: the adapters that saw all shots, best first, and what became of the others."""

    order: list[Ranked]
    nll: dict[str, float]
    rounds: list[dict[str, Any]]
    answers: list[dict[str, Any]]

    @property
    def names(self) -> set[str]:
        """Adapters that saw all shots."""
        return {one.name for one in self.order}


def _halved(scoring: Scoring, names: Sequence[str]) -> _Found:
    """Score adapters round by round; every round goes on with the better part of them and with more shots."""
    settings = scoring.settings
    alive = sorted(names)
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in alive}
    least = max(settings.keep, settings.candidates)
    plan = halving_rounds(len(alive), len(scoring.task.shots), settings.halving, least)
    after = [*plan[1:], plan[-1]]  # how many adapters go on from each round
    seen: list[tuple[int, list[Ranked]]] = []
    for (shots, _), (_, kept) in zip(plan, after, strict=True):
        _score_further(scoring, alive, table, shots)
        order = _rank(scoring, alive, table, shots)
        seen.append((shots, order))
        alive = [one.name for one in order[:kept]]
    final = {one.name: one.rank_sum for one in seen[-1][1]}
    rounds = [_round_row(shots, order, kept, final) for (shots, order), (_, kept) in zip(seen, after, strict=True)]
    nll = {name: sum(cell["nll"] for cell in cells) / len(cells) for name, cells in table.items()}
    return _Found(seen[-1][1], nll, rounds[:-1] and rounds, [cell for name in sorted(table) for cell in table[name]])


def _round_row(shots: int, order: Sequence[Ranked], kept: int, final: dict[str, int]) -> dict[str, Any]:
    """Tell how well a round's order foresaw the final one, among those that reached it."""
    both = [(one.rank_sum, final[one.name]) for one in order if one.name in final]
    tau = agreement(*map(list, zip(*both, strict=True)))
    return {"shots": shots, "scored": len(order), "kept": kept, "tau": tau}


def _rank(scoring: Scoring, names: Sequence[str], table: dict[str, list[dict[str, Any]]], shots: int) -> list[Ranked]:
    cells = [table[name][:shots] for name in names]
    correct = [[math.nan if cell["correct"] is None else float(cell["correct"]) for cell in row] for row in cells]
    scores = ShotScores(
        torch.tensor(correct),
        torch.tensor([[cell["nll"] for cell in row] for row in cells]),
        torch.tensor([float(cell["tokens"]) for cell in cells[0]]),
    )
    if scoring.settings.rank_by != "perplexity" and bool(scores.correct.isnan().all()):
        raise CoterieError("no shot has an answer that can be checked; add the field answer, or --rank-by perplexity")
    return ranked(names, scores, by=scoring.settings.rank_by, perplexity_of=scoring.settings.perplexity_of)


def score_adapters(scoring: Scoring, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Score adapters on all shots; return a record of every shot, by adapter.

    Raises:
        CoterieError: when an adapter does not fit, or a shot cannot be answered.
    """
    table: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    _score_further(scoring, names, table, len(scoring.task.shots))
    return table


def _score_further(scoring: Scoring, names: Sequence[str], table: dict[str, list[dict[str, Any]]], shots: int) -> None:
    """Score adapters on the shots up to this number that they have not seen; equal ranks are loaded together."""
    ranks = {card.name: card.rank for card in scoring.task.bank.cards}
    order = sorted(names, key=lambda name: (ranks[name], name))
    start, size = len(table[order[0]]), scoring.settings.group_size
    for place in range(0, len(order), size):
        own = order[place : place + size]
        logger.info(
            "adapters %d to %d of %d: shots %d to %d", place + 1, place + len(own), len(order), start + 1, shots
        )
        key = f"scores-{start}-{shots}-{'-'.join(own)}"
        found = scoring.cached(key, lambda own=own: _score(scoring, own, range(start, shots)))
        for name in own:
            table[name] += found[name]


def _score(scoring: Scoring, names: Sequence[str], places: range) -> dict[str, list[dict[str, Any]]]:
    """Let adapters answer some shots and measure the likelihood of their rationales, all in common batches."""
    task, batch = scoring.task, scoring.settings.scoring_batch_size
    bank = load_bank({name: task.bank.folder_of(name) for name in names}, task.backbone.model)
    answerer = LocalAnswerer(task.backbone, bank, dict.fromkeys(names, task.prompts), batch_size=batch)
    shots, rationales = ([rows[place] for place in places] for rows in (task.shots, scoring.rationales))
    sampling = SamplingSettings(max_new_tokens=scoring.settings.max_new_tokens)
    asks = [Question(name, shot.prompt, sampling) for name in names for shot in shots]
    replies: dict[int, Reply] = {}
    if scoring.settings.rank_by != "perplexity":
        answerer.answer(asks, replies.__setitem__)
    nll = -answerer.likelihoods(rationales)
    tokens = [len(answer_positions(task.prompts.row(row))) for row in rationales]
    return {
        name: [
            {
                "adapter": name,
                "shot": shot.id,
                **_judged(replies.get(number * len(shots) + k), shot),
                "nll": float(nll[number, k]),
                "tokens": tokens[k],
            }
            for k, shot in enumerate(shots)
        ]
        for number, name in enumerate(names)
    }


def _judged(reply: Reply | None, shot: Example) -> dict[str, Any]:
    if reply is None:
        return {"text": None, "correct": None}
    if reply.error:
        raise CoterieError(f"shot {shot.id} could not be answered ({reply.error}); leave it out or mend it")
    return {"text": reply.text, "correct": is_right(reply.text, shot)}


# ---------------------------------------------------------------------------------------------------------- records


def _similarity_to(group: AdapterGroup, likeness: torch.Tensor, places: dict[str, int]) -> dict[str, float]:
    """Return every candidate's mean similarity to the other members of a group."""
    near = {}
    for name, place in places.items():
        others = [places[member] for member in group.names if member != name]
        near[name] = round(float(likeness[place, others].mean()), 6) if others else 0.0
    return near


def _scored_row(
    one: Ranked, near: dict[str, float], best: AdapterGroup, bank: BankFolder, known: dict[str, int], found: _Found
) -> dict[str, Any]:
    perplexity = math.exp(one.log_perplexity) if one.log_perplexity < math.log(1e300) else None
    return {
        **_dropped_row(one.name, bank, known, found, by=None),
        "accuracy": None if math.isnan(one.accuracy) else one.accuracy,
        "perplexity": perplexity,
        "rank_accuracy": one.rank_accuracy,
        "rank_perplexity": one.rank_perplexity,
        "rank_sum": one.rank_sum,
        "candidate": one.name in near,
        "chosen": one.name in best.names,
        "similarity": near.get(one.name),
    }


def _dropped_row(
    name: str, bank: BankFolder, known: dict[str, int], found: _Found, *, by: str | None
) -> dict[str, Any]:
    rows = next(card.rows for card in bank.cards if card.name == name)
    numbers = ("accuracy", "perplexity", "rank_accuracy", "rank_perplexity", "rank_sum", "similarity")
    return {
        "name": name,
        **dict.fromkeys(numbers),
        "nll": found.nll.get(name),
        "candidate": False,
        "chosen": False,
        "leak": known.get(name, 0),
        "known_rows": rows,
        "dropped": by,
    }


def _group_row(group: AdapterGroup) -> dict[str, Any]:
    return {
        "names": list(group.names),
        "rank_sum": group.rank_sum,
        "similarity": group.similarity,
        "rank_diversity": group.rank_diversity,
        "score": group.score,
    }


def read_selection(folder: Path) -> dict[str, Any]:
    """Read `selection.json` of a folder.

    Raises:
        CoterieError: when it is missing or broken.
    """
    record = read_json(folder / SELECTION_FILE)
    if not isinstance(record.get("chosen"), list) or not isinstance(record.get("adapters"), list):
        raise CoterieError(f"{folder / SELECTION_FILE} names no chosen adapters; make it again with coterie select")
    return record


def best_by_shots(record: dict[str, Any]) -> str:
    """Return the adapter that ranks first in a choice's record."""
    return str(record["adapters"][0]["name"])
