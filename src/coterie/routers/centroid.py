"""Routing by the cosine of a prompt's feature to every expert's centroids.

An expert is known by one centroid or several: of the rows it was trained on (ELREA, arXiv 2502.00089, 3.2), of its
texts (Belofsky 2023, "Token-Level Adaptation"), or of the rows it does best on (RouterRetriever, AAAI 2025).
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import read_floats
from coterie.backbone.loading import Backbone
from coterie.data.row_selection import EmbeddedRows
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.routers.base import Router, RouterParts, Routing
from coterie.routers.feature import FeatureRouter, growing_text_extractor, load_extractor

PERFORMANCE, SIMILARITY = "performance-centroids", "similarity"
PLACES = {
    "gradient-centroids": ("centroids", "centroid"),
    "embedding-centroids": ("centroids", "centroid"),
    PERFORMANCE: ("pilots", "pilots"),
    SIMILARITY: ("centroids", "centroids"),
}
"""By kind of router: the file of its centroids, and what their names in it begin with."""
BOOST = 4.0
"""What the published weighting multiplies the largest cosine by; its author calls it a temperature."""
BLOCK_ROWS = 2048
"""Rows whose features are in memory at a time."""

Centroids = Mapping[str, Float[Tensor, "centroid dimension"]]
"""Every expert's centroids, one or more; an expert without any is not here."""
Pool = Literal["single", "nearest", "mean"]
"""Every expert has one centroid; of several the nearest counts; or all do, on average."""


def cosines(
    features: Float[Tensor, "row dimension"], centroids: Float[Tensor, "centroid dimension"]
) -> Float[Tensor, "row centroid"]:
    """Return the cosine of every feature to every centroid; a feature of zeros is similar to nothing."""
    return torch.nn.functional.normalize(features, dim=-1) @ torch.nn.functional.normalize(centroids, dim=-1).T


def standardised(values: Float[Tensor, "row expert"], *, ddof: int = 0) -> Float[Tensor, "row expert"]:
    """Take every row's mean away and divide by its deviation; a row of equal values, or a single one, becomes zeros.

    The deviation is over `count - ddof`; the paper does not say which.
    """
    centred = values - values.mean(dim=-1, keepdim=True)
    if values.shape[-1] <= ddof:
        return torch.zeros_like(values)
    spread = values.std(dim=-1, keepdim=True, correction=ddof)
    return torch.where(spread > 1e-7, centred / spread.clamp(min=1e-7), torch.zeros_like(centred))


def boosted_weights(similarities: Float[Tensor, "*rows expert"], boost: float = BOOST) -> Float[Tensor, "*rows expert"]:
    """Multiply the largest similarity by `boost`, leave the others, and take the softmax (Belofsky 2023).

    Of equal ones the first is taken. A largest similarity that is not positive stays as it is: multiplying would push
    it down.
    """
    largest, place = similarities.max(dim=-1, keepdim=True)
    factor = torch.where(largest > 0, boost, 1.0).to(similarities)
    return similarities.scatter(-1, place, largest * factor).softmax(dim=-1)


def base_weight(similarities: Float[Tensor, "row expert"]) -> Float[Tensor, "row 1"]:
    """Return what the base expert gets where nothing is similar: 1 - the largest cosine (ELREA eq. 9)."""
    return (1 - similarities.max(dim=-1, keepdim=True).values).clamp(min=0)


class Weighting(NamedTuple):
    """How similarities become weights.

    Attributes:
        temperature: of a softmax over the similarities; None for the published weighting (`boosted_weights`).
        is_standardised: a softmax over each row's similarities, standardised (ELREA eq. 9); there is no temperature.
        ddof: of that deviation.
    """

    temperature: float | None = None
    is_standardised: bool = False
    ddof: int = 0

    def __call__(self, similarities: Float[Tensor, "*rows expert"]) -> Float[Tensor, "*rows expert"]:
        """Return weights that sum to 1 over experts."""
        if self.is_standardised:
            return standardised(similarities, ddof=self.ddof).softmax(dim=-1)
        if self.temperature is None:
            return boosted_weights(similarities)
        return (similarities / self.temperature).softmax(dim=-1)


PUBLISHED = Weighting()
STANDARDISED = Weighting(is_standardised=True)


@dataclass(frozen=True)
class NullExpert:
    """An expert that changes nothing and takes over where nothing is similar: its similarity is always the same."""

    name: str
    similarity: float


class CentroidRouter(FeatureRouter):
    """Weighs experts by the cosine of a prompt's feature to their centroids."""

    kinds = tuple(PLACES)

    def __init__(
        self,
        kind: str,
        extractor: FeatureExtractor,
        centroids: Centroids,
        *,
        pool: Pool = "single",
        weighting: Weighting = STANDARDISED,
        base: str | None = None,
        null: NullExpert | None = None,
        centre: Float[Tensor, " dimension"] | None = None,
    ) -> None:
        """Store the centroids; `by_cluster`, `by_performance` and `by_similarity` make the routers that have names.

        Args:
            kind: as it stands in mixture.json.
            extractor: turns prompts into features.
            centroids: of every expert; their lengths do not matter.
            pool: how an expert's centroids make one similarity.
            weighting: how similarities become weights.
            base: an expert that gets 1 - the largest cosine on top, and stands first.
            null: an expert that takes over where nothing is similar.
            centre: training mean, subtracted from every feature.
        """
        super().__init__(extractor, centre)
        self.kind = kind
        self.centroids = {name: rows.float() for name, rows in centroids.items()}
        self.experts = tuple(centroids)
        self.pool: Pool = pool
        self.weighting = weighting
        self.base = base
        self.null = null
        self._folded: int | None = None

    @classmethod
    def by_cluster(
        cls,
        extractor: FeatureExtractor,
        centroids: Float[Tensor, "cluster dimension"],
        experts: Sequence[str],
        *,
        base: str = "base",
        centre: Float[Tensor, " dimension"] | None = None,
    ) -> "CentroidRouter":
        """Route to the clusters' experts and the base, one centroid each (ELREA eq. 9).

        Raises:
            CoterieError: when names and centroids do not match.
        """
        if len(experts) != len(centroids):
            raise CoterieError(f"{len(centroids)} centroids do not fit the {len(experts)} experts {', '.join(experts)}")
        named = {name: row[None] for name, row in zip(experts, centroids, strict=True)}
        return cls(f"{extractor.name}-centroids", extractor, named, base=base, centre=centre)

    @classmethod
    def by_performance(
        cls, extractor: FeatureExtractor, centroids: Centroids, centre: Float[Tensor, " dimension"] | None = None
    ) -> "CentroidRouter":
        """Route by the mean cosine to the centroids of what each expert is best on, standardised as ELREA does.

        Raises:
            CoterieError: when there are none.
        """
        if not centroids:
            raise CoterieError("performance-labelled centroids need at least one expert with rows it is best on")
        unit = {name: torch.nn.functional.normalize(rows.float(), dim=-1) for name, rows in centroids.items()}
        return cls(PERFORMANCE, extractor, unit, pool="mean", centre=centre)

    @classmethod
    def by_similarity(
        cls,
        extractor: FeatureExtractor,
        centroids: Centroids,
        *,
        weighting: Weighting = PUBLISHED,
        pool: Pool = "nearest",
        null: NullExpert | None = None,
        centre: Float[Tensor, " dimension"] | None = None,
    ) -> "CentroidRouter":
        """Route by the similarity to every expert's own texts, as published by default.

        Raises:
            CoterieError: when no expert with a centroid is given.
        """
        if not centroids:
            raise CoterieError("routing by similarity needs at least one expert with a centroid")
        return cls(SIMILARITY, extractor, centroids, pool=pool, weighting=weighting, null=null, centre=centre)

    def similarities(self, features: Float[Tensor, "row dimension"]) -> Float[Tensor, "row expert"]:
        """Return every expert's cosine to centred features."""
        single = self.pool == "single"
        rows = [torch.cat(list(self.centroids.values()))] if single else list(self.centroids.values())
        if self._folded is not None:
            features, rows = fold(features, self._folded), [fold(own, self._folded) for own in rows]
        found = [cosines(features, own) for own in rows]
        if single:
            return found[0]
        return torch.stack([c.amax(dim=-1) if self.pool == "nearest" else c.mean(dim=-1) for c in found], dim=-1)

    def weigh(self, read: Float[Tensor, "row dimension"]) -> Routing:
        """Weigh the experts for prompts with these features."""
        found, names = self.similarities(self._centred(read)), self.experts
        if self.null:
            found = torch.cat([found, torch.full_like(found[:, :1], self.null.similarity)], dim=1)
            names = (*names, self.null.name)
        similarities = dict(zip(names, found.T, strict=True))
        weights = self.weighting(found)
        if self.base is not None:
            names, weights = (self.base, *names), torch.cat([base_weight(found), weights], dim=1)
        return Routing(names, weights, similarities)

    def folded(self, dimensions: int) -> "CentroidRouter":
        """Return the router that compares in fewer dimensions.

        Raises:
            CoterieError: when they do not divide the dimensions there are.
        """
        fold(next(iter(self.centroids.values())), dimensions)
        result = copy(self)
        result._folded = dimensions
        return result

    def with_ddof(self, ddof: int) -> Router:
        """Return the router whose standardised cosines are divided by the deviation over `count - ddof` (ELREA eq. 9).

        Raises:
            CoterieError: when it does not standardise.
        """
        if not self.weighting.is_standardised:
            return super().with_ddof(ddof)
        result = copy(self)
        result.weighting = self.weighting._replace(ddof=ddof)
        return result

    def as_published(self, backbone: Backbone) -> Router:
        """Return the router with the published weighting, whose encoder reads texts from their beginning.

        What follows the tokens that it can read (256 word pieces for all-MiniLM-L6-v2) moves the weights no more.

        Raises:
            CoterieError: when it does not route by similarity.
        """
        if self.kind != SIMILARITY:
            return super().as_published(backbone)
        how = self.extractor.record
        extractor = growing_text_extractor(how["encoder"], how["window"], backbone, tail=False)[0]
        return CentroidRouter.by_similarity(extractor, self.centroids, centre=self.centre)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the centroids, named by expert, and return the entry for mixture.json."""
        file, prefix = PLACES[self.kind]
        rows = {name: own[0] if self.pool == "single" else own for name, own in self.centroids.items()}
        tensors = {f"{prefix}.{name}": own for name, own in rows.items()}
        if self.kind == SIMILARITY:
            null = {"name": self.null.name, "similarity": self.null.similarity} if self.null else None
            fields = {"temperature": self.weighting.temperature, "nearest": self.pool == "nearest", "null": null}
        else:
            fields = {} if self.base is None else {"base": self.base}
            fields |= {"ddof": self.weighting.ddof} if self.weighting.ddof else {}
        return self._save(folder / f"{file}.safetensors", tensors, experts=list(self.experts), **fields)

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "CentroidRouter":
        """Build it from its entry and its tensors.

        Raises:
            CoterieError: when an expert has no centroid, or the encoder has other dimensions than the centroids.
        """
        kind = str(record["kind"])
        file, prefix = PLACES[kind]
        single = prefix == "centroid"  # stands there without its axis
        wanted = {f"{prefix}.{name}": (None,) if single else (None, None) for name in record["experts"]}
        place, fit_again = parts.folder / f"{file}.safetensors", "fit the mixture again"
        tensors = read_floats(place, {**wanted, "centre": (None,)}, fit_again, optional=["centre"])
        found = (tensors[f"{prefix}.{name}"] for name in record["experts"])
        centroids = {name: own[None] if single else own for name, own in zip(record["experts"], found, strict=True)}
        if len({own.shape[-1] for own in tensors.values()}) > 1:
            raise CoterieError(f"{place} holds centroids of unequal dimensions; {fit_again}")
        centre = tensors.get("centre")
        weighting = STANDARDISED._replace(ddof=int(record.get("ddof", 0)))
        if kind == PERFORMANCE:
            extractor = load_extractor(record, parts)
            check_dimensions(extractor.name, extractor.dimensions, centroids)
            return cls(kind, extractor, centroids, pool="mean", weighting=weighting, centre=centre)
        if kind != SIMILARITY:
            extractor, base = load_extractor(record, parts), record["base"]
            check_dimensions(extractor.name, extractor.dimensions, centroids)
            return cls(kind, extractor, centroids, weighting=weighting, base=base, centre=centre)
        null, temperature = record["null"], record["temperature"]
        tail = bool(record.get("tail", True))
        extractor, encoder = growing_text_extractor(record["encoder"], record["window"], parts.backbone, tail=tail)
        check_dimensions(encoder.name, encoder.dimensions, centroids)
        return cls.by_similarity(
            extractor,
            centroids,
            weighting=Weighting(None if temperature is None else float(temperature)),
            pool="nearest" if record["nearest"] else "mean",
            null=NullExpert(str(null["name"]), float(null["similarity"])) if null else None,
            centre=centre,
        )


def check_dimensions(encoder: str, dimensions: int, centroids: Centroids) -> None:
    """Refuse an encoder whose embeddings cannot be compared with the centroids.

    Raises:
        CoterieError: naming both dimensions.
    """
    for name, rows in centroids.items():
        if rows.shape[1] != dimensions:
            raise CoterieError(
                f"the encoder {encoder!r} gives {dimensions} dimensions, but the centroids of the expert {name!r} have "
                f"{rows.shape[1]}; use the encoder that they were made with, or build the bank again"
            )


def fold(features: Float[Tensor, "*rows dimension"], dimensions: int) -> Float[Tensor, "*rows folded"]:
    """Add up every `dimensions`-th element: the projection to fewer dimensions that a projection already holds.

    Sums of coordinates with independent random signs are such coordinates again, so inner products keep their mean;
    their error grows as 1 / sqrt(dimensions).

    Raises:
        CoterieError: when the dimensions are not a divisor of the features'.
    """
    if dimensions < 2 or features.shape[-1] % dimensions:
        raise CoterieError(f"d_proj={dimensions} must divide the {features.shape[-1]} dimensions of the features")
    return features.unflatten(-1, (-1, dimensions)).sum(dim=-2)


def centroids_of(features: EmbeddedRows, labels: Sequence[int], count: int) -> Float[Tensor, "cluster dimension"]:
    """Return the normalised mean of each cluster's un-normalised features (ELREA eq. 8): large gradients weigh more.

    Features are read in blocks and added up in float64.

    Raises:
        CoterieError: when a cluster is empty.
    """
    groups = torch.as_tensor(labels)
    empty = [number for number in range(count) if not bool((groups == number).any())]
    if empty:
        raise CoterieError(f"cluster {empty[0]} has no rows, so it has no centroid")
    sums = torch.zeros(count, features[:1].shape[1], dtype=torch.float64)
    for start in range(0, len(groups), BLOCK_ROWS):
        block = features[start : start + BLOCK_ROWS].cpu()
        sums.index_add_(0, groups[start : start + BLOCK_ROWS], block.double())
    return torch.nn.functional.normalize(sums / groups.bincount(minlength=count)[:, None], dim=-1).float()


def centroids_by_best(
    features: Float[Tensor, "row dimension"], best: Sequence[str], sources: Sequence[str | None]
) -> dict[str, Float[Tensor, "centroid dimension"]]:
    """Average the unit features of rows with one source and one best expert (RouterRetriever's pilot embeddings).

    Returns:
        Up to a centroid per source for each expert; an expert that was nowhere the best is not here.
    """
    unit = torch.nn.functional.normalize(features, dim=-1)
    groups: dict[tuple[str, str], list[int]] = {}
    for row, expert in enumerate(best):
        groups.setdefault((expert, sources[row] or ""), []).append(row)
    found: dict[str, list[Tensor]] = {}
    for (expert, _), rows in sorted(groups.items()):
        found.setdefault(expert, []).append(unit[rows].mean(dim=0))
    return {expert: torch.stack(rows) for expert, rows in found.items()}


def null_similarity(own: Float[Tensor, " row"], share: float) -> float:
    """Return the similarity below which this share of texts lies to their own expert's centroids."""
    return float(own.quantile(share))
