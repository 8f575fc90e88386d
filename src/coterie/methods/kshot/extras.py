"""Baselines and ablations of kshot-moe that need training of their own."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from coterie.artifacts import RunFolder
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import loaded_by
from coterie.data.examples import Example
from coterie.data.streaming import FRESH, index_pools
from coterie.engine.scoring import score_votes
from coterie.errors import CoterieError
from coterie.experts.bank import load_bank
from coterie.experts.lorahub import SearchPlan, compose, search_weights
from coterie.experts.plain_adapter import write_plain_adapter
from coterie.methods.common import ExpertJob, base_plan, copy_expert, train_expert
from coterie.methods.extras import ExtraSpec, TrainedExtra
from coterie.methods.kshot.fit import AND_GATHERED, SHOTS_ALONE
from coterie.methods.kshot.run import KshotRun
from coterie.methods.kshot.train import tune
from coterie.progress import TRAINING
from coterie.routers.gate import GateRouter

UNTUNED = "untuned-"
BEST_TUNED = "best-tuned"
LORAHUB = "lorahub"


def _untuned(run: KshotRun, into: RunFolder) -> TrainedExtra:
    """Take the chosen adapters, and the best single one, as the bank has them."""
    names = dict.fromkeys([*run.selection.chosen, run.selection.first])
    bank = run.task.bank
    return TrainedExtra(
        {f"{UNTUNED}{name}": copy_expert(into, f"{UNTUNED}{name}", bank.folder_of(name)) for name in names}
    )


def _best_tuned(run: KshotRun, into: RunFolder) -> TrainedExtra:
    """Fine-tune the single best adapter on the mixture's own rows."""
    plan = base_plan(run.settings, BEST_TUNED)
    rows, start = run.tokenised(run.gathered), run.task.bank.folder_of(run.selection.first)
    return TrainedExtra({BEST_TUNED: train_expert(into, BEST_TUNED, ExpertJob(rows, plan, start), run.task.backbone)})


def _lorahub(run: KshotRun, into: RunFolder) -> TrainedExtra:
    """Search weights of the candidates' factors without gradients (LoraHub, arXiv 2307.13269)."""
    task = run.task
    names = [own.name for own in run.selection.adapters if own.candidate]
    adapters = load_bank({name: task.bank.folder_of(name) for name in names}, task.backbone.model).adapters
    rows = run.tokenised([])
    alone = torch.ones(1, len(rows), 1)

    def shots_nll(weights: Sequence[float]) -> float:
        layers = ExpertLayers(task.backbone.model, (compose(adapters, weights),))
        return float(score_votes(task.backbone, layers, (LORAHUB,), rows, alone, "").nll.mean())

    search = SearchPlan(run.extras.lorahub_steps, seed=run.settings.seed)
    weights = search_weights(shots_nll, len(names), search)
    composed = compose(adapters, weights)
    folder = into.path / "experts" / LORAHUB
    write_plain_adapter(folder, composed, task.backbone.model, loaded_by(task.backbone.identity))
    return TrainedExtra({LORAHUB: folder}, None, {"weights": dict(zip(names, weights, strict=True))})


def _ablation(
    prefix: str,
    experts: Callable[[KshotRun], list[str]] = lambda run: list(run.selection.chosen),
    data: Callable[[KshotRun], list[Example]] = lambda run: run.gathered,
) -> ExtraSpec[KshotRun]:
    """Train a mixture as the run did, but from other experts or on other rows beside the shots."""

    def make(run: KshotRun, into: RunFolder) -> TrainedExtra:
        names = experts(run)
        added = data(run)
        if set(names) == set(run.selection.chosen) and added == run.trained_on:
            return _copied(run, into, prefix)  # the same mixture: training it again would give it again
        origins = {f"{prefix}-{name}": name for name in names}
        tuned = tune(into.path, run.task, origins, run.tokenised(added), run.settings)
        return TrainedExtra(tuned.experts, tuned.router, {"gates": tuned.record.plain()})

    return ExtraSpec(make, lambda run: len(run.selection.chosen) * _training_work(run), together=True)


def _copied(run: KshotRun, into: RunFolder, prefix: str) -> TrainedExtra:
    mixture = run.mixture
    gates = mixture.router.start([]).gates
    assert gates is not None  # kshot-moe has them
    names = {name: f"{prefix}-{name}" for name in gates.experts}
    folders = {own: copy_expert(into, own, run.folder / "experts" / name) for name, own in names.items()}
    adapters = [mixture.bank.adapters[mixture.bank.index(name)] for name in names]
    gates = replace(gates, experts=tuple(names.values()))
    return TrainedExtra(folders, GateRouter(mixture.backbone, adapters, gates))


def _first(run: KshotRun, *signals: str) -> list[str]:
    """Return as many adapters as were chosen, best by these numbers alone."""
    finished = [own for own in run.selection.adapters if own.rank_sum is not None]  # that saw all shots
    order = sorted(finished, key=lambda own: (*(getattr(own, signal) for signal in signals), own.name))
    return [own.name for own in order[: len(run.selection.chosen)]]


def _random_experts(run: KshotRun) -> list[str]:
    names = sorted(own.name for own in run.selection.adapters if own.dropped != "leak")
    return random.Random(run.settings.seed).sample(names, len(run.selection.chosen))


def _random_rows(run: KshotRun) -> list[Example]:
    """Draw as many rows of the pools as were gathered; shots and excluded rows are not among them."""
    settings = run.settings
    if not run.pools:
        raise CoterieError(f"{run.folder} was fitted without open data, so there is none to draw at random")
    pools = {source: source for source in run.pools}
    index = index_pools(pools, None, run.task.shots, run.task.excluded, settings.reading)
    fresh = np.flatnonzero(index.kinds == FRESH)
    drawn = np.random.default_rng(settings.seed).choice(fresh, min(len(run.gathered), len(fresh)), replace=False)
    return [replace(example, id=f"random-{number}") for number, example in index.read(np.sort(drawn))]


def _training_work(run: KshotRun) -> float:
    return TRAINING * (run.selection.shots + len(run.gathered)) * run.settings.training.epochs


EXTRAS: Mapping[str, ExtraSpec[KshotRun]] = {
    "untuned": ExtraSpec(_untuned, lambda run: run.selection.shots / 10),
    BEST_TUNED: ExtraSpec(_best_tuned, _training_work, together=True),
    LORAHUB: ExtraSpec(_lorahub, lambda run: run.extras.lorahub_steps * run.selection.shots, ("lorahub_steps",)),
    SHOTS_ALONE: _ablation("shots", data=lambda run: []),
    AND_GATHERED: _ablation("gathered"),
    "random-experts": _ablation("random", experts=_random_experts),
    "random-data": _ablation("randomdata", data=_random_rows),
    "by-accuracy": _ablation("accuracy", experts=lambda run: _first(run, "rank_accuracy", "rank_perplexity")),
    "by-perplexity": _ablation("perplexity", experts=lambda run: _first(run, "rank_perplexity")),
    "no-diversity": _ablation("ranks", experts=lambda run: _first(run, "rank_sum", "perplexity")),
}
"""By name of the extra's folder."""
