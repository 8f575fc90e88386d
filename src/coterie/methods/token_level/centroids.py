"""Placing the centroids that a domain's expert is known by."""

import logging
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.data.batching import Tokenised
from coterie.engine.scoring import score_votes
from coterie.errors import CoterieError
from coterie.experts.names import NULL
from coterie.features.embedding import HIDDEN, with_answers
from coterie.mixture import Mixture
from coterie.progress import part, whole
from coterie.routers.centroid import CentroidRouter, NullExpert, Pool, Weighting, centroids_by_best, null_similarity
from coterie.routers.feature import growing_text_extractor
from coterie.settings.groups import SimilaritySettings

logger = logging.getLogger(__name__)

Features = Mapping[str, Float[Tensor, "row dimension"]]
"""The embeddings of every expert's texts."""


def check_centroids(texts: Mapping[str, Tokenised], settings: SimilaritySettings) -> None:
    """Refuse centroids that cannot be placed, before anything is trained.

    Raises:
        CoterieError: when an expert has fewer texts than centroids.
    """
    count = settings.centroids
    few = [name for name, kept in texts.items() if len(kept.rows) < count]
    if few:
        raise CoterieError(
            f"the expert {few[0]!r} has {len(texts[few[0]].rows)} texts, too few for {count} centroids; "
            "give more data or fewer --centroids"
        )


def similarity_router(
    mixture: Mixture, texts: Mapping[str, Tokenised], settings: SimilaritySettings, seed: int
) -> CentroidRouter:
    """Embed every expert's texts, question and answer, and place its centroids.

    Hidden states of a language model all point into nearly one direction, so from those of `hidden` the mean over the
    experts is subtracted; sentence embeddings are taken as they are, as published.

    Raises:
        CoterieError: when the encoder cannot be had.
    """
    extractor, encoder = growing_text_extractor(settings.encoder, settings.window, mixture.backbone)
    tokenizer = mixture.backbone.tokenizer
    raw = {}
    with whole("embedding of texts", {name: len(kept.rows) for name, kept in texts.items()}):
        for name, kept in texts.items():
            with part(name):
                raw[name] = encoder.rows([with_answers(row, tokenizer) for row in kept.rows])
    centre = torch.stack([rows.mean(dim=0) for rows in raw.values()]).mean(dim=0) if encoder.name == HIDDEN else None
    features = raw if centre is None else {name: rows - centre for name, rows in raw.items()}
    by_performance = settings.centroids_by == "performance"
    centroids = (
        _by_performance(mixture, texts, features) if by_performance else _centroids(features, settings.centroids, seed)
    )
    weighting = Weighting(settings.routing_temperature)
    pool: Pool = "mean" if by_performance else "nearest"
    plain = CentroidRouter.by_similarity(extractor, centroids, weighting=weighting, pool=pool, centre=centre)
    if settings.null_share is None:
        return plain
    experts = list(plain.centroids)  # one that is the best on no text has no centroid
    own = [plain.similarities(rows)[:, experts.index(name)] for name, rows in features.items() if name in experts]
    null = NullExpert(NULL, null_similarity(torch.cat(own), settings.null_share))
    return CentroidRouter.by_similarity(extractor, centroids, weighting=weighting, pool=pool, null=null, centre=centre)


def _centroids(features: Features, count: int, seed: int) -> dict[str, Tensor]:
    """Average each expert's embeddings, as published; with several centroids, those of its k-means clusters."""
    from sklearn.cluster import KMeans

    if count == 1:
        return {name: rows.mean(dim=0, keepdim=True) for name, rows in features.items()}
    return {
        name: torch.from_numpy(KMeans(count, n_init=10, random_state=seed).fit(rows.numpy()).cluster_centers_).float()
        for name, rows in features.items()
    }


def _by_performance(mixture: Mixture, texts: Mapping[str, Tokenised], features: Features) -> dict[str, Tensor]:
    """Let every text count for the expert that predicts its answer best (RouterRetriever, AAAI 2025).

    The experts have seen the texts that they were made for, and are judged on them nevertheless, as published.
    """
    names = list(texts)
    rows = [row for kept in texts.values() for row in kept.rows]
    sources = [example.source or name for name, kept in texts.items() for example in kept.examples]
    alone = torch.eye(len(mixture.bank))[[mixture.bank.index(name) for name in names]]
    nll = score_votes(
        mixture.backbone,
        mixture.layers,
        mixture.bank.names,
        rows,
        alone[:, None].expand(-1, len(rows), -1),
        f"{len(names)} experts",
    ).nll
    best = [names[place] for place in nll.argmin(dim=0).tolist()]
    found = centroids_by_best(torch.cat(list(features.values())), best, sources)
    for name in names:
        if name not in found:
            logger.warning("the expert %s is the best on none of the texts, so it is never routed to", name)
    return found
