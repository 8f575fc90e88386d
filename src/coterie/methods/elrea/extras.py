"""What the methods on ELREA's clusters need beyond the fitted run: more experts, gates, judgements, fitted routers."""

import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from coterie.artifacts import RunFolder, write_jsonl, write_tensors
from coterie.errors import CoterieError
from coterie.experts.clustering import cluster
from coterie.experts.gates_training import train_gates
from coterie.methods.common import BASE, base_plan, cluster_record, cluster_rows, train_clusters, train_expert
from coterie.methods.elrea.cross_fit import judge
from coterie.methods.elrea.run import Recipe
from coterie.methods.extras import JUDGEMENT, Kind, Made, load_ingredient, read_judgement
from coterie.mixture.loading import describe_by_embedding
from coterie.routers.base import Gates
from coterie.routers.centroid import CentroidRouter, centroids_of
from coterie.routers.feature import FeatureRouter
from coterie.routers.gate import GateRouter
from coterie.routers.loss import LossRouter, fit_loss_router
from coterie.routers.performance import PerformanceRouter, make_pilots
from coterie.routers.source import SourceRouter

logger = logging.getLogger(__name__)


def _random_clusters(recipe: Recipe, run: RunFolder) -> Made:
    """Train experts on clusters of the same sizes whose members are drawn at random (ELREA's Random Cluster)."""
    generator = torch.Generator().manual_seed(recipe.settings.seed)
    order = torch.randperm(len(recipe.labels), generator=generator).tolist()
    labels = [recipe.labels[i] for i in order]
    groups = cluster_rows(recipe.kept.rows, labels)
    _write_clusters(recipe, run, labels, "random")
    return Made(train_clusters(run, "random", groups, recipe.backbone, recipe.settings, _base(recipe)))


def _embedding_clusters(recipe: Recipe, run: RunFolder) -> Made:
    """Cluster and route by sentence embeddings (ELREA's Instruction Embedding)."""
    description = describe_by_embedding(recipe.grid.encoder, recipe.backbone)
    features = description(recipe.prompts)
    seed = recipe.settings.seed
    clustering = cluster(features.numpy(), recipe.settings.clustering, sources=recipe.sources, seed=seed)
    groups = cluster_rows(recipe.kept.rows, clustering.labels)
    _write_clusters(recipe, run, clustering.labels, "embedding")
    experts = train_clusters(run, "embedding", groups, recipe.backbone, recipe.settings, _base(recipe))
    centroids = centroids_of(features, clustering.labels, clustering.count)
    router = CentroidRouter(description, centroids, list(experts), base=BASE)
    return Made(experts, router, {"clustering": clustering.record()})


def _seeds(recipe: Recipe, run: RunFolder) -> Made:
    """Train adapters on all data from other seeds (LoRA Ensembles, arXiv 2310.00035)."""
    experts = {}
    for number in range(1, recipe.grid.ensemble_size):
        name = f"seed-{number}"
        seed = recipe.settings.seed + number
        label = f"{name} ({number} of {recipe.grid.ensemble_size - 1})"
        plan = base_plan(recipe.settings, label, seed=seed, keep_epochs=False)
        experts[name] = train_expert(run, name, recipe.kept.rows, recipe.backbone, plan, recipe.settings.lora)
    return Made(experts)


def _datasets(recipe: Recipe, run: RunFolder) -> Made:
    """Train one adapter per data set, from a fresh start (ELREA's per-dataset adapters)."""
    sources = sorted({source for source in recipe.sources if source})
    if not sources:
        raise CoterieError("the training rows name no source, so there are no data sets to train adapters for")
    names = _safe_names(sources)
    folders = {}
    for number, source in enumerate(sources, start=1):
        rows = [row for row, own in zip(recipe.kept.rows, recipe.sources, strict=True) if own == source]
        plan = base_plan(recipe.settings, f"{names[source]} ({number} of {len(sources)})", keep_epochs=False)
        folders[names[source]] = train_expert(run, names[source], rows, recipe.backbone, plan, recipe.settings.lora)
    return Made(folders, SourceRouter(names))


def _safe_names(sources: list[str]) -> dict[str, str]:
    """Make a folder name of every source's name; equal ones are numbered."""
    names: dict[str, str] = {}
    for source in sources:
        plain = "dataset-" + re.sub(r"[^A-Za-z0-9._-]+", "-", source)
        names[source] = plain if plain not in names.values() else f"{plain}-{len(names)}"
    return names


def _base(recipe: Recipe) -> Path:
    return recipe.folder / "experts" / BASE


def _write_clusters(recipe: Recipe, run: RunFolder, labels: Iterable[int], prefix: str) -> None:
    rows = zip(recipe.kept.examples, labels, strict=True)
    records = [cluster_record(example, f"{prefix}-{label}") for example, label in rows]
    write_jsonl(run.path / "clusters.jsonl", records)


# --------------------------------------------------------------------------------------------- gates, fitted routers


def _gates(recipe: Recipe, run: RunFolder) -> Made:
    """Train a gate per layer on the frozen experts (ELREA's MoLE: whole training set, 1 epoch)."""
    grid, bank = recipe.grid, recipe.mixture.bank
    plan = base_plan(recipe.settings, "gates", keep_epochs=False)
    plan = replace(plan, epochs=grid.gate_epochs, learning_rate=grid.gate_learning_rate)
    layers = train_gates(recipe.backbone, bank.adapters, recipe.kept.rows, plan, run.path)
    return Made({}, GateRouter(recipe.backbone, bank.adapters, Gates(bank.names, layers)))


def _judged(recipe: Recipe, run: RunFolder) -> Made:
    """Judge the run's experts on the training rows, each by copies that were not trained on them (cross-fitting)."""
    judgement = judge(recipe, run)
    write_tensors(run.path / JUDGEMENT, judgement.tensors())
    shutil.rmtree(run.path / "folds")
    return Made({}, None, {"judged": list(judgement.experts), "best_single": judgement.best_single()})


def _performance(recipe: Recipe, run: RunFolder) -> Made:
    """Place centroids by who is best on training rows (RouterRetriever)."""
    judgement = read_judgement(load_ingredient(recipe.mixture, "judged"))
    centre = recipe.features.mean(dim=0)
    pilots = make_pilots(recipe.features - centre, judgement.best_of_rows(), recipe.sources)
    return Made({}, PerformanceRouter(_gradients(recipe), pilots, centre))


def _loss(recipe: Recipe, run: RunFolder) -> Made:
    """Fit the router that predicts every expert's loss."""
    judgement = read_judgement(load_ingredient(recipe.mixture, "judged"))
    centre = recipe.features.mean(dim=0)
    fitted = fit_loss_router(recipe.features - centre, judgement, seed=recipe.settings.seed)
    logger.info(
        "loss router: penalty %g, sharpness %g, expected NLL %.4f",
        fitted.penalty,
        fitted.sharpness,
        fitted.expected_nll,
    )
    router = LossRouter(_gradients(recipe), fitted.ridge, judgement.experts, fitted.sharpness, centre)
    return Made({}, router, {"penalty": fitted.penalty, "expected_nll": fitted.expected_nll})


def _gradients(recipe: Recipe) -> Any:
    router = recipe.mixture.router
    if not isinstance(router, FeatureRouter):
        raise CoterieError(f"{recipe.folder} has a router without features ({router.kind}); fit it again")
    return router.description


CLUSTER_KINDS: dict[str, Kind] = {
    "random-clusters": Kind(_random_clusters),
    "embedding-clusters": Kind(_embedding_clusters, ("encoder",)),
    "seeds": Kind(_seeds, ("ensemble_size",)),
    "datasets": Kind(_datasets),
    "gates": Kind(_gates, ("gate_epochs", "gate_learning_rate")),
    "judged": Kind(_judged, ("judge_folds",)),
    "performance": Kind(_performance, needs=("judged",)),
    "loss": Kind(_loss, needs=("judged",)),
}
"""By the name of the ingredient's folder."""
