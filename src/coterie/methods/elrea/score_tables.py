"""Routers for ELREA's experts that look a prompt's nearest clusters, tasks or rows up in a table."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import RunFolder
from coterie.features.growing_text import FeatureExtractor
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.extras import TrainedExtra
from coterie.routers.base import Router
from coterie.routers.centroid import centroids_of
from coterie.routers.feature import embedding_extractor
from coterie.routers.loss import CrossFitLosses
from coterie.routers.score_table import ARIADNE, AVENGERS, LORAUTER, Pieces, ScoreTableRouter, fit_table

CLUSTERS, TEMPERATURES = (4, 8, 16), (0.05, 0.1, 0.2)
CENTROIDS = 5  # of every expert of ariadne, at most


class Described(NamedTuple):
    """Features of the training rows, minus their mean where there is one, and what makes them of prompts."""

    extractor: FeatureExtractor
    features: Float[Tensor, "row dimension"]
    centre: Float[Tensor, " dimension"] | None = None

    def table(self, kind: str, pieces: Pieces, table: Tensor, experts: Sequence[str]) -> ScoreTableRouter:
        """Return the router that looks prompts up in a table."""
        return ScoreTableRouter(kind, self.extractor, pieces, table, experts, self.centre)


def avengers_of(known: Described, losses: CrossFitLosses, run: ElreaRun, seen: Tensor) -> Router:
    """Return the table of the experts' scores on clusters of these training rows (Avengers)."""
    own, seed = known.features[seen], run.settings.seed
    tried = [Pieces(_kmeans(own, count, seed)) for count in CLUSTERS if count <= len(own.unique(dim=0))]
    fitted = fit_table(own, losses.take(seen), tried, seed=seed)
    return known.table(AVENGERS, fitted.pieces, fitted.table, losses.experts)


def lorauter_of(known: Described, losses: CrossFitLosses, run: ElreaRun, seen: Tensor) -> Router:
    """Return that of their scores on every source; where rows name none, all rows are one task (LORAUTER)."""
    own, sources = known.features[seen], [run.sources[i] for i in seen.tolist()]
    names = list(dict.fromkeys(sources))
    centroids = centroids_of(own, [names.index(source) for source in sources], len(names))
    tried = [Pieces(centroids, heat) for heat in TEMPERATURES]
    fitted = fit_table(own, losses.take(seen), tried, seed=run.settings.seed)
    return known.table(LORAUTER, fitted.pieces, fitted.table, losses.experts)


def ariadne_of(known: Described, run: ElreaRun, seen: Tensor) -> Router:
    """Return the router to the nearest of several centroids of every cluster's rows: that expert alone (ARIADNE)."""
    own, labels = known.features[seen], torch.tensor(run.labels)[seen]
    clusters = labels.unique().tolist()
    rows = [own[labels == number] for number in clusters]
    found = [_kmeans(one, min(CENTROIDS, len(one.unique(dim=0))), run.settings.seed) for one in rows]
    table = torch.eye(len(found)).repeat_interleave(torch.tensor([len(centroids) for centroids in found]), dim=0)
    return known.table(ARIADNE, Pieces(torch.cat(found)), table, [f"cluster-{number}" for number in clusters])


def _kmeans(features: Float[Tensor, "row dimension"], count: int, seed: int) -> Float[Tensor, "cluster dimension"]:
    from sklearn.cluster import KMeans

    unit = torch.nn.functional.normalize(features, dim=-1)
    return torch.from_numpy(KMeans(count, n_init=10, random_state=seed).fit(unit.numpy()).cluster_centers_).float()


# --------------------------------------------------------------------------------------------------------- the extras


def avengers(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Score the experts on clusters of sentence embeddings."""
    return _of_all_rows(run, partial(avengers_of, _embedded(run), run.losses))


def lorauter(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Score the experts on the rows of every source."""
    return _of_all_rows(run, partial(lorauter_of, _embedded(run), run.losses))


def ariadne(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Know every cluster's expert by several centroids of its rows' embeddings."""
    return _of_all_rows(run, partial(ariadne_of, _embedded(run)))


def _embedded(run: ElreaRun) -> Described:
    extractor = embedding_extractor(run.extras.encoder, run.mixture.backbone)
    return Described(extractor, extractor([row.prompt() for row in run.kept.rows]))


def _of_all_rows(run: ElreaRun, build: Callable[[ElreaRun, Tensor], Router]) -> TrainedExtra:
    return TrainedExtra({}, build(run, torch.arange(len(run.labels))))
