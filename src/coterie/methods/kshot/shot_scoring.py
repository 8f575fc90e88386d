"""Adapters on a task's shots: some at a time are loaded, and those that are loaded answer and are scored together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from coterie.artifacts import JsonCache, hash_text
from coterie.cluster import Call, Elsewhere, named_values
from coterie.data.examples import Example
from coterie.engine.scoring import answer_positions
from coterie.errors import CoterieError
from coterie.experts.adapter_selection import Ranked, ShotScores, agreement, halving_rounds, ranked
from coterie.experts.answering import Question, Reply
from coterie.experts.bank import load_bank
from coterie.grading.grade import is_right
from coterie.grading.lengths import with_length
from coterie.methods.kshot.task import KshotTask, open_task
from coterie.mixture.local_answers import LocalAnswerer
from coterie.progress import ANSWERING, part, steps, whole
from coterie.records.task import HalvingRound
from coterie.settings.commands import KshotSettings, SelectSettings
from coterie.settings.groups import SamplingSettings, SelectAdaptersSettings

MOST_CANDIDATES = 8
"""The paper's M."""


@dataclass(frozen=True)
class ShotScoring:
    """Adapters on a task's shots; each can be scored on some shots first, and on more of them later.

    Attributes:
        task: the bank and the shots.
        rationales: the shots with the responses whose perplexity counts.
        settings: how adapters are chosen.
        cached: keeps what was scored for another try.
        elsewhere: says how workers open the same, where they are to score.
        cells: a record of every shot that an adapter has seen, by adapter.
    """

    task: KshotTask
    rationales: Sequence[Example]
    settings: SelectAdaptersSettings
    cached: JsonCache
    elsewhere: Elsewhere | None = None
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
        return rank_cells({name: self.cells[name][:shots] for name in names}, self.settings)

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
        calls = {}
        for own in groups:
            contents = hash_text(*(f"{name} {hashes[name]}" for name in own))
            key = f"scores-{start}-{shots}-{own[0]}-{contents[:16]}"
            calls[key] = Call(", ".join(own), _score_shots, (own, range(start, shots)))
        with whole("shots", {", ".join(own): len(own) for own in groups}):
            found = named_values(calls, self, self.cached, self.elsewhere)
        for scores in found.values():
            for name, cells in scores.items():
                self.cells.setdefault(name, []).extend(cells)


def rank_cells(cells: Mapping[str, Sequence[Mapping[str, Any]]], how: SelectAdaptersSettings) -> list[Ranked]:
    """Rank adapters by their records of the same shots, best first.

    Raises:
        CoterieError: when no shot can be graded though accuracy counts.
    """
    rows = list(cells.values())
    correct = [[math.nan if cell["correct"] is None else float(cell["correct"]) for cell in row] for row in rows]
    scores = ShotScores(
        torch.tensor(correct),
        torch.tensor([[cell["nll"] for cell in row] for row in rows]),
        torch.tensor([float(cell["tokens"]) for cell in rows[0]]),
    )
    if how.rank_by != "perplexity" and bool(scores.correct.isnan().all()):
        raise CoterieError("no shot has an answer that can be checked; add the field answer, or --rank-by perplexity")
    return ranked(list(cells), scores, by=how.rank_by, perplexity_of=how.perplexity_of)


def open_scoring(
    bank: str,
    settings: SelectSettings | KshotSettings,
    system_prompt: str | None,
    rationales: Sequence[Example],
    how: SelectAdaptersSettings,
) -> ShotScoring:
    """Open a bank and its task to score adapters of it (runs in a worker)."""
    return ShotScoring(open_task(bank, settings, system_prompt), rationales, how, lambda name, make: make())


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
            likelihoods = answerer.likelihoods(rationales)
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
                    "nll": -float(likelihoods[name][k]),
                    "tokens": tokens[k],
                }
            )
    return cells


def candidate_count(how: SelectAdaptersSettings, adapters: int) -> int:
    """Say how many adapters the group is chosen from: of a small bank the better half, so that quality filters first.

    Were all of a small bank candidates, diversity alone could bring in its worst. There are never fewer than are kept.
    """
    return max(how.keep, how.candidates or min(MOST_CANDIDATES, math.ceil(adapters / 2)))
