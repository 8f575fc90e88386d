"""Grouping training rows by their features, as ELREA does (arXiv 2502.00089, 3.2 and appendix).

BIRCH is fitted on a sample; clusters that stay more than five times as large as the smallest are split again, in at
most three rounds with smaller targets. Read literally, one odd row that makes a cluster of its own has every other
cluster split in every round; the paper's own counts (5, then 8, then 10) say that this was not meant. So clusters are
fitted without odd rows, tiny ones are no yardstick, and splitting ends at `max_clusters`.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from coterie import ranks
from coterie.data.row_selection import EmbeddedRows
from coterie.errors import CoterieError
from coterie.settings.groups import ClusterSettings

logger = logging.getLogger(__name__)

OVERSIZE = 5  # a cluster this many times larger than the smallest is split again
TINY = 1 / 20  # of an even share of the rows: a smaller cluster is no yardstick
HANDFUL = 8  # rows that are few for an expert of its own
MOST_ODD = 1 / 20  # of the rows: where more lie apart, that is how the data is
LEAVES_PER_CLUSTER = 10  # a BIRCH tree with fewer leaves than this collapses into one giant cluster
FINEST = 1e-6  # rows that are nearer than this share of the longest row's length count as equal
PCA_DIMENSIONS = 256
LLOYD_STEPS = 100
BLOCK_ROWS = 2048  # that are assigned at a time: 128 MiB at 8,192 dimensions

Assign = Callable[[NDArray], NDArray]
"""Tells the group of every row of a block."""


@dataclass(frozen=True)
class Clustering:
    """A cluster for every row, numbered from the largest to the smallest.

    Attributes:
        labels: cluster of every row.
        count: number of clusters.
        method: how they were found.
        adjusted_rand_index: agreement with the rows' sources, where they have any.
    """

    labels: tuple[int, ...]
    count: int
    method: str = "birch"
    adjusted_rand_index: float | None = None

    def sizes(self) -> list[int]:
        """Return the number of rows of each cluster."""
        counts = Counter(self.labels)
        return [counts[cluster] for cluster in range(self.count)]

    def record(self) -> dict[str, Any]:
        """Return what is kept beside the mixture: method, sizes and agreement with the sources."""
        return {"method": self.method, "sizes": self.sizes(), "adjusted_rand_index": self.adjusted_rand_index}


def cluster(
    features: EmbeddedRows | Float[NDArray[np.floating], "row dimension"],
    settings: ClusterSettings,
    *,
    sources: Sequence[str | None] = (),
    seed: int = 0,
) -> Clustering:
    """Cluster rows by their features, of which a sample and a block are in memory at a time.

    The first round asks for `settings.clusters` groups; each later round takes the groups that are more than five times
    as large as the smallest, the largest first, and splits each into one group fewer than the round before asked for,
    while that makes no more than `settings.max_clusters`. Groups of less than a twentieth of an even share are not what
    others are measured by. Odd rows (see `odd_rows`) join the group that they are nearest to when all are made.

    Of several processes the first one clusters for all, since another machine might round otherwise.

    Raises:
        CoterieError: when there are fewer rows than clusters, or so many equal ones that too few groups exist.
    """
    how: dict[str, Any] = {"sources": sources, "seed": seed, "tell": logger.info}
    found: dict[str, Any] = ranks.by_first(lambda: asdict(clustered(features, settings, **how)))
    result = Clustering(tuple(found.pop("labels")), **found)
    for line in describe(result, sources):
        logger.info(line)
    few = [f"cluster-{number} {size}" for number, size in enumerate(result.sizes()) if size < HANDFUL]
    if few:
        logger.warning(
            "few rows to train an expert on: %s; ask for fewer --clusters or --cluster-rounds, or give more data",
            ", ".join(few),
        )
    return result


def clustered(
    features: EmbeddedRows | Float[NDArray[np.floating], "row dimension"],
    settings: ClusterSettings,
    *,
    sources: Sequence[str | None] = (),
    seed: int = 0,
    tell: Callable[..., object] = logger.debug,
) -> Clustering:
    """Do what `cluster` does in this process alone, and tell nobody of it unless it is said how.

    Raises:
        CoterieError: as `cluster`.
    """
    if len(features) < settings.clusters:
        raise CoterieError(
            f"{len(features)} examples cannot make {settings.clusters} clusters; give more data or fewer --clusters"
        )
    rows = _PreparedRows(features, settings, seed)
    odd = _odd_rows(rows, settings, seed)
    ordinary = np.flatnonzero(~odd)
    labels = _split(rows, ordinary, settings.clusters, settings, seed)
    found = len(np.unique(labels))
    if found < settings.clusters:
        finer = "" if settings.cluster_threshold is None else " or a smaller --cluster-threshold"
        raise CoterieError(
            f"the examples fall into {found} groups only, not the {settings.clusters} asked for (many are equal); "
            f"ask for fewer --clusters{finer}"
        )
    for round_number in range(1, settings.cluster_rounds):
        labels = _resplit(rows, ordinary, labels, settings.clusters - round_number, settings, seed, tell)
    if odd.any():
        tell("%d rows lie far from all others: no cluster is made for them, they join the nearest", odd.sum())
        labels = _with_odd_rows(rows, odd, labels)
    # numbered from the largest to the smallest, ties by their first row
    values, first, inverse, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    labels = np.argsort(np.lexsort((first, -counts)))[inverse]
    agreement = None
    if len(set(sources)) > 1:
        from sklearn.metrics import adjusted_rand_score

        agreement = float(adjusted_rand_score([source or "" for source in sources], labels))
    return Clustering(tuple(labels.tolist()), len(values), settings.cluster_method, agreement)


def describe(clustering: Clustering, sources: Sequence[str | None] = ()) -> list[str]:
    """Say how large every cluster is and which sources it is made of, largest share first."""
    lines = []
    for number, size in enumerate(clustering.sizes()):
        own = [source or "-" for source, label in zip(sources, clustering.labels, strict=False) if label == number]
        made_of = ", ".join(f"{name} {count}" for name, count in Counter(own).most_common())
        lines.append(f"cluster-{number}: {size} rows" + (f" ({made_of})" if any(sources) else ""))
    if clustering.adjusted_rand_index is not None:
        lines.append(f"adjusted Rand index of clusters and sources: {clustering.adjusted_rand_index:.2f}")
    return lines


class _PreparedRows:
    """Features in the form in which they are compared: float64, of length 1, of fewer dimensions, as settings say."""

    def __init__(self, features: EmbeddedRows | NDArray, settings: ClusterSettings, seed: int) -> None:
        self._features, self._normalise = features, settings.normalise_features
        self._pca = None
        if settings.cluster_method.endswith("-pca"):
            from sklearn.decomposition import PCA

            sample = self.take(_sample(len(features), settings, seed))
            with np.errstate(invalid="ignore"):  # rows that all are equal have no variance to take shares of
                self._pca = PCA(min(PCA_DIMENSIONS, *sample.shape), random_state=seed).fit(sample)

    def __len__(self) -> int:
        return len(self._features)

    def take(self, numbers: Int[NDArray, " row"]) -> NDArray:
        """Read the rows with these numbers."""
        rows = np.asarray(self._features[numbers], dtype=np.float64)
        rows = _unit(rows) if self._normalise else rows
        return rows if self._pca is None else self._pca.transform(rows)

    def blocks(self, numbers: Int[NDArray, " row"]) -> Iterator[tuple[slice, NDArray]]:
        """Read the rows with these numbers, some at a time, each time with the places that they have among these."""
        for start in range(0, len(numbers), BLOCK_ROWS):
            yield (place := slice(start, start + BLOCK_ROWS)), self.take(numbers[place])


def _sample(count: int, settings: ClusterSettings, seed: int) -> Int[NDArray, " sampled"]:
    """Draw the numbers of the rows by which all of them are known."""
    size = min(count, max(settings.cluster_sample, settings.clusters))
    return np.random.default_rng(seed).choice(count, size, replace=False)


def _unit(rows: NDArray) -> NDArray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _split(
    rows: _PreparedRows, numbers: Int[NDArray, " row"], target: int, settings: ClusterSettings, seed: int
) -> Int[NDArray, " row"]:
    """Split some rows into `target` groups, fitted on a sample; fewer come out only where too many rows are equal."""
    size = min(len(numbers), max(settings.cluster_sample, target))
    sample = rows.take(numbers[np.sort(np.random.default_rng(seed).choice(len(numbers), size, replace=False))])
    fit = _birch if settings.cluster_method.startswith("birch") else _kmeans
    nearest = fit(sample, target, settings, seed)
    labels = np.empty(len(numbers), dtype=np.int64)
    for place, block in rows.blocks(numbers):
        labels[place] = nearest(block)
    return labels


def _kmeans(sample: NDArray, target: int, settings: ClusterSettings, seed: int) -> Assign:
    """Fit k-means on the sample, spherical or not."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    is_spherical = settings.cluster_method.startswith("spherical")
    sample = _unit(sample) if is_spherical else sample
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: told by the caller
        means = KMeans(target, n_init=10, random_state=seed).fit(sample)
    if not is_spherical:
        return means.predict
    centres = spherical_centres(sample, means.cluster_centers_)
    return lambda rows: np.argmax(_unit(rows) @ centres.T, axis=1)


def _birch(sample: NDArray, target: int, settings: ClusterSettings, seed: int) -> Assign:
    """Fit BIRCH on the sample; unless a leaf radius is given, it is halved until there are enough leaves."""
    from sklearn.cluster import Birch
    from sklearn.exceptions import ConvergenceWarning

    threshold = settings.cluster_threshold
    radius = leaf_radius(nearest_distances(sample)) if threshold is None else threshold
    wanted = min(LEAVES_PER_CLUSTER * target, len(np.unique(sample, axis=0)))
    finest = FINEST * np.linalg.norm(sample, axis=1).max()
    while True:
        with warnings.catch_warnings():  # too few leaves is told by the error above, or mended by a finer radius here
            warnings.simplefilter("ignore", ConvergenceWarning)
            tree = Birch(threshold=radius, n_clusters=target).fit(sample)
        leaves = len(tree.subcluster_centers_)
        if threshold is not None or leaves >= wanted or radius <= finest:
            break
        radius /= 2
    return tree.predict


def nearest_distances(rows: Float[NDArray[np.floating], "row dimension"]) -> Float[NDArray, " row"]:
    """Return every row's distance to the nearest other one; 0 where that is less than rounding."""
    squares = (rows**2).sum(axis=1)
    nearest = np.empty(len(rows))
    for start in range(0, len(rows), 1024):
        block = slice(start, start + 1024)
        distances = squares[block, None] + squares - 2 * rows[block] @ rows.T
        distances[np.arange(len(distances)), np.arange(start, start + len(distances))] = np.inf
        nearest[block] = distances.min(axis=1)
    return np.sqrt(np.where(nearest > FINEST**2 * squares.max(), nearest, 0))


def leaf_radius(nearest: Float[NDArray, " row"]) -> float:
    """Choose BIRCH's threshold from the data: half the median distance to the nearest neighbour.

    A leaf of two rows has half their distance as its radius, so about half of the rows may be merged with their
    neighbour and leaves stay far more numerous than clusters; a coarse threshold collapses everything into one leaf.
    """
    apart = nearest[nearest > 0]
    return float(np.median(apart) / 2) if len(apart) else 1.0


def _odd_rows(rows: _PreparedRows, settings: ClusterSettings, seed: int) -> Bool[NDArray, " row"]:
    """Tell which rows of a sample are odd; none where the others would be too equal for as many clusters."""
    numbers = _sample(len(rows), settings, seed)
    sample = rows.take(numbers)
    odd = odd_rows(nearest_distances(_unit(sample) if settings.cluster_method.startswith("spherical") else sample))
    result = np.zeros(len(rows), dtype=bool)
    if odd.any() and len(np.unique(sample[~odd], axis=0)) >= settings.clusters:
        result[numbers[odd]] = True
    return result


def _with_odd_rows(rows: _PreparedRows, odd: Bool[NDArray, " row"], labels: NDArray) -> NDArray:
    """Give every odd row to the group with the nearest mean; the labels are those of the others."""
    groups, own = np.unique(labels, return_inverse=True)
    sums: NDArray | float = 0.0
    for place, block in rows.blocks(np.flatnonzero(~odd)):
        sums = sums + np.eye(len(groups))[own[place]].T @ block
    means = sums / np.bincount(own)[:, None]
    strangers = rows.take(np.flatnonzero(odd))
    result = np.empty(len(rows), dtype=labels.dtype)
    result[~odd] = labels
    result[odd] = groups[((strangers[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)]
    return result


def odd_rows(nearest: Float[NDArray, " row"]) -> Bool[NDArray, " row"]:
    """Tell which rows lie far from all others, by their distances to the nearest one; at most a twentieth, or none.

    Far is what box plots call far out: more than three interquartile ranges beyond the upper quartile. A row whose
    nearest one is odd is odd itself, so the distances of the others are the same without the odd ones.
    """
    apart = nearest[nearest > 0]
    if not len(apart):
        return np.zeros(len(nearest), dtype=bool)
    lower, upper = np.quantile(apart, [0.25, 0.75])
    odd = nearest > upper + 3 * (upper - lower)
    return odd if odd.sum() <= MOST_ODD * len(odd) else np.zeros(len(odd), dtype=bool)


def spherical_centres(
    rows: Float[NDArray[np.floating], "row dimension"], centres: Float[NDArray[np.floating], "cluster dimension"]
) -> Float[NDArray[np.floating], "cluster dimension"]:
    """Move centres by Lloyd's steps until every row keeps its nearest by cosine (at most `LLOYD_STEPS` steps).

    Shapes: rows (N, D) of unit length, centres (C, D) -> (C, D) of unit length (Dhillon and Modha 2001). A centre that
    loses all its rows goes to the row that is farthest from its own centre.
    """
    labels = np.full(len(rows), -1)
    for _ in range(LLOYD_STEPS):
        centres = _unit(centres)
        cosines = rows @ centres.T
        before, labels = labels, np.argmax(cosines, axis=1)
        if np.array_equal(before, labels):
            break
        members = np.eye(len(centres))[labels].T  # [C, N]
        empty = np.flatnonzero(members.sum(axis=1) == 0)
        centres = members @ rows
        centres[empty] = rows[cosines.max(axis=1).argsort()[: len(empty)]]
    return _unit(centres)


def _resplit(
    rows: _PreparedRows,
    numbers: Int[NDArray, " row"],
    labels: NDArray,
    target: int,
    settings: ClusterSettings,
    seed: int,
    tell: Callable[..., object],
) -> NDArray:
    """Split groups that are more than five times as large as the smallest, if their rows are different enough."""
    sizes = np.bincount(labels)
    tiny = TINY * len(labels) / settings.clusters
    oversize = np.flatnonzero(sizes > OVERSIZE * sizes[sizes >= tiny].min())
    result = labels.copy()
    for group in oversize[np.argsort(-sizes[oversize], kind="stable")]:
        members = np.flatnonzero(labels == group)
        if not 2 <= target <= len(members):
            continue
        if result.max() + target > settings.max_clusters:
            tell(
                "a cluster of %d rows stays whole: split in %d there would be more than --max-clusters %d",
                *(len(members), target, settings.max_clusters),
            )
            continue
        parts = _split(rows, numbers[members], target, settings, seed)
        if len(np.unique(parts)) == target:
            result[members] = np.where(parts == 0, group, result.max() + parts)
    return result
