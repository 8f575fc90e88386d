"""Routing by similarity of a prompt's feature to the centroid of every expert's training rows (ELREA, 3.2)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import write_tensors
from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.routers.base import Routing

Describe = Callable[[Sequence[TokenRow]], Tensor]
"""Turns prompts into un-normalised features (row, dimension)."""


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
    spread = (
        cosines.std(dim=-1, keepdim=True, correction=ddof) if cosines.shape[-1] > ddof else torch.zeros(len(cosines), 1)
    )
    centred = cosines - cosines.mean(dim=-1, keepdim=True)
    standardised = torch.where(spread > 1e-7, centred / spread.clamp(min=1e-7), torch.zeros_like(centred))
    base = (1 - cosines.max(dim=-1).values).clamp(min=0)
    return CentroidWeights(standardised.softmax(dim=-1), base, cosines)


class GradientCentroidRouter:
    """Routes a prompt by the cosine of its gradient feature to each cluster's centroid."""

    kind = "gradient-centroids"

    def __init__(
        self,
        describe: Describe,
        centroids: Float[Tensor, "cluster dimension"],
        experts: Sequence[str],
        *,
        base: str = "base",
        centre: Float[Tensor, " dimension"] | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        """Store the centroids.

        Args:
            describe: turns prompts into features.
            centroids: one per expert in `experts`.
            experts: names of the clusters' experts.
            base: name of the expert that gets 1 - max cosine.
            centre: training mean, subtracted from every feature; None for none.
            record: what `describe` was made from, for mixture.json.

        Raises:
            CoterieError: when names and centroids do not match.
        """
        if len(experts) != len(centroids):
            raise CoterieError(f"{len(centroids)} centroids do not fit the {len(experts)} experts {', '.join(experts)}")
        self._describe = describe
        self._record = record or {}
        self.centroids = centroids.float()
        self.experts = tuple(experts)
        self.base = base
        self.centre = centre

    def route(self, prompts: Sequence[TokenRow]) -> Routing:
        """Weigh the experts for every prompt; axes (request, expert), base first."""
        features = self._describe(prompts).float().cpu()
        return self.route_features(features)

    def route_features(self, features: Float[Tensor, "row dimension"]) -> Routing:
        """Weigh the experts for prompts whose features are known."""
        if self.centre is not None:
            features = features - self.centre
        found = centroid_weights(features, self.centroids)
        weights = torch.cat([found.base[:, None], found.clusters], dim=1)
        similarities = dict(zip(self.experts, found.cosines.T, strict=True))
        return Routing((self.base, *self.experts), ("request", "expert"), weights, similarities)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the centroids, rows named by expert, and return the entry for mixture.json."""
        rows = {f"centroid.{name}": row for name, row in zip(self.experts, self.centroids, strict=True)}
        if self.centre is not None:
            rows["centre"] = self.centre
        write_tensors(folder / "centroids.safetensors", rows)
        return {"kind": self.kind, "experts": list(self.experts), "base": self.base, **self._record}


def read_centroids(tensors: dict[str, Tensor], experts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Return centroids in the order of `experts`, and the centre if there is one.

    Raises:
        CoterieError: when an expert has no centroid.
    """
    missing = [name for name in experts if f"centroid.{name}" not in tensors]
    if missing:
        raise CoterieError(f"router/centroids.safetensors has no centroid for the expert {missing[0]!r}; fit again")
    return torch.stack([tensors[f"centroid.{name}"] for name in experts]), tensors.get("centre")
