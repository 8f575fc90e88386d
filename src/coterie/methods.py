"""The published methods as rows of one table, and the functions that make their mixtures.

A method is a way to fill three places: the bank, the router and the combiner.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from coterie.artifacts import RunFolder, check_output, read_tensors, run_folder, write_jsonl
from coterie.backbone.loading import Backbone, load_backbone
from coterie.combiners.base import Combiner
from coterie.combiners.layers import LayerCombiner
from coterie.combiners.logits import LogitCombiner
from coterie.data.batching import Kept, PromptFormat, tokenise
from coterie.data.examples import Example, load_all
from coterie.errors import CoterieError, unknown_name
from coterie.experts.bank import load_bank
from coterie.experts.clustering import Clustering, cluster
from coterie.experts.training import TrainingPlan, load_checkpoint, read_log, train_adapter
from coterie.features.gradient import GradientFeatures, counted_blocks, write_features
from coterie.mixture import Mixture
from coterie.routers.base import Router, Routing
from coterie.routers.centroid import GradientCentroidRouter, centroids_of
from coterie.routers.fixed import one_hot, uniform
from coterie.settings import ElreaSettings, from_flat

logger = logging.getLogger(__name__)

BASE = "base"
BACKBONE = "backbone"


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        bank: where its experts come from.
        router: how prompts find them.
        combiner: where they meet.
        paper: source.
        cell: router and combiner on the bank of a fitted mixture.
    """

    bank: str
    router: str
    combiner: str
    paper: str
    cell: Callable[[Mixture], tuple[Router, Combiner]]


class NormalisedRouter:
    """Another router's weights, scaled to sum 1."""

    kind = "normalised"

    def __init__(self, router: Router) -> None:
        """Wrap a router."""
        self.router = router

    def route(self, prompts: Sequence[Any]) -> Routing:
        """Return the wrapped router's weights, normalised."""
        return self.router.route(prompts).normalized()

    def save(self, folder: Path) -> dict[str, Any]:
        """Refuse: the wrapped router is what a mixture keeps."""
        raise CoterieError(
            "a normalised router is made for a comparison and is not saved; save the mixture it comes from"
        )


def _elrea(mixture: Mixture) -> tuple[Router, Combiner]:
    return mixture.router, LogitCombiner()


METHODS: dict[str, Method] = {
    "elrea": Method(
        "base adapter -> gradient features -> BIRCH clusters -> one LoRA each, plus base",
        "gradient centroids",
        "logits",
        "arXiv 2502.00089",
        _elrea,
    ),
    "uniform-weights": Method(
        "ELREA's",
        "uniform",
        "logits",
        "arXiv 2502.00089",
        lambda m: (uniform(_fitted(m)), LogitCombiner()),
    ),
    "moe-routing": Method(
        "ELREA's",
        "gradient centroids, normalised",
        "layers",
        "arXiv 2502.00089",
        lambda m: (NormalisedRouter(m.router), LayerCombiner()),
    ),
    "base": Method(
        "base adapter",
        "fixed",
        "logits",
        "arXiv 2502.00089",
        lambda m: (one_hot(BASE, m.bank.names), LogitCombiner()),
    ),
    "backbone": Method(
        "none",
        "fixed",
        "logits",
        "arXiv 2502.00089",
        lambda m: (one_hot(BACKBONE, m.bank.names), LogitCombiner()),
    ),
}


def _fitted(mixture: Mixture) -> list[str]:
    return [name for name in mixture.bank.names if name != BACKBONE]


def method_named(name: str) -> Method:
    """Look a method up.

    Raises:
        CoterieError: when there is none of this name.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def elrea(model: str, data: str | Sequence[str] | Sequence[Example], *, output: str | Path, **settings: Any) -> Mixture:  # noqa: ANN401
    """Fit an ensemble of low-rank expert adapters (ELREA, arXiv 2502.00089) and return the mixture.

    Args:
        model: base model: hub id, local folder, .gguf file, or an alias.
        data: training data: a JSONL file or `datasets` source, several of them, or examples.
        output: folder to write the mixture to.
        **settings: fields of `ElreaSettings` and its groups by their plain names, such as rank=16 or clusters=8.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    in_memory = not isinstance(data, str) and bool(data) and isinstance(data[0], Example)
    names = ["(in memory)"] if in_memory else [data] if isinstance(data, str) else list(data)
    flat = {"model": model, "data": names, "output": str(output), **settings}
    return fit_elrea(from_flat(ElreaSettings, flat), list(data) if in_memory else None)  # pyrefly: ignore


def fit_elrea(settings: ElreaSettings, examples: list[Example] | None = None) -> Mixture:
    """Run the whole loop; an interrupted run goes on where it stopped and ends with the same files.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    output = Path(settings.output)
    check_output(output, overwrite=settings.overwrite)
    examples = load_all(settings.data, settings.limit) if examples is None else examples
    _check_enough(len(examples), settings)
    backbone = load_backbone(settings.model)
    counted_blocks(settings.features.blocks, len(backbone.blocks))
    prompts = PromptFormat(backbone.tokenizer, settings.training.system_prompt)
    kept = tokenise(prompts, examples, settings.training.max_length)
    _check_enough(len(kept.rows), settings)
    inputs = {"data": _hash_examples(examples), "base_model": backbone.identity.sha256}
    with run_folder(output, "fit elrea", settings.model_dump(), inputs) as run:
        mixture = _fit(run, settings, backbone, prompts, kept)
    return replace(mixture, folder=output)


def _check_enough(count: int, settings: ElreaSettings) -> None:
    if count < settings.clustering.clusters:
        raise CoterieError(
            f"{count} examples cannot make {settings.clustering.clusters} clusters; give more data or fewer --clusters"
        )


def _fit(run: RunFolder, settings: ElreaSettings, backbone: Backbone, prompts: PromptFormat, kept: Kept) -> Mixture:
    base = _train_base(run, settings, backbone, kept)
    names = [f"epoch-{epoch}" for epoch in range(settings.training.epochs)]
    checkpoints = [load_checkpoint(run.path / "checkpoints" / name, backbone.model) for name in names]
    describe = GradientFeatures(backbone, checkpoints, settings.features, settings.seed)
    features = _features(run, describe, kept)
    centre = features.mean(dim=0) if settings.features.form == "adam-centred" else None
    shifted = features if centre is None else features - centre
    sources = [example.source for example in kept.examples]
    clustering = cluster(shifted.numpy(), settings.clustering, sources=sources, seed=settings.seed)
    experts = _train_experts(run, settings, backbone, kept, clustering)
    record = {"checkpoints": names, "features": settings.features.model_dump(), "seed": settings.seed}
    centroids = centroids_of(shifted, clustering.labels, clustering.count)
    router = GradientCentroidRouter(describe, centroids, list(experts), base=BASE, centre=centre, record=record)
    bank = load_bank({BASE: base, **experts}, backbone.model)
    mixture = Mixture(backbone, bank, router, LogitCombiner(), prompts, "elrea", run.path)
    _write_records(run, mixture, kept, clustering)
    return mixture


def _plan(settings: ElreaSettings, label: str, *, is_expert: bool) -> TrainingPlan:
    training, experts = settings.training, settings.experts
    return TrainingPlan(
        epochs=experts.expert_epochs if is_expert else training.epochs,
        learning_rate=experts.expert_learning_rate if is_expert else training.learning_rate,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        seed=settings.seed,
        report_to=training.report_to,
        label=label,
        keep_epochs=not is_expert,
    )


def _train_base(run: RunFolder, settings: ElreaSettings, backbone: Backbone, kept: Kept) -> Path:
    """Train the base adapter; its epochs go to `checkpoints`, its last state is the expert `base`."""

    def train(folder: Path) -> None:
        train_adapter(backbone, kept.rows, _plan(settings, BASE, is_expert=False), folder, settings.lora)

    trained = run.stage("training/base", train)
    for epoch in range(settings.training.epochs):
        run.stage(f"checkpoints/epoch-{epoch}", _copier(trained / f"epoch-{epoch}"))
    return run.stage(f"experts/{BASE}", _adapter_copier(trained))


def _copier(source: Path) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)

    return copy


def _adapter_copier(source: Path) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(source / name, folder / name)

    return copy


def _train_experts(
    run: RunFolder, settings: ElreaSettings, backbone: Backbone, kept: Kept, clustering: Clustering
) -> dict[str, Path]:
    """Continue the base adapter on every cluster; return the experts' folders by name."""
    folders = {}
    for number in range(clustering.count):
        name = f"cluster-{number}"
        rows = [kept.rows[i] for i in clustering.members(number)]
        plan = _plan(settings, f"{name} ({number + 1} of {clustering.count})", is_expert=True)
        start = run.path / "experts" / BASE

        def train(folder: Path, rows: list = rows, plan: TrainingPlan = plan, start: Path = start) -> None:
            train_adapter(backbone, rows, plan, folder, start)

        trained = run.stage(f"training/{name}", train)
        folders[name] = run.stage(f"experts/{name}", _adapter_copier(trained))
    return folders


def _features(run: RunFolder, describe: GradientFeatures, kept: Kept) -> Tensor:
    prompts = [row.prompt() for row in kept.rows]
    folder = run.stage("features", lambda folder: write_features(describe, prompts, folder))
    return read_tensors(folder / "features.safetensors")["features"]


def _write_records(run: RunFolder, mixture: Mixture, kept: Kept, clustering: Clustering) -> None:
    labels = zip(kept.examples, clustering.labels, strict=True)
    rows = [{"id": example.id, "source": example.source, "cluster": f"cluster-{label}"} for example, label in labels]
    write_jsonl(run.path / "clusters.jsonl", rows)
    logs = [entry for name in mixture.bank.names for entry in read_log(run.path / "training" / name)]
    write_jsonl(run.path / "metrics.jsonl", logs)
    mixture.write_description(run.path, {"clustering": clustering.record()})
    shutil.rmtree(run.path / "training")


def _hash_examples(examples: Sequence[Example]) -> str:
    text = json.dumps([asdict(example) for example in examples], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
