"""ELREA's whole loop (arXiv 2502.00089): base adapter, gradient features, clusters, one expert each, centroids."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from coterie import ranks
from coterie.artifacts import RunFolder, as_path, check_output, run_folder, write_jsonl
from coterie.backbone.loading import Backbone, load_backbone
from coterie.combiners.logits import LogitCombiner
from coterie.data.batching import PromptFormat, Tokenised, TokenRow, tokenise
from coterie.data.devices import tell_idle
from coterie.data.examples import Example, spool_all
from coterie.data.spooled import Chosen
from coterie.errors import CoterieError
from coterie.experts.bank import load_bank
from coterie.experts.checkpoint import load_checkpoint
from coterie.experts.clustering import cluster
from coterie.experts.fresh_adapter import check_fresh_adapter
from coterie.experts.names import BASE
from coterie.experts.training import train_adapter
from coterie.features.gradient import CentredRows, GradientFeatures, counted_blocks, read_features, write_features
from coterie.features.growing_text import FeatureExtractor
from coterie.methods.common import (
    Data,
    ExpertJob,
    base_plan,
    copy_expert,
    hash_examples,
    join_logs,
    named_sources,
    origin,
    train_clusters,
    training_key,
)
from coterie.mixture import Mixture
from coterie.progress import GRADIENTS, TRAINING, part, whole
from coterie.routers.centroid import CentroidRouter, centroids_of
from coterie.settings.commands import ElreaSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat, values_of

CHECKPOINTS = "checkpoints"


def elrea(model: str, data: Data, *, output: str | Path, **settings: Any) -> Mixture:  # noqa: ANN401
    """Fit an ensemble of low-rank expert adapters (ELREA, arXiv 2502.00089) and return the mixture.

    Args:
        model: base model: hub id, local folder, .gguf file, or an alias.
        data: training data: a JSONL file or `datasets` source, several of them, or examples.
        output: folder to write the mixture to.
        **settings: fields of `ElreaSettings` and its groups by their plain names, such as rank=16 or clusters=8.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    named, examples = named_sources(data)
    flat = {"model": model, "data": named, "output": str(output), **settings}
    return fit_elrea(from_flat(ElreaSettings, flat), examples or None)


@takes_fields(ElreaSettings)
@ranks.joined()
def fit_elrea(settings: ElreaSettings, examples: list[Example] | None = None) -> Mixture:
    """Run the whole loop, by all processes that were launched.

    An interrupted run goes on where it stopped and ends with the same files.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    output = as_path(settings.output)
    backbone, prompts, kept, inputs = ranks.each(lambda: prepare(settings, examples))
    with run_folder(output, settings, inputs) as run, whole(settings.command, work_of(settings, len(kept.rows))):
        mixture = fit_experts(run, settings, backbone, prompts, kept)
    return replace(mixture, folder=output)


class Prepared(NamedTuple):
    """What a fit begins with: the base model, the data as it reads them, and the hashes of both."""

    backbone: Backbone
    prompts: PromptFormat
    kept: Tokenised
    inputs: dict[str, str]


def prepare(settings: ElreaSettings, examples: list[Example] | None) -> Prepared:
    """Load the data, unless they are given, and the base model, and refuse what cannot be fitted.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    check_output(as_path(settings.output), settings)
    rows = spool_all(settings.data, settings.limit, settings.reading) if examples is None else examples
    check_enough(len(rows), settings)
    backbone = load_backbone(settings.model)
    tell_idle(backbone.device)
    check_fresh_adapter(backbone, settings.lora)
    counted_blocks(settings.features.blocks, len(backbone.blocks))
    prompts = PromptFormat(backbone.tokenizer, settings.training.system_prompt, settings.reading)
    kept = tokenise(prompts, rows, settings.training.max_length, backbone.positions)
    check_enough(len(kept.rows), settings)
    inputs = {"data": hash_examples(rows), "base_model": backbone.identity.sha256}
    return Prepared(backbone, prompts, kept, inputs)


def work_of(settings: ElreaSettings, rows: int) -> dict[str, float]:
    """Return what the parts of `fit_experts` weigh (see `coterie.progress`)."""
    return {
        "base": TRAINING * rows * settings.training.epochs,
        "features": GRADIENTS * rows * settings.training.epochs,
        "experts": TRAINING * rows * settings.experts.expert_epochs,
    }


def check_enough(count: int, settings: ElreaSettings) -> None:
    """Refuse to cluster fewer rows than clusters.

    Raises:
        CoterieError: naming both numbers.
    """
    if count < settings.clustering.clusters:
        raise CoterieError(
            f"{count} examples cannot make {settings.clustering.clusters} clusters; give more data or fewer --clusters"
        )


def fit_experts(
    run: RunFolder, settings: ElreaSettings, backbone: Backbone, prompts: PromptFormat, kept: Tokenised
) -> Mixture:
    """Train the base adapter, cluster the rows, train an expert for each cluster, and write the mixture."""
    # 1) the base adapter: its epochs go to `checkpoints`, its last state is the expert `base`
    with part("base"):
        trained = _trained_base(run, settings, backbone, kept.rows)
    names = [f"epoch-{epoch}" for epoch in range(settings.training.epochs)]
    base = copy_expert(run, BASE, trained)
    # 2) what every row's gradients at the checkpoints look like, and the clusters they make
    checkpoints = [load_checkpoint(trained / name, backbone.model) for name in names]
    gradients = GradientFeatures(backbone, checkpoints, settings.features, settings.seed)
    with part("features"):
        features = _features(run, settings, gradients, kept.rows)
    centre = features.mean(dim=0) if settings.features.form == "adam-centred" else None
    shifted = features if centre is None else CentredRows(features, centre)
    sources = [row.source for row in kept.rows]
    clustering = cluster(shifted, settings.clustering, sources=sources, seed=settings.seed)
    # 3) an expert for each cluster, and the router that finds it
    labels, count = clustering.labels, clustering.count
    with part("experts"):
        experts = train_clusters(run, "cluster", kept.rows, labels, count, backbone, settings, base)
    record = {"checkpoints": names, "features": settings.features.model_dump(), "seed": settings.seed}
    centroids = centroids_of(shifted, labels, count)
    extractor = FeatureExtractor("gradient", gradients, record)
    router = CentroidRouter.by_cluster(extractor, centroids, list(experts), base=BASE, centre=centre)
    bank = load_bank({BASE: base, **experts}, backbone.model)
    mixture = Mixture(backbone, bank, router, LogitCombiner(), prompts, "elrea", run.path)
    # 4) the records
    rows = zip(kept.examples, labels, strict=True)
    records = ({**origin(example), "cluster": f"cluster-{label}"} for example, label in rows)
    write_jsonl(run.path / "clusters.jsonl", records)
    mixture.write_description(run.path, {"clustering": clustering.record()})
    join_logs(run, [trained, *dict.fromkeys(folder for folder in experts.values() if folder != base)])
    return mixture


def _trained_base(run: RunFolder, settings: ElreaSettings, backbone: Backbone, rows: Sequence[TokenRow]) -> Path:
    """Train the base adapter, and return the folder that holds it as it was after every epoch."""
    plan = base_plan(settings, BASE, keep_epochs=True)
    run.renamed("training/base", CHECKPOINTS)
    return run.stage(
        CHECKPOINTS,
        lambda folder: train_adapter(backbone, rows, plan, folder, settings.lora),
        training_key(backbone, ExpertJob(rows, plan, settings.lora)),
        together=True,
    )


def _features(run: RunFolder, settings: ElreaSettings, gradients: GradientFeatures, rows: Sequence[TokenRow]) -> Tensor:
    """Write the gradient features of all prompts, and read them back."""
    prompts = Chosen(rows, range(len(rows)), TokenRow.prompt)
    made_from = {CHECKPOINTS: run.key(CHECKPOINTS), "seed": settings.seed, **values_of(settings.features)}
    folder = run.stage("features", lambda folder: write_features(gradients, prompts, folder), made_from, together=True)
    return read_features(folder, len(rows), "fit again")
