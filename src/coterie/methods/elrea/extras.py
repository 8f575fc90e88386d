"""What the methods on ELREA's clusters need trained: experts, gates, and routers (`fitted_routers.py`)."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coterie.artifacts import RunFolder, read_tensors, write_jsonl, write_tensors
from coterie.backbone.gates import Gates
from coterie.errors import CoterieError
from coterie.experts.bank import CONFIG_FILE, WEIGHTS_FILE
from coterie.experts.clustering import cluster
from coterie.experts.gates_training import train_gates
from coterie.experts.names import BASE
from coterie.features.subspace import strongest_directions
from coterie.methods.common import ExpertJob, base_plan, origin, train_clusters, train_expert, train_experts
from coterie.methods.elrea import fitted_routers, refusing, score_tables
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.extras import ExtraSpec, TrainedExtra
from coterie.progress import EMBEDDING, TRAINING, part, whole
from coterie.routers.centroid import CentroidRouter, centroids_of
from coterie.routers.derived import DerivedRouter
from coterie.routers.feature import embedding_extractor
from coterie.routers.fixed import SourceRouter
from coterie.routers.gate import GateRouter
from coterie.routers.loss import PENALTIES, LossRouter, fit_ridge, out_of_fold

ONE_LORA = "one-lora"
DIRECTIONS = 64  # of the gradients' space, at most


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


def _gradient_space(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Cluster gradients in the few directions that they lie in, and let an encoder choose one expert (GradientSpace).

    The choice is a least-squares classifier of the prompt's embedding: it predicts the loss 0 for the expert of the
    prompt's own cluster, and 1 for the others.
    """
    rows, settings = run.kept.rows, run.settings
    extractor = embedding_extractor(run.extras.encoder, run.mixture.backbone)
    with whole("gradient-space", {"features": EMBEDDING * len(rows), "experts": _cluster_work(run)}):
        with part("features"):
            embedded = extractor([row.prompt() for row in rows])
        unit = torch.nn.functional.normalize(run.features, dim=-1)
        inside = unit @ strongest_directions(unit[: settings.clustering.cluster_sample], DIRECTIONS).T
        how = settings.clustering.model_copy(update={"cluster_method": "spherical-kmeans", "cluster_rounds": 1})
        clustering = cluster(inside.numpy(), how, sources=run.sources, seed=settings.seed)
        with part("experts"):
            experts = _cluster_experts(run, into, "space", clustering.labels)
    labels = torch.tensor(clustering.labels)
    wrong = 1 - torch.nn.functional.one_hot(labels).double()

    found = out_of_fold(embedded, wrong, None, PENALTIES, seed=settings.seed)
    right = {penalty: float((predicted.argmin(dim=1) == labels).sum()) for penalty, predicted in found.items()}
    ridge = fit_ridge(embedded, wrong, penalty=max(right, key=right.__getitem__))
    chosen = LossRouter(extractor, ridge, list(experts), 1.0)
    return TrainedExtra(experts, DerivedRouter(chosen, top_k=1, normalised=True), {"clustering": clustering.record()})


def _seeds(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Train adapters on all data from other seeds (LoRA Ensembles, arXiv 2310.00035)."""
    rows, backbone, count = run.kept.rows, run.mixture.backbone, run.extras.ensemble_size - 1
    jobs = {}
    for number in range(1, count + 1):
        name = f"seed-{number}"
        plan = base_plan(run.settings, f"{name} ({number} of {count})", seed=run.settings.seed + number)
        jobs[name] = ExpertJob(rows, plan, run.settings.lora)
    return TrainedExtra(train_experts(into, jobs, backbone, "seeds"))


def _datasets(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Train one adapter per data set, from a fresh start (ELREA's per-dataset adapters)."""
    sources = sorted({source for source in run.sources if source})
    if not sources:
        raise CoterieError("the training rows name no source, so there are no data sets to train adapters for")
    names: dict[str, str] = {}  # of folders; equal ones are numbered
    for source in sources:
        plain = "dataset-" + re.sub(r"[^A-Za-z0-9._-]+", "-", source)
        names[source] = plain if plain not in names.values() else f"{plain}-{len(names)}"
    jobs = {}
    for number, source in enumerate(sources, start=1):
        rows = [row for row, own in zip(run.kept.rows, run.sources, strict=True) if own == source]
        plan = base_plan(run.settings, f"{names[source]} ({number} of {len(sources)})")
        jobs[names[source]] = ExpertJob(rows, plan, run.settings.lora)
    return TrainedExtra(train_experts(into, jobs, run.mixture.backbone, "datasets"), SourceRouter(names))


def _cluster_experts(run: ElreaRun, into: RunFolder, prefix: str, labels: Sequence[int]) -> dict[str, Path]:
    rows = zip(run.kept.examples, labels, strict=True)
    records = [{**origin(example), "cluster": f"{prefix}-{label}"} for example, label in rows]
    write_jsonl(into.path / "clusters.jsonl", records)
    base, count = run.folder / "experts" / BASE, max(labels) + 1
    return train_clusters(into, prefix, run.kept.rows, labels, count, run.mixture.backbone, run.settings, base)


def _random_weights(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Draw experts that lie as far from the base adapter as ELREA's do, tensor by tensor, in random directions.

    Random adapters do as well as chosen ones in many banks (arXiv 2602.12323), so they are what training has to beat.
    """
    base = read_tensors(run.folder / "experts" / BASE / WEIGHTS_FILE)
    generator = torch.Generator().manual_seed(run.settings.seed)
    folders = {}
    for number in range(max(run.labels) + 1):
        fitted = read_tensors(run.folder / "experts" / f"cluster-{number}" / WEIGHTS_FILE)
        moved = {}
        for tensor, own in sorted(base.items()):
            step, drawn = fitted[tensor].float() - own.float(), torch.randn(own.shape, generator=generator)
            moved[tensor] = drawn * (step.norm() / drawn.norm())  # as long, in a random direction

        def write(folder: Path, moved: Mapping[str, Tensor] = moved) -> None:
            shutil.copy(run.folder / "experts" / BASE / CONFIG_FILE, folder / CONFIG_FILE)
            write_tensors(folder / WEIGHTS_FILE, {name: base[name].float() + step for name, step in moved.items()})

        name = f"noise-{number}"
        folders[name] = into.stage(f"experts/{name}", write, {})
    return TrainedExtra(folders)


def _one_lora(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Continue the base adapter on all rows together: as many tokens as all experts were trained on, in one adapter."""
    how = run.settings.experts
    plan = base_plan(run.settings, ONE_LORA, epochs=how.expert_epochs, learning_rate=how.expert_learning_rate)
    job = ExpertJob(run.kept.rows, plan, run.folder / "experts" / BASE)
    return TrainedExtra({ONE_LORA: train_expert(into, ONE_LORA, job, run.mixture.backbone)})


# --------------------------------------------------------------------------------------------- gates, fitted routers


def _gates(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Train a gate per layer on the frozen experts (ELREA's MoLE: whole training set, 1 epoch)."""
    settings, bank = run.extras, run.mixture.bank
    how = {"epochs": settings.gate_epochs, "learning_rate": settings.gate_learning_rate}
    plan = base_plan(run.settings, "gates", **how)
    layers = train_gates(run.mixture.backbone, bank.adapters, run.kept.rows, plan, into.path)
    return TrainedExtra({}, GateRouter(run.mixture.backbone, bank.adapters, Gates(bank.names, layers)))


def _base_work(run: ElreaRun) -> float:
    return TRAINING * run.row_count * run.settings.training.epochs


def _cluster_work(run: ElreaRun) -> float:
    return TRAINING * run.row_count * run.settings.experts.expert_epochs


def _judged_work(run: ElreaRun) -> float:
    """Every fold leaves its own rows out, and is scored on them by all experts."""
    trained = (run.extras.judge_folds - 1) * (_base_work(run) + _cluster_work(run))
    return trained + len(run.mixture.bank) * run.row_count


def _unlike_work(run: ElreaRun) -> float:
    """Some rows are scored by all experts; how many is known when they are read."""
    return refusing.UNLIKE_ROWS / 4 * len(run.mixture.bank)


def _embedding_work(run: ElreaRun) -> float:
    return EMBEDDING * run.row_count


def _little_work(run: ElreaRun) -> float:
    return run.row_count / 10


EXTRAS: dict[str, ExtraSpec[ElreaRun]] = {
    "random-clusters": ExtraSpec(_random_clusters, _cluster_work, together=True),
    "embedding-clusters": ExtraSpec(_embedding_clusters, _cluster_work, ("encoder",), together=True),
    "gradient-space": ExtraSpec(
        _gradient_space, lambda run: _cluster_work(run) + _embedding_work(run), ("encoder",), together=True
    ),
    "seeds": ExtraSpec(
        _seeds, lambda run: (run.extras.ensemble_size - 1) * _base_work(run), ("ensemble_size",), together=True
    ),
    "datasets": ExtraSpec(_datasets, _base_work, together=True),
    "gates": ExtraSpec(
        _gates,
        lambda run: TRAINING * run.row_count * run.extras.gate_epochs,
        ("gate_epochs", "gate_learning_rate"),
        together=True,
    ),
    "random-weights": ExtraSpec(_random_weights, _little_work),
    ONE_LORA: ExtraSpec(_one_lora, _cluster_work, together=True),
    "judged": ExtraSpec(fitted_routers.judged, _judged_work, ("judge_folds",), together=True),
    "unlike": ExtraSpec(refusing.unlike, _unlike_work, ("unlike",), together=True),
    "routing": ExtraSpec(fitted_routers.routing, _little_work),
    "membership": ExtraSpec(fitted_routers.membership, _little_work),
    "performance": ExtraSpec(fitted_routers.performance, _little_work, needs=("judged",)),
    "refusal": ExtraSpec(fitted_routers.refusing, _little_work, needs=("judged", "unlike")),
    "loss": ExtraSpec(fitted_routers.loss, _little_work, needs=("judged", "unlike")),
    "prefill": ExtraSpec(fitted_routers.prefill, lambda run: run.row_count, needs=("judged", "unlike"), together=True),
    "avengers": ExtraSpec(score_tables.avengers, _embedding_work, ("encoder",), needs=("judged",), together=True),
    "lorauter": ExtraSpec(score_tables.lorauter, _embedding_work, ("encoder",), needs=("judged",), together=True),
    "ariadne": ExtraSpec(score_tables.ariadne, _embedding_work, ("encoder",), together=True),
    "distilled": ExtraSpec(fitted_routers.distilled, lambda run: run.row_count, needs=("judged",), together=True),
}
"""By the name of the extra's folder."""
