"""What the methods on ELREA's clusters need trained: experts, gates, cross-fitted losses, routers fitted to them."""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from coterie.artifacts import RunFolder, write_jsonl, write_tensors
from coterie.backbone.gates import Gates
from coterie.errors import CoterieError
from coterie.experts.clustering import cluster
from coterie.experts.gates_training import train_gates
from coterie.experts.names import BASE
from coterie.methods.common import base_plan, origin, train_clusters, train_expert
from coterie.methods.elrea.cross_fit import cross_fit
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.extras import LOSSES, ExtraSpec, TrainedExtra, load_extra, read_losses
from coterie.progress import EMBEDDING, TRAINING, part, whole
from coterie.routers.centroid import CentroidRouter, centroids_by_best, centroids_of
from coterie.routers.feature import embedding_extractor
from coterie.routers.fixed import SourceRouter
from coterie.routers.gate import GateRouter
from coterie.routers.loss import LossRouter, fit_loss_router

logger = logging.getLogger(__name__)


def _random_clusters(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Train experts on clusters of the same sizes whose members are drawn at random (ELREA's Random Cluster)."""
    generator = torch.Generator().manual_seed(run.settings.seed)
    order = torch.randperm(len(run.labels), generator=generator).tolist()
    return TrainedExtra(_cluster_experts(run, into, "random", [run.labels[i] for i in order]))


def _embedding_clusters(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Cluster and route by sentence embeddings (ELREA's Instruction Embedding)."""
    extractor = embedding_extractor(run.extras.encoder, run.mixture.backbone)
    with whole("embedding-clusters", {"features": EMBEDDING * len(run.kept.rows), "experts": _cluster_work(run)}):
        with part("features"):
            features = extractor([row.prompt() for row in run.kept.rows])
        clustering = cluster(features.numpy(), run.settings.clustering, sources=run.sources, seed=run.settings.seed)
        with part("experts"):
            experts = _cluster_experts(run, into, "embedding", clustering.labels)
    centroids = centroids_of(features, clustering.labels, clustering.count)
    router = CentroidRouter.by_cluster(extractor, centroids, list(experts), base=BASE)
    return TrainedExtra(experts, router, {"clustering": clustering.record()})


def _seeds(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Train adapters on all data from other seeds (LoRA Ensembles, arXiv 2310.00035)."""
    rows, backbone, count = run.kept.rows, run.mixture.backbone, run.extras.ensemble_size - 1
    names = {f"seed-{number}": number for number in range(1, count + 1)}
    experts = {}
    with whole("seeds", dict.fromkeys(names, 1.0)):
        for name, number in names.items():
            plan = base_plan(run.settings, f"{name} ({number} of {count})", seed=run.settings.seed + number)
            with part(name):
                experts[name] = train_expert(into, name, rows, backbone, plan, run.settings.lora)
    return TrainedExtra(experts)


def _datasets(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Train one adapter per data set, from a fresh start (ELREA's per-dataset adapters)."""
    sources = sorted({source for source in run.sources if source})
    if not sources:
        raise CoterieError("the training rows name no source, so there are no data sets to train adapters for")
    names: dict[str, str] = {}  # of folders; equal ones are numbered
    for source in sources:
        plain = "dataset-" + re.sub(r"[^A-Za-z0-9._-]+", "-", source)
        names[source] = plain if plain not in names.values() else f"{plain}-{len(names)}"
    folders = {}
    with whole("datasets", {names[source]: run.sources.count(source) for source in sources}):
        for number, source in enumerate(sources, start=1):
            name, backbone = names[source], run.mixture.backbone
            rows = [row for row, own in zip(run.kept.rows, run.sources, strict=True) if own == source]
            plan = base_plan(run.settings, f"{name} ({number} of {len(sources)})")
            with part(name):
                folders[name] = train_expert(into, name, rows, backbone, plan, run.settings.lora)
    return TrainedExtra(folders, SourceRouter(names))


def _cluster_experts(run: ElreaRun, into: RunFolder, prefix: str, labels: Sequence[int]) -> dict[str, Path]:
    rows = zip(run.kept.examples, labels, strict=True)
    records = [{**origin(example), "cluster": f"{prefix}-{label}"} for example, label in rows]
    write_jsonl(into.path / "clusters.jsonl", records)
    base, count = run.folder / "experts" / BASE, max(labels) + 1
    return train_clusters(into, prefix, run.kept.rows, labels, count, run.mixture.backbone, run.settings, base)


# --------------------------------------------------------------------------------------------- gates, fitted routers


def _gates(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Train a gate per layer on the frozen experts (ELREA's MoLE: whole training set, 1 epoch)."""
    settings, bank = run.extras, run.mixture.bank
    plan = base_plan(run.settings, "gates")
    plan = replace(plan, epochs=settings.gate_epochs, learning_rate=settings.gate_learning_rate)
    layers = train_gates(run.mixture.backbone, bank.adapters, run.kept.rows, plan, into.path)
    return TrainedExtra({}, GateRouter(run.mixture.backbone, bank.adapters, Gates(bank.names, layers)))


def _judged(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Measure the experts' losses on the training rows, with copies that were not trained on them (cross-fitting)."""
    losses = cross_fit(run, into)
    write_tensors(into.path / LOSSES, {"nll": losses.nll, "pairs": losses.pairs, "tokens": losses.tokens})
    shutil.rmtree(into.path / "folds")
    return TrainedExtra({}, None, {"judged": list(losses.experts), "best_single": losses.best_single()})


def _performance(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Place centroids by who is best on training rows (RouterRetriever)."""
    losses = read_losses(load_extra(run.mixture, "judged"))
    centre = run.features.mean(dim=0)
    centroids = centroids_by_best(run.features - centre, losses.best_of_rows(), run.sources)
    return TrainedExtra({}, CentroidRouter.by_performance(run.mixture.router.features, centroids, centre))


def _loss(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Fit the router that predicts every expert's loss."""
    losses = read_losses(load_extra(run.mixture, "judged"))
    centre = run.features.mean(dim=0)
    fitted = fit_loss_router(run.features - centre, losses, seed=run.settings.seed)
    logger.info(
        "loss router: penalty %g, sharpness %g, expected NLL %.4f",
        fitted.penalty,
        fitted.sharpness,
        fitted.expected_nll,
    )
    router = LossRouter(run.mixture.router.features, fitted.ridge, losses.experts, fitted.sharpness, centre)
    return TrainedExtra({}, router, {"penalty": fitted.penalty, "expected_nll": fitted.expected_nll})


def _base_work(run: ElreaRun) -> float:
    return TRAINING * run.row_count * run.settings.training.epochs


def _cluster_work(run: ElreaRun) -> float:
    return TRAINING * run.row_count * run.settings.experts.expert_epochs


def _judged_work(run: ElreaRun) -> float:
    """Every fold leaves its own rows out, and is scored on them by all experts."""
    trained = (run.extras.judge_folds - 1) * (_base_work(run) + _cluster_work(run))
    return trained + len(run.mixture.bank) * run.row_count


EXTRAS: dict[str, ExtraSpec[ElreaRun]] = {
    "random-clusters": ExtraSpec(_random_clusters, _cluster_work),
    "embedding-clusters": ExtraSpec(_embedding_clusters, _cluster_work, ("encoder",)),
    "seeds": ExtraSpec(_seeds, lambda run: (run.extras.ensemble_size - 1) * _base_work(run), ("ensemble_size",)),
    "datasets": ExtraSpec(_datasets, _base_work),
    "gates": ExtraSpec(
        _gates,
        lambda run: TRAINING * run.row_count * run.extras.gate_epochs,
        ("gate_epochs", "gate_learning_rate"),
    ),
    "judged": ExtraSpec(_judged, _judged_work, ("judge_folds",)),
    "performance": ExtraSpec(_performance, lambda run: run.row_count / 10, needs=("judged",)),
    "loss": ExtraSpec(_loss, lambda run: run.row_count / 10, needs=("judged",)),
}
"""By the name of the extra's folder."""
