"""Routing by similarity of a prompt's feature to the centroid of every expert's training rows (ELREA, 3.2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.errors import CoterieError
from coterie.routers.base import Routing
from coterie.routers.feature import Description, FeatureRouter


class CentroidWeights(NamedTuple):
    """Weights of the clusters' experts and of the base expert, and the raw cosines they come from."""

    clusters: Float[Tensor, "row cluster"]
    base: Float[Tensor, " row"]
    cosines: Float[Tensor, "row cluster"]


def centroids_of(
    features: Float[Tensor, "row dimension"], labels: Sequence[int], count: int
) -> Float[Tensor, "cluster dimension"]:
    """Return the normalised mean of each cluster's un-normalised features (ELREA eq. 8): large gradients weigh more.

    Raises:
        CoterieError: when a cluster is empty.
    """
    groups = torch.as_tensor(labels)
    empty = [number for number in range(count) if not bool((groups == number).any())]
    if empty:
        raise CoterieError(f"cluster {empty[0]} has no rows, so it has no centroid")
    means = torch.stack([features[groups == number].mean(dim=0) for number in range(count)])
    return torch.nn.functional.normalize(means, dim=-1)


def centroid_weights(
    features: Float[Tensor, "row dimension"], centroids: Float[Tensor, "cluster dimension"], *, ddof: int = 0
) -> CentroidWeights:
    """Standardise each prompt's cosines over the clusters and take their softmax; the base gets 1 - max cosine (eq. 9).

    Shapes: (N, D), (C, D) -> (N, C), (N,), (N, C). With one cluster, or equal cosines, the clusters share evenly.
    """
    cosines = torch.nn.functional.normalize(features, dim=-1) @ torch.nn.functional.normalize(centroids, dim=-1).T
    base = (1 - cosines.max(dim=-1).values).clamp(min=0)
    return CentroidWeights(standardised(cosines, ddof=ddof).softmax(dim=-1), base, cosines)


def standardised(values: Float[Tensor, "row expert"], *, ddof: int = 0) -> Float[Tensor, "row expert"]:
    """Take every row's mean away and divide by its deviation; a row of equal values becomes zeros."""
    centred = values - values.mean(dim=-1, keepdim=True)
    if values.shape[-1] <= ddof:
        return torch.zeros_like(values)
    spread = values.std(dim=-1, keepdim=True, correction=ddof)
    return torch.where(spread > 1e-7, centred / spread.clamp(min=1e-7), torch.zeros_like(centred))


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


class CentroidRouter(FeatureRouter):
    """Routes a prompt by the cosine of its feature to each cluster's centroid."""

    def __init__(
        self,
        description: Description,
        centroids: Float[Tensor, "cluster dimension"],
        experts: Sequence[str],
        *,
        base: str = "base",
        centre: Float[Tensor, " dimension"] | None = None,
        folded: int | None = None,
    ) -> None:
        """Store the centroids.

        Args:
            description: turns prompts into features.
            centroids: one per expert in `experts`.
            experts: names of the clusters' experts.
            base: name of the expert that gets 1 - max cosine.
            centre: training mean, subtracted from every feature; None for none.
            folded: dimensions that features and centroids are folded to before they are compared; None for all.

        Raises:
            CoterieError: when names and centroids do not match.
        """
        if len(experts) != len(centroids):
            raise CoterieError(f"{len(centroids)} centroids do not fit the {len(experts)} experts {', '.join(experts)}")
        super().__init__(description, centre)
        self.kind = f"{description.name}-centroids"
        self.centroids = centroids.float()
        self.experts = tuple(experts)
        self.base = base
        self._folded = folded

    def _weigh(self, features: Float[Tensor, "row dimension"]) -> Routing:
        """Apply ELREA's eq. 9; the base stands first."""
        centroids = self.centroids
        if self._folded is not None:
            features, centroids = fold(features, self._folded), fold(centroids, self._folded)
        found = centroid_weights(features, centroids)
        weights = torch.cat([found.base[:, None], found.clusters], dim=1)
        similarities = dict(zip(self.experts, found.cosines.T, strict=True))
        return Routing((self.base, *self.experts), ("request", "expert"), weights, similarities)

    def folded(self, dimensions: int) -> "CentroidRouter":
        """Return the router that compares in fewer dimensions.

        Raises:
            CoterieError: when they do not divide the dimensions there are.
        """
        fold(self.centroids, dimensions)
        return CentroidRouter(
            self.description, self.centroids, self.experts, base=self.base, centre=self.centre, folded=dimensions
        )

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the centroids, rows named by expert, and return the entry for mixture.json."""
        rows = {f"centroid.{name}": row for name, row in zip(self.experts, self.centroids, strict=True)}
        self._write(folder / "centroids.safetensors", rows)
        return self._entry(experts=list(self.experts), base=self.base)


def read_centroids(tensors: Mapping[str, Tensor], experts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Return centroids in the order of `experts`, and the centre if there is one.

    Raises:
        CoterieError: when an expert has no centroid.
    """
    missing = [name for name in experts if f"centroid.{name}" not in tensors]
    if missing:
        raise CoterieError(f"router/centroids.safetensors has no centroid for the expert {missing[0]!r}; fit again")
    return torch.stack([tensors[f"centroid.{name}"] for name in experts]), tensors.get("centre")
