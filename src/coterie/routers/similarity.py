"""Routing by a text's similarity to what every expert was made for (Belofsky 2023, "Token-Level Adaptation").

There is nothing to train: an expert is known by the mean embedding of its texts, or by several of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.errors import CoterieError
from coterie.routers.base import Routing
from coterie.routers.feature import Description, FeatureRouter

BOOST = 4.0
"""What the published weighting multiplies the largest cosine by; its author calls it a temperature."""

Centroids = Mapping[str, Float[Tensor, "centroid dimension"]]
"""Every expert's centroids, one or more."""


def boosted_weights(similarities: Float[Tensor, "*rows expert"], boost: float = BOOST) -> Float[Tensor, "*rows expert"]:
    """Multiply the largest similarity by `boost`, leave the others, and take the softmax (Belofsky 2023).

    Of equal ones the first is taken. A largest similarity that is not positive stays as it is: multiplying would push
    it down.
    """
    largest, place = similarities.max(dim=-1, keepdim=True)
    factor = torch.where(largest > 0, boost, 1.0).to(similarities)
    return similarities.scatter(-1, place, largest * factor).softmax(dim=-1)


class Weighting(NamedTuple):
    """How similarities become weights.

    Attributes:
        temperature: of a softmax over the similarities; None for the published weighting (`boosted_weights`).
    """

    temperature: float | None = None

    def __call__(self, similarities: Float[Tensor, "*rows expert"]) -> Float[Tensor, "*rows expert"]:
        """Return weights that sum to 1 over experts."""
        if self.temperature is None:
            return boosted_weights(similarities)
        return (similarities / self.temperature).softmax(dim=-1)


PUBLISHED = Weighting()


@dataclass(frozen=True)
class NullExpert:
    """An expert that changes nothing and takes over where nothing is similar: its similarity is always the same."""

    name: str
    similarity: float


class SimilarityRouter(FeatureRouter):
    """Weighs experts by the cosine of a text's embedding to their centroids."""

    kind = "similarity"

    def __init__(
        self,
        description: Description,
        centroids: Centroids,
        *,
        weighting: Weighting = PUBLISHED,
        nearest: bool = True,
        null: NullExpert | None = None,
        centre: Float[Tensor, " dimension"] | None = None,
    ) -> None:
        """Store the centroids.

        Args:
            description: turns texts into embeddings.
            centroids: of every expert; their lengths do not matter.
            weighting: how similarities become weights.
            nearest: an expert with several centroids is as similar as the nearest; False: as all of them on average.
            null: an expert that takes over where nothing is similar; None for none.
            centre: subtracted from every embedding; None for none.

        Raises:
            CoterieError: when no expert, or one without a centroid, is given.
        """
        if not centroids:
            raise CoterieError("routing by similarity needs at least one expert with a centroid")
        super().__init__(description, centre)
        self.centroids = {name: rows.float() for name, rows in centroids.items()}
        self.weighting = weighting
        self.nearest = nearest
        self.null = null

    def similarities(self, features: Float[Tensor, "row dimension"]) -> Float[Tensor, "row expert"]:
        """Return every expert's cosine to centred features; a text without any token is similar to nothing."""
        unit = torch.nn.functional.normalize(features, dim=-1)
        cosines = (unit @ torch.nn.functional.normalize(rows, dim=-1).T for rows in self.centroids.values())
        return torch.stack([c.amax(dim=-1) if self.nearest else c.mean(dim=-1) for c in cosines], dim=-1)

    def _weigh(self, features: Float[Tensor, "row dimension"]) -> Routing:
        found = self.similarities(features)
        names = tuple(self.centroids)
        if self.null:
            found = torch.cat([found, torch.full_like(found[:, :1], self.null.similarity)], dim=1)
            names = (*names, self.null.name)
        similarities = dict(zip(names, found.T, strict=True))
        return Routing(names, ("request", "expert"), self.weighting(found), similarities)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the centroids, named by expert, and return the entry for mixture.json."""
        self._write(folder / "centroids.safetensors", {f"centroids.{name}": c for name, c in self.centroids.items()})
        null = {"name": self.null.name, "similarity": self.null.similarity} if self.null else None
        return self._entry(
            experts=list(self.centroids), temperature=self.weighting.temperature, nearest=self.nearest, null=null
        )


def read_similarity(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], description: Description
) -> SimilarityRouter:
    """Build the router from its entry in mixture.json and its tensors.

    Raises:
        CoterieError: when an expert has no centroid, or the encoder has other dimensions than the centroids.
    """
    centroids = {name: _centroid(name, tensors) for name in record["experts"]}
    null, temperature = record["null"], record["temperature"]
    return SimilarityRouter(
        description,
        centroids,
        weighting=Weighting(None if temperature is None else float(temperature)),
        nearest=bool(record["nearest"]),
        null=NullExpert(str(null["name"]), float(null["similarity"])) if null else None,
        centre=tensors.get("centre"),
    )


def _centroid(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    found = tensors.get(f"centroids.{name}")
    if found is None or found.dim() != 2 or not len(found) or not bool(torch.isfinite(found).all()):
        raise CoterieError(
            f"router/centroids.safetensors has no proper centroids for the expert {name!r}; build the bank again"
        )
    return found


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


def null_similarity(own: Float[Tensor, " row"], share: float) -> float:
    """Return the similarity below which this share of texts lies to their own expert's centroids."""
    return float(own.quantile(share))
