"""Adapters of a bank for a task of which a few examples are known (arXiv 2408.15915, algorithm 1).

Adapters are loaded some at a time, and those that are loaded answer and are scored together; with successive halving,
as LORAUTER (arXiv 2601.21795) does for banks of hundreds, most of them see a few shots only.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from coterie.artifacts import JsonCache, as_path, check_output, hash_text, run_folder, write_json, write_jsonl
from coterie.data.examples import Example
from coterie.engine.scoring import answer_positions
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
from coterie.experts.bank_folder import leaks
from coterie.grading.grade import is_right
from coterie.grading.lengths import with_length
from coterie.methods.common import named_sources
from coterie.methods.kshot.rationales import FROM_DATA, with_rationales
from coterie.methods.kshot.task import KshotTask, choosing_values, open_task, scores_cache
from coterie.mixture.local_answers import LocalAnswerer
from coterie.progress import ANSWERING, part, steps, whole
from coterie.records.schema import read
from coterie.records.task import AdapterRecord, GroupRecord, HalvingRound, SelectionRecord
from coterie.records.wording import columns
from coterie.settings.commands import KshotSettings, SelectSettings
from coterie.settings.groups import SamplingSettings, SelectAdaptersSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat

logger = logging.getLogger(__name__)

SELECTION_FILE = "selection.json"
SCORES_FILE = "scores.jsonl"
GROUPS_KEPT = 20
FORMATS = ("{:.0%}", "{:.3f}", "{:.0f}", "{:.2f}")
MOST_CANDIDATES = 8
"""The paper's M."""


@dataclass(frozen=True)
class Selected:
    """Which adapters were chosen, and why.

    Attributes:
        record: what `selection.json` holds.
        scores: what `scores.jsonl` holds: every adapter's answer to every shot that it saw.
    """

    record: SelectionRecord
    scores: list[dict[str, Any]]

    @property
    def chosen(self) -> list[str]:
        """Names of the chosen adapters, best first."""
        return list(self.record.chosen)

    def write(self, folder: Path) -> None:
        """Write `selection.json` and `scores.jsonl` into a folder."""
        write_jsonl(folder / SCORES_FILE, self.scores)
        write_json(folder / SELECTION_FILE, self.record.plain())

    def __str__(self) -> str:
        """Return a table of all adapters, best first; the last column tells why each is in or out.

        Likeness is to the chosen group, on average.
        """
        lines: list[Sequence[str]] = [("adapter", "right", "perplexity", "ranks", "likeness", "why")]
        for one in self.record.adapters:
            numbers = zip((one.accuracy, one.perplexity, one.rank_sum, one.similarity), FORMATS, strict=True)
            told = ["-" if number is None else form.format(number) for number, form in numbers]
            lines.append((one.name, *told, one.why or ""))
        return columns(lines, "<>>>><")


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
    flat = {"folder": str(folder), "shots": named_sources(shots)[0], "output": str(output), **settings}
    return select_adapters(from_flat(SelectSettings, flat))


@takes_fields(SelectSettings)
def select_adapters(settings: SelectSettings) -> Selected:
    """Choose adapters of a bank, and write the choice into the output folder; an interrupted run goes on.

    Raises:
        CoterieError: for bad data, a bank without enough adapters, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    task = open_task(settings.folder, settings, settings.system_prompt)
    with run_folder(output, settings, task.inputs()) as run:
        selected = choose(task, settings, scores_cache(run, choosing_values(settings, settings.system_prompt, task)))
        selected.write(run.path)
    return selected


def choose(task: KshotTask, settings: SelectSettings | KshotSettings, cached: JsonCache) -> Selected:
    """Score the bank's adapters on the shots and choose the group to keep; `cached` keeps scores for another try.

    Raises:
        CoterieError: when too few adapters are left, or no shot can be graded though accuracy counts.
    """
    how, bank = settings.adapters, task.bank
    known = leaks(bank, [*task.shots, *task.excluded])
    for name, count in known.items():
        done = "is left out" if how.exclude_leaks else "takes part; add --exclude-leaks to leave it out"
        logger.warning("%s was trained on %d of the shots and excluded rows and %s", name, count, done)
    names = [name for name in bank.names if not (how.exclude_leaks and name in known)]
    if len(names) < how.keep:
        raise CoterieError(
            f"{bank.path} has {len(names)} adapters to choose from, fewer than --keep {how.keep}; "
            "add adapters with coterie bank add, or lower --keep"
        )
    how = how.model_copy(update={"candidates": candidate_count(how, len(names))})
    written = settings.rationale.rationales != FROM_DATA
    with whole("select", {"rationales": ANSWERING * len(task.shots) * written, "scores": scoring_work(task, how)}):
        with part("rationales"):
            rationales = with_rationales(task.shots, settings.rationale, settings.placement, how.scoring_batch_size)
        scoring = ShotScoring(task, rationales, how, cached)
        with part("scores"):
            order, rounds = scoring.halve(names)
    candidates = order[: how.candidates]
    adapters = load_bank({one.name: bank.folder_of(one.name) for one in candidates}, task.backbone.model).adapters
    likeness = similarities(adapters, "factors" if how.diversity == "factors" else "updates")
    best = groups(candidates, likeness, how.keep, diverse=how.diversity != "none")
    similarity = {}  # of every candidate to the other members of the chosen group
    places = {one.name: place for place, one in enumerate(candidates)}
    for name, place in places.items():
        others = [places[member] for member in best[0].names if member != name]
        similarity[name] = round(float(likeness[place, others].mean()), 6) if others else 0.0
    record = SelectionRecord(
        settings=how.model_dump(exclude={"exclude"}),
        shots=len(task.shots),
        chosen=best[0].names,
        adapters=tuple(_adapter_records(scoring, names, order, best, similarity, known)),
        subsets=tuple(GroupRecord(**asdict(group)) for group in best[:GROUPS_KEPT]),
        halving=tuple(rounds),
    )
    return Selected(record, [cell for name in sorted(scoring.cells) for cell in scoring.cells[name]])


def scoring_work(task: KshotTask, how: SelectAdaptersSettings) -> float:
    """Return what scoring all adapters on all shots weighs."""
    return len(task.bank.names) * len(task.shots) * (1.0 + ANSWERING * (how.rank_by != "perplexity"))


def candidate_count(how: SelectAdaptersSettings, adapters: int) -> int:
    """Say how many adapters the group is chosen from: of a small bank the better half, so that quality filters first.

    Were all of a small bank candidates, diversity alone could bring in its worst. There are never fewer than are kept.
    """
    return max(how.keep, how.candidates or min(MOST_CANDIDATES, math.ceil(adapters / 2)))


def _adapter_records(
    scoring: "ShotScoring",
    names: Sequence[str],
    order: Sequence[Ranked],
    best: Sequence[AdapterGroup],
    similarity: Mapping[str, float],
    known: Mapping[str, int],
) -> list[AdapterRecord]:
    """Return a record of every adapter: those that saw all shots, best first, then the others with why they did not."""
    chosen = best[0].names
    reasons = _reasons(scoring, order, best, known)
    bank, finished = scoring.task.bank, {one.name: one for one in order}
    trained_on = {card.name: card.rows for card in bank.cards}
    dropped = {name: "halving" for name in names if name not in finished}
    dropped |= {name: "leak" for name in bank.names if name not in names}
    rows = []
    for name in [*finished, *dropped]:
        one, cells = finished.get(name), scoring.cells.get(name)
        has_perplexity = one is not None and one.log_perplexity < math.log(1e300)
        rows.append(
            AdapterRecord(
                name=name,
                accuracy=None if one is None or math.isnan(one.accuracy) else one.accuracy,
                perplexity=math.exp(one.log_perplexity) if one and has_perplexity else None,
                rank_accuracy=one.rank_accuracy if one else None,
                rank_perplexity=one.rank_perplexity if one else None,
                rank_sum=one.rank_sum if one else None,
                similarity=similarity.get(name),
                nll=sum(cell["nll"] for cell in cells) / len(cells) if cells else None,
                candidate=name in similarity,
                chosen=name in chosen,
                leak=known.get(name, 0),
                known_rows=trained_on[name],
                dropped=dropped.get(name),
                why=reasons[name],
            )
        )
    return rows


def _reasons(
    scoring: "ShotScoring", order: Sequence[Ranked], best: Sequence[AdapterGroup], known: Mapping[str, int]
) -> dict[str, str]:
    """Say of every adapter of the bank why it is in or out: each filter, and each comparison of groups, in turn."""
    how, chosen = scoring.settings, best[0]
    by = {"both": "accuracy and perplexity"}.get(how.rank_by, how.rank_by)
    told = {}
    for name in scoring.task.bank.names:
        if name in scoring.cells:
            told[name] = f"out: not among the best on its {len(scoring.cells[name])} shots (--halving)"
        else:
            told[name] = f"out: knows {known[name]} of the shots and excluded rows (--exclude-leaks)"
    for place, one in enumerate(order, start=1):
        is_in = one.name in chosen.names
        if place > (how.candidates or 0):
            told[one.name] = (
                f"out: number {place} of {len(order)} by {by}, only the best {how.candidates} are candidates"
            )
            continue
        other = next((group for group in best if (one.name in group.names) != is_in), None)
        if other is None:
            told[one.name] = f"in: number {place} of {len(order)} by {by}, and all {how.candidates} candidates are kept"
        else:
            groups_of_it = f"the best group {'without' if is_in else 'with'} it has {_score(other)}"
            told[one.name] = f"{'in' if is_in else 'out'}: {groups_of_it}, the chosen one {_score(chosen)}"
    return told


def _score(group: AdapterGroup) -> str:
    return f"{group.score} (ranks {group.rank_sum} + diversity {group.rank_diversity})"


# ---------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class ShotScoring:
    """Adapters on a task's shots; each can be scored on some shots first, and on more of them later.

    Attributes:
        task: the bank and the shots.
        rationales: the shots with the responses whose perplexity counts.
        settings: how adapters are chosen.
        cached: keeps what was scored for another try.
        cells: a record of every shot that an adapter has seen, by adapter.
    """

    task: KshotTask
    rationales: Sequence[Example]
    settings: SelectAdaptersSettings
    cached: JsonCache
    cells: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def halve(self, names: Sequence[str]) -> tuple[list[Ranked], list[HalvingRound]]:
        """Score adapters round by round; every round goes on with the better part of them and with more shots.

        Returns the order of those that saw all shots, best first, and a record of every round where there are several.
        """
        alive = sorted(names)
        least = candidate_count(self.settings, len(alive))
        plan = halving_rounds(len(alive), len(self.task.shots), self.settings.halving, least)
        kept = [count for _, count in [*plan[1:], plan[-1]]]  # how many adapters go on from each round
        orders: list[list[Ranked]] = []
        new = [shots - before for before, shots in pairwise([0, *(shots for shots, _ in plan)])]
        work = {f"{shots} shots": own * adapters for (shots, adapters), own in zip(plan, new, strict=True)}
        with whole("scores", work):
            for (shots, _), count in zip(plan, kept, strict=True):
                with part(f"{shots} shots"):
                    self.score(alive, shots)
                orders.append(self.rank(alive, shots))
                alive = [one.name for one in orders[-1][:count]]
        final = {one.name: one.rank_sum for one in orders[-1]}
        rounds = []
        for (shots, _), count, order in zip(plan, kept, orders, strict=True):
            both = [(one.rank_sum, final[one.name]) for one in order if one.name in final]
            tau = agreement(*map(list, zip(*both, strict=True)))  # how well the round foresaw the final order
            rounds.append(HalvingRound(shots=shots, scored=len(order), kept=count, tau=tau))
        return orders[-1], rounds if len(rounds) > 1 else []

    def rank(self, names: Sequence[str], shots: int) -> list[Ranked]:
        """Rank adapters by their first shots, best first.

        Raises:
            CoterieError: when no shot can be graded though accuracy counts.
        """
        cells = [self.cells[name][:shots] for name in names]
        correct = [[math.nan if cell["correct"] is None else float(cell["correct"]) for cell in row] for row in cells]
        scores = ShotScores(
            torch.tensor(correct),
            torch.tensor([[cell["nll"] for cell in row] for row in cells]),
            torch.tensor([float(cell["tokens"]) for cell in cells[0]]),
        )
        if self.settings.rank_by != "perplexity" and bool(scores.correct.isnan().all()):
            raise CoterieError(
                "no shot has an answer that can be checked; add the field answer, or --rank-by perplexity"
            )
        return ranked(names, scores, by=self.settings.rank_by, perplexity_of=self.settings.perplexity_of)

    def score(self, names: Sequence[str], shots: int) -> None:
        """Score adapters on the shots up to this number that they have not seen; equal ranks are loaded together.

        Raises:
            CoterieError: when an adapter does not fit, or a shot cannot be answered.
        """
        ranks = {card.name: card.rank for card in self.task.bank.cards}
        hashes = {card.name: card.sha256 for card in self.task.bank.cards}
        order = sorted(names, key=lambda name: (ranks[name], name))
        start, size = len(self.cells.setdefault(order[0], [])), self.settings.group_size
        groups = [order[place : place + size] for place in range(0, len(order), size)]
        with whole("shots", {", ".join(own): len(own) for own in groups}):
            for own in groups:
                contents = hash_text(*(f"{name} {hashes[name]}" for name in own))
                key = f"scores-{start}-{shots}-{own[0]}-{contents[:16]}"
                with part(", ".join(own)):
                    found = self.cached(key, lambda own=own: _score_shots(self, own, range(start, shots)))
                for name in own:
                    self.cells.setdefault(name, []).extend(found[name])


def _score_shots(scoring: ShotScoring, names: Sequence[str], places: range) -> dict[str, list[dict[str, Any]]]:
    """Let adapters answer some shots and measure the likelihood of their rationales, all in common batches."""
    task, batch = scoring.task, scoring.settings.scoring_batch_size
    bank = load_bank({name: task.bank.folder_of(name) for name in names}, task.backbone.model)
    answerer = LocalAnswerer(task.backbone, bank, dict.fromkeys(names, task.prompts), batch_size=batch)
    shots, rationales = ([rows[place] for place in places] for rows in (task.shots, scoring.rationales))
    sampling = SamplingSettings(max_new_tokens=scoring.settings.max_new_tokens)
    replies: dict[int, Reply] = {}

    def done(number: int, reply: Reply) -> None:
        replies[number] = reply
        told()

    answers = scoring.settings.rank_by != "perplexity"
    questions = [Question(name, shot.prompt, with_length(sampling, shot)) for name in names for shot in shots]
    with whole("shots", {"answers": ANSWERING * answers, "likelihoods": 1.0}):
        if answers:
            with part("answers"), steps(f"answers of {', '.join(names)}", len(questions), "answer") as told:
                answerer.answer(questions, done)
        with part("likelihoods"):
            nll = -answerer.likelihoods(rationales)
    tokens = [len(answer_positions(task.prompts.row(row))) for row in rationales]
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number, name in enumerate(names):
        for k, shot in enumerate(shots):
            reply = replies.get(number * len(shots) + k)
            if reply is not None and reply.error:
                raise CoterieError(f"shot {shot.id} could not be answered ({reply.error}); leave it out or mend it")
            cells[name].append(
                {
                    "adapter": name,
                    "shot": shot.id,
                    "text": None if reply is None else reply.text,
                    "correct": None if reply is None else is_right(reply.text, shot),
                    "nll": float(nll[number, k]),
                    "tokens": tokens[k],
                }
            )
    return cells


def read_selection(folder: Path) -> SelectionRecord:
    """Read `selection.json` of a folder.

    Raises:
        CoterieError: when it is missing or broken.
    """
    return read(SelectionRecord, folder / SELECTION_FILE, "make it again with coterie select")
