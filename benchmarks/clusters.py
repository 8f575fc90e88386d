"""How many clusters the settings of `fit elrea` make of one set of rows, how large, and how pure by source.

`published` reads the paper's sentence literally: every cluster over five times the smallest is split, round after
round, whatever made the smallest one; `default` is what Coterie does (odd rows set aside, tiny clusters no yardstick,
at most ten clusters); `one_round` does not split at all. Each runs on the rows as they are, with one odd row more (a
random direction), and on a part of them in which the sources have very different shares.

Gradient features are computed once, as a fit at its default settings does; with `--folder` they are kept there.
"""

import argparse
import logging
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
from _harness import hardware_record, tell
from numpy.typing import NDArray

from coterie.artifacts import read_tensors
from coterie.backbone.loading import load_backbone
from coterie.data.batching import PromptFormat, tokenise
from coterie.data.examples import Example, load_examples
from coterie.experts import clustering
from coterie.experts.checkpoint import load_checkpoint
from coterie.experts.clustering import Clustering, cluster
from coterie.experts.training import train_adapter
from coterie.features.gradient import GradientFeatures, write_features
from coterie.methods.common import base_plan
from coterie.settings.commands import ElreaSettings
from coterie.settings.groups import ClusterSettings
from coterie.settings.reading import from_flat

SAMPLE = Path(__file__).parents[1] / "examples" / "data" / "train.jsonl"
UNBOUNDED = 10**6
SHARES = (1, 1, 1, 1 / 3, 1 / 6, 1 / 12)
"""Of every source's rows, by name, where sources are of different size; more sources have the last one's share."""


def gradient_features(model: str, examples: list[Example], folder: Path) -> NDArray:
    """Train a base adapter on the rows and compute their features, unless they lie in the folder already."""
    path = folder / "features" / "features.safetensors"
    if not path.exists():
        settings = from_flat(ElreaSettings, {"model": model, "data": ["rows"], "output": "none"})
        backbone = load_backbone(settings.model)
        rows = tokenise(PromptFormat(backbone.tokenizer), examples, settings.training.max_length).rows
        plan = base_plan(settings, "base", keep_epochs=True)
        (folder / "features").mkdir(parents=True, exist_ok=True)
        train_adapter(backbone, rows, plan, folder / "base", settings.lora)
        epochs = [folder / "base" / f"epoch-{epoch}" for epoch in range(settings.training.epochs)]
        checkpoints = [load_checkpoint(epoch, backbone.model) for epoch in epochs]
        features = GradientFeatures(backbone, checkpoints, settings.features, settings.seed)
        write_features(features, [row.prompt() for row in rows], folder / "features")
    return read_tensors(path)["features"].numpy()


def published(features: NDArray, settings: ClusterSettings, sources: list[str | None]) -> Clustering:
    """Cluster by the paper's sentence alone."""
    literal = settings.model_copy(update={"max_clusters": UNBOUNDED})
    with mock.patch.multiple(clustering, TINY=0.0, MOST_ODD=-1.0):  # every cluster measures, no row is odd
        return cluster(features, literal, sources=sources)


def described(found: Clustering, sources: list[str | None]) -> dict[str, object]:
    """Return what is compared: purity is the share of rows whose source is the commonest one of their cluster."""
    by_cluster = [
        Counter(s for s, own in zip(sources, found.labels, strict=True) if own == n) for n in range(found.count)
    ]
    pure = sum(max(own.values()) for own in by_cluster) / len(sources)
    rand = found.adjusted_rand_index
    return {
        "clusters": found.count,
        "sizes": found.sizes(),
        "purity": round(pure, 3),
        "adjusted_rand_index": None if rand is None else round(rand, 3),
    }


def uneven(sources: list[str | None]) -> list[int]:
    """Return the rows of a part in which sources have the shares above."""
    kept: list[int] = []
    for number, source in enumerate(sorted({source or "" for source in sources})):
        rows = [row for row, own in enumerate(sources) if (own or "") == source]
        kept += rows[: round(len(rows) * SHARES[min(number, len(SHARES) - 1)])]
    return sorted(kept)


def main() -> None:
    """Cluster in three ways and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default=str(SAMPLE), help="rows with a source each")
    parser.add_argument("--about", default="the sample data", help="what the result calls the rows")
    parser.add_argument("--folder", type=Path, help="keep features here, or take those that lie there")
    parser.add_argument("--quick", action="store_true", help="thirty rows only")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    flags = parser.parse_args()
    logging.getLogger("coterie").setLevel(logging.ERROR)
    examples = load_examples(flags.data, 30 if flags.quick else None)
    features = gradient_features(flags.model, examples, flags.folder or Path(tempfile.mkdtemp()))
    sources = [example.source for example in examples]
    odd = np.random.default_rng(0).normal(size=(1, features.shape[1]))
    part = uneven(sources)
    usual = ClusterSettings()
    results = {}
    for name, rows, own in (
        ("rows", features, sources),
        ("rows_and_an_odd_one", np.concatenate([features, odd]), [*sources, "odd"]),
        ("uneven_rows", features[part], [sources[row] for row in part]),
    ):
        results[name] = {
            "published": described(published(rows, usual, own), own),
            "default": described(cluster(rows, usual, sources=own), own),
            "one_round": described(cluster(rows, usual.model_copy(update={"cluster_rounds": 1}), sources=own), own),
        }
    settings = {"model": flags.model, "data": flags.about, "rows": len(examples), **usual.model_dump()}
    tell({"name": "clusters", "hardware": hardware_record(), "settings": settings, **results}, flags.output)


if __name__ == "__main__":
    main()
