"""What the methods of the table need beyond a fitted run: more experts, gates, judgements, routers fitted to those.

Each ingredient is a folder `methods/<name>` inside the run's folder, trained once: `ingredient.json` says how, experts
are plain PEFT folders, the rest is safetensors.
"""

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coterie.artifacts import FORMAT, RunFolder, read_json, read_tensors, write_json, write_jsonl, write_tensors
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank, check_names, load_bank
from coterie.experts.clustering import cluster
from coterie.experts.gating import train_gates
from coterie.methods.judging import judge
from coterie.methods.recipe import Recipe
from coterie.methods.stages import BASE, base_plan, cluster_record, cluster_rows, train_clusters, train_expert
from coterie.mixture import Mixture, RouterParts, load_router
from coterie.mixture.loading import describe_by_embedding
from coterie.routers.base import Gates, Router
from coterie.routers.centroid import CentroidRouter, centroids_of
from coterie.routers.described import FeatureRouter
from coterie.routers.gate import GateRouter
from coterie.routers.judgement import Judgement
from coterie.routers.loss import LossRouter, fit_loss_router
from coterie.routers.performance import PerformanceRouter, make_pilots
from coterie.routers.source import SourceRouter

logger = logging.getLogger(__name__)

RECORD = "ingredient.json"
JUDGEMENT = "judgement.safetensors"


@dataclass(frozen=True)
class Made:
    """What making an ingredient gave: the experts' folders by name, a router, and facts that are only kept."""

    experts: Mapping[str, Path]
    router: Router | None = None
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of ingredient.

    Attributes:
        make: makes it, in a folder that may hold what an interrupted making left.
        settings: the fields of `GridSettings` that it depends on.
        needs: ingredients that it is made from.
    """

    make: Callable[[Recipe, RunFolder], Made]
    settings: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ingredient:
    """An ingredient, loaded: its experts, its router if it has one, and the seconds that its training took."""

    bank: ExpertBank
    router: Router | None
    folder: Path
    seconds: float


def prepare(recipe: Recipe, names: Iterable[str]) -> dict[str, Ingredient]:
    """Train the ingredients that the run's folder lacks and load them all; what they are made from comes first.

    Raises:
        CoterieError: when one was trained with other settings, or its files are broken.
    """
    order: list[str] = []
    for name in names:
        order += [needed for needed in (*KINDS[name].needs, name) if needed not in order]
    for name in order:
        _make_once(recipe, name)
    return {name: load_ingredient(recipe.mixture, name) for name in order}


def load_ingredient(mixture: Mixture, name: str) -> Ingredient:
    """Load an ingredient of a mixture's folder.

    Raises:
        CoterieError: when it was not trained yet, or its files are broken.
    """
    assert mixture.folder is not None  # whoever asks has read the folder
    folder = mixture.folder / "methods" / name
    record = read_json(folder / RECORD)
    try:
        experts = list(record["experts"])
        router_record = record["router"]
    except (KeyError, TypeError) as error:
        raise CoterieError(f"{folder / RECORD} lacks {error}; delete {folder} and train it again") from error
    check_names(experts)
    bank = load_bank({expert: folder / "experts" / expert for expert in experts}, mixture.backbone.model)
    parts = RouterParts(folder / "router", mixture.folder, mixture.backbone, mixture.bank)
    router = load_router(router_record, parts) if router_record else None
    return Ingredient(bank, router, folder, float(record.get("seconds") or 0))


def read_judgement(ingredient: Ingredient) -> Judgement:
    """Read how the experts of a run were judged.

    Raises:
        CoterieError: when the file is missing or broken.
    """
    record = read_json(ingredient.folder / RECORD)
    return Judgement.from_tensors(tuple(record["judged"]), read_tensors(ingredient.folder / JUDGEMENT))


def _make_once(recipe: Recipe, name: str) -> None:
    kind = KINDS[name]
    settings = {field: getattr(recipe.grid, field) for field in kind.settings}
    folder = recipe.ingredients / name
    if folder.exists():
        _check_same(folder, settings)
        return
    logger.info("training what the run lacks: %s", name)
    run = RunFolder(output=recipe.folder, path=recipe.folder)

    def make(working: Path) -> None:
        started = time.perf_counter()
        made = kind.make(recipe, RunFolder(output=working, path=working))
        shutil.rmtree(working / "training", ignore_errors=True)
        shutil.rmtree(working / "working", ignore_errors=True)
        record = {
            "format": FORMAT,
            "settings": settings,
            "experts": list(made.experts),
            "router": made.router.save(working / "router") if made.router else None,
            "seconds": round(time.perf_counter() - started, 1),
            **(made.facts or {}),
        }
        write_json(working / RECORD, record)

    run.stage(f"methods/{name}", make)
    with suppress(OSError):  # another ingredient may be under way in there
        (recipe.folder / "working" / "methods").rmdir()
        (recipe.folder / "working").rmdir()


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    before = read_json(folder / RECORD).get("settings")
    for field, value in settings.items():
        if not isinstance(before, dict) or before.get(field) != value:
            flag = field.replace("_", "-")
            trained = before.get(field) if isinstance(before, dict) else None
            raise CoterieError(
                f"{folder} was trained with --{flag} {trained}, not {value}; ask for that value, or delete the folder"
            )


# ------------------------------------------------------------------------------------------------------ more experts


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


KINDS: dict[str, Kind] = {
    "random-clusters": Kind(_random_clusters),
    "embedding-clusters": Kind(_embedding_clusters, ("encoder",)),
    "seeds": Kind(_seeds, ("ensemble_size",)),
    "datasets": Kind(_datasets),
    "gates": Kind(_gates, ("gate_epochs", "gate_learning_rate")),
    "judged": Kind(_judged, ("judge_folds",)),
    "performance": Kind(_performance, needs=("judged",)),
    "loss": Kind(_loss, needs=("judged",)),
}
"""Everything that can be trained beyond a fitted run, by the name of its folder."""
