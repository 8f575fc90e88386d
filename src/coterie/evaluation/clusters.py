"""What an evaluation tells of the run's clusters: who is in them, a map of the features, and how stable they are."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coterie.artifacts import read_run_record
from coterie.errors import CoterieError
from coterie.experts.clustering import clustered
from coterie.features.gradient import FEATURES_FILE, read_features
from coterie.mixture.folder import read_mixture_record
from coterie.records.evaluation import FeatureMap, MapPoint
from coterie.records.mixture import TrainingRow
from coterie.records.schema import read_rows
from coterie.settings.auto import AutoSettings
from coterie.settings.reading import checked

AGAIN = "get the folder again, or fit again"
MOST_POINTS = 2000
SEEDS = (0, 1, 2)
SHARE = 0.8  # of the rows that each seed's clusters are fitted on
PCA_FIRST = 50  # dimensions that t-SNE starts from
PERPLEXITY = 30


def cluster_records(folder: Path | None) -> dict[str, Any]:
    """Read how the training rows were clustered, where the mixture's folder tells."""
    if folder is None or not (folder / "clusters.jsonl").exists():
        return {"clusters": {}, "composition": {}, "clustering": {}}
    rows = read_rows(TrainingRow, folder / "clusters.jsonl", AGAIN)
    return {
        "clusters": _counts(rows, lambda row: row.source or ""),
        "composition": _counts(rows, lambda row: kind_of(row.source, row.category)),
        "clustering": read_mixture_record(folder).clustering,
    }


def kind_of(source: str | None, category: str | None) -> str:
    """Name a source and category, as far as there are any."""
    return " / ".join(str(part) for part in (source, category) if part)


def _counts(rows: Sequence[TrainingRow], key: Callable[[TrainingRow], str]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.cluster, Counter())[key(row)] += 1
    return {name: dict(counts[name]) for name in sorted(counts, key=lambda name: (len(name), name))}


def feature_map(folder: Path | None) -> FeatureMap | None:
    """Lay the training rows' features out in the plane, with the clusters of several seeds (ELREA fig. 5).

    Every seed's clusters are fitted on another 80% of the rows. None where the folder holds no features.
    """
    from sklearn.metrics import adjusted_rand_score

    if folder is None or not (folder / "features" / FEATURES_FILE).exists():
        return None
    rows = read_rows(TrainingRow, folder / "clusters.jsonl", AGAIN)
    features = read_features(folder / "features", len(rows), AGAIN).numpy()
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:MOST_POINTS])
    features, rows = features[chosen], [rows[i] for i in chosen]
    labels = _labels_by_seed(folder, features)
    kind, places = _layout(features)
    points = tuple(
        MapPoint(
            x=round(float(x), 3),
            y=round(float(y), 3),
            source=row.source or "",
            category=row.category,
            clusters=tuple(int(own[i]) for own in labels),
        )
        for i, ((x, y), row) in enumerate(zip(places, rows, strict=True))
    )
    sources = [str(row.source) for row in rows]
    pairs = [adjusted_rand_score(one, other) for one, other in itertools.combinations(labels, 2)]
    agreement = [float(adjusted_rand_score(sources, own)) if len(set(sources)) > 1 else None for own in labels]
    return FeatureMap(
        kind=kind,
        points=points,
        seeds=SEEDS[: len(labels)],
        stability=float(np.mean(pairs)) if pairs else None,
        agreement=tuple(agreement),
    )


def _labels_by_seed(folder: Path, features: NDArray) -> list[NDArray]:
    """Cluster as the folder's run did, every seed on a part of the rows."""
    settings = checked(AutoSettings, read_run_record(folder / "run.yaml")["settings"]).clustering
    sample = max(settings.clusters, int(SHARE * len(features)))
    settings = settings.model_copy(update={"cluster_sample": sample})
    labels = []
    for seed in SEEDS:
        try:
            labels.append(np.array(clustered(features, settings, seed=seed).labels))
        except CoterieError:  # so few or so equal rows that a part of them does not make as many clusters
            continue
    return labels


def _layout(features: NDArray) -> tuple[str, NDArray]:
    """Place rows in the plane by t-SNE of their unit features, or by PCA where there are too few for it."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    if len(unit) < 3 * 5:
        return "PCA", PCA(2, random_state=0).fit_transform(unit)
    first = PCA(min(PCA_FIRST, *unit.shape), random_state=0).fit_transform(unit)
    perplexity = min(PERPLEXITY, (len(unit) - 1) / 3)
    return "t-SNE", TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(first)
