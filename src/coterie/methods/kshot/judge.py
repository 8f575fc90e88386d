"""What a task's own shots say of what to do with its adapters: use one or several as they are, or train them, on what.

The shots are cut into parts. Each way is judged on a part by what the other parts alone make of it: adapters that are
chosen without this part and trained without it, beside those gathered rows that other shots brought in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import RunFolder, read_tensors, sha256_of, write_tensors
from coterie.combiners.layers import LayerCombiner
from coterie.data.batching import tokenise
from coterie.data.examples import Example, load_examples
from coterie.errors import CoterieError
from coterie.experts.adapter_selection import Ranked
from coterie.experts.bank import ExpertBank, load_bank
from coterie.experts.names import BACKBONE, NULL
from coterie.methods.common import assign_folds, backbone_key, hash_adapter, hash_examples
from coterie.methods.kshot.choose_adapters import SCORES_FILE, SELECTION_FILE, best_groups, read_selection
from coterie.methods.kshot.fit import AND_GATHERED, GATHERED, METHOD, SELECTION, SHOTS_ALONE
from coterie.methods.kshot.gather_rows import GATHERED_FILE
from coterie.methods.kshot.shot_scoring import rank_cells
from coterie.methods.kshot.task import KshotTask
from coterie.methods.kshot.train import tune
from coterie.mixture import Mixture
from coterie.progress import TRAINING, part, whole
from coterie.records.schema import read_rows
from coterie.records.task import GatheredRecord, ShotRecord
from coterie.routers.base import Router
from coterie.routers.fixed import FixedRouter, uniform
from coterie.settings.auto import KshotAutoSettings
from coterie.settings.groups import SelectAdaptersSettings
from coterie.settings.reading import values_of

ONE, FIRST, UNIFORM = "least-loss", "best-by-shots", "uniform-weights"
JUDGING, SCORES = "working/judging", "scores.safetensors"


class Judged(NamedTuple):
    """Losses on shots that had no part in what they judge."""

    nll: Mapping[str, Float[Tensor, " shot"]]
    """Mean NLL per token of every shot's response, in nats, by the name of the way."""
    tokens: Float[Tensor, " shot"]
    """Tokens of the responses."""


@dataclass(frozen=True)
class ScoredShots:
    """The adapters that have seen all shots, with their records of each, and how a group is chosen by these.

    Attributes:
        cells: a record of every shot, in the shots' order, by adapter.
        how: how adapters are chosen.
    """

    cells: Mapping[str, Sequence[Mapping[str, Any]]]
    how: SelectAdaptersSettings

    @classmethod
    def read(cls, folder: Path, task: KshotTask) -> "ScoredShots":
        """Read them from the folder of a choice.

        Raises:
            CoterieError: when a file is broken, no adapter has seen all shots, or the bank lacks one that has.
        """
        file, again = folder / SCORES_FILE, "make it again with coterie select"
        cells: dict[str, list[ShotRecord]] = {}
        for cell in read_rows(ShotRecord, file, again):
            cells.setdefault(cell.adapter, []).append(cell)
        shots = [shot.id for shot in task.shots]
        seen = {name: own for name, own in cells.items() if [cell.shot for cell in own] == shots}
        if not seen:
            raise CoterieError(f"{file} has no adapter that was scored on all {len(shots)} shots; {again}")
        if gone := [name for name in seen if name not in task.bank.names]:
            raise CoterieError(f"{file} has the adapter {gone[0]!r}, which {task.bank.path} does not hold; {again}")
        how = SelectAdaptersSettings(**read_selection(folder).settings)
        return cls({name: [cell.plain() for cell in own] for name, own in seen.items()}, how)

    def ranked(self, shots: Sequence[int]) -> list[Ranked]:
        """Rank the adapters by some of the shots alone, best first."""
        return rank_cells({name: [own[n] for n in shots] for name, own in self.cells.items()}, self.how)

    def of_least_loss(self, shots: Sequence[int]) -> str:
        """Return the adapter that predicts some of the shots best, by the mean of their losses."""
        return min(self.cells, key=lambda name: (sum(self.cells[name][n]["nll"] for n in shots), name))


def untrained(one: str, first: str, group: Sequence[str]) -> dict[str, FixedRouter]:
    """Return the ways that train nothing, each with its adapters' weights; the base model is one that is null."""
    return {ONE: uniform(one), BACKBONE: uniform(NULL), FIRST: uniform(first), UNIFORM: uniform(group)}


def gathered_near(folder: Path) -> list[tuple[Example, str]]:
    """Read gathered rows, each with the shot that it is nearest to; none where there is no such folder.

    Raises:
        CoterieError: when the file is broken.
    """
    file = folder / GATHERED_FILE
    if not folder.exists():
        return []
    near = [row.nearest_shot for row in read_rows(GatheredRecord, file, "make it again with coterie gather")]
    return list(zip(load_examples(file), near, strict=True))


def judge(run: RunFolder, task: KshotTask, scored: ScoredShots, settings: KshotAutoSettings) -> Judged:
    """Judge every way on all shots; adapters are chosen, and open data is gathered, in the run already.

    Raises:
        CoterieError: when there are fewer shots than parts, or the loss of a training is not finite.
    """
    count = settings.judge_folds
    folds = assign_folds([0] * len(task.shots), count, settings.seed)
    gathered = gathered_near(run.path / GATHERED)
    made_from = {
        **values_of(settings.gates),
        **values_of(settings.training, ("report_to",)),
        **backbone_key(task.backbone),
        "seed": settings.seed,
        "judge_folds": count,
        "selection": sha256_of(run.path / SELECTION / SELECTION_FILE),
        "scores": sha256_of(run.path / SELECTION / SCORES_FILE),
        "gathered": hash_examples([example for example, _ in gathered]),
        "experts": {name: hash_adapter(task.bank.folder_of(name)) for name in scored.cells},
    }
    parts: list[dict[str, Tensor]] = []
    order = [torch.nonzero(folds == fold).flatten().tolist() for fold in range(count)]
    with whole("judging", {f"fold {fold + 1}": 1.0 for fold in range(count)}):
        for fold, left in enumerate(order):
            with part(f"fold {fold + 1}"):
                make = partial(_judge_fold, task=task, scored=scored, gathered=gathered, left=left, settings=settings)
                place = run.stage(f"{JUDGING}/{fold}", make, made_from, inputs=("shots",), together=True)
            parts.append(read_tensors(place / SCORES))
    back = torch.tensor([place for left in order for place in left]).argsort()
    nll = {name: torch.cat([own[name] for own in parts])[back] for name in parts[0]}
    tokens = nll.pop("tokens")
    return Judged(nll, tokens)


def _judge_fold(
    folder: Path,
    task: KshotTask,
    scored: ScoredShots,
    gathered: Sequence[tuple[Example, str]],
    left: Sequence[int],
    settings: KshotAutoSettings,
) -> None:
    """Choose, train and gather without the shots that are left out, and score these."""
    known = [place for place in range(len(task.shots)) if place not in left]
    order = scored.ranked(known)
    group = best_groups(task, order[: scored.how.candidates], scored.how)[0][0].names
    ways = untrained(scored.of_least_loss(known), order[0].name, group)
    shots, away = [task.shots[place] for place in known], {task.shots[place].id for place in left}
    added = [example for example, shot in gathered if shot not in away]
    trained = {SHOTS_ALONE: shots, **({AND_GATHERED: [*shots, *added]} if gathered else {})}
    rows = [task.prompts.row(task.shots[place]) for place in left]
    each = TRAINING * settings.training.epochs * len(group)
    work = {name: each * len(own) for name, own in trained.items()}
    with whole("fold", {**work, "scores": (len(ways) + len(trained)) * len(rows)}):
        tuned = {}
        for name, examples in trained.items():
            with part(name):
                longest = settings.training.max_length
                own = tokenise(task.prompts, examples, longest, task.backbone.positions).rows
                tuned[name] = tune(folder / name, task, dict(zip(group, group, strict=True)), own, settings)
        with part("scores"):
            mixtures: dict[str, tuple[ExpertBank, Router]] = {}
            for name, router in ways.items():
                folders = {own: task.bank.folder_of(own) for own in router.weights if own != NULL}
                bank = load_bank(folders, task.backbone.model) if folders else ExpertBank((NULL,), ({},))
                mixtures[name] = bank, router
            for name, made in tuned.items():
                mixtures[name] = load_bank(made.experts, task.backbone.model), made.router
            found = {}
            for name, (bank, router) in mixtures.items():
                mixture = Mixture(task.backbone, bank, router, LayerCombiner(), task.prompts, METHOD)
                found[name] = mixture.score_rows(rows, router.start([row.prompt() for row in rows]))
    nll = {name: scores.nll[0] for name, scores in found.items()}
    write_tensors(folder / SCORES, {**nll, "tokens": found[ONE].tokens})
