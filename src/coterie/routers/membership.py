"""ELREA's routing with cosines that are judged by what is usual for each expert, so that no cluster is a hub.

Equation 9 standardises a prompt's cosines among themselves. That makes a leader out of any differences, however small
they are against those between rows of different clusters, and the cluster whose rows are the least alike has the
centroid that is nearest to what all gradients share: whatever fits nowhere goes there. Here each cosine is placed
between two cosines of its own expert: that of the rows that it was trained on (1) and that of all other rows (0).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import read_floats
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.routers.base import RouterParts, Routing
from coterie.routers.centroid import cosines
from coterie.routers.feature import FeatureRouter, load_extractor


class Scale(NamedTuple):
    """Mean cosines to every expert's centroid: of the rows that it was trained on, and of all others."""

    own: Float[Tensor, " expert"]
    others: Float[Tensor, " expert"]

    def memberships(self, found: Float[Tensor, "row expert"]) -> Float[Tensor, "row expert"]:
        """Place cosines on the scale; an expert whose own rows are no more alike than others has no members."""
        gap = self.own - self.others
        return torch.where(gap > 1e-6, (found - self.others) / gap.clamp(min=1e-6), torch.zeros_like(found))


def leave_one_out_scale(features: Float[Tensor, "row dimension"], labels: Sequence[int], count: int) -> Scale:
    """Measure the scale on training rows; each is compared with its cluster's centroid as it is without that row.

    A cluster of one row has no such centroid, and one that holds all rows no others: these have the mean over the rest.
    """
    groups = torch.as_tensor(labels)
    sums = torch.stack([features[groups == number].sum(dim=0) for number in range(count)])
    found = cosines(features, sums)
    alone = torch.nn.functional.cosine_similarity(features, sums[groups] - features, dim=-1)
    is_own = torch.nn.functional.one_hot(groups, count).bool()
    sizes = is_own.sum(dim=0)
    own = _means(torch.where(is_own, alone[:, None], 0.0), torch.where(sizes > 1, sizes, 0))
    return Scale(own, _means(torch.where(is_own, 0.0, found), len(groups) - sizes))


def _means(values: Float[Tensor, "row expert"], counts: Tensor) -> Float[Tensor, " expert"]:
    means = values.sum(dim=0) / counts.clamp(min=1)
    known = means[counts > 0]
    return torch.where(counts > 0, means, known.mean() if len(known) else 0.0)


class MembershipRouter(FeatureRouter):
    """Gives the experts as much as the prompt belongs to one of them at most, and the base expert the rest.

    A prompt that is as alike to one expert as its own rows are, and to the others as strange rows are, is weighed as by
    equation 9; one that is strange to all goes to the base expert alone.
    """

    kind = "membership"
    kinds = (kind,)

    def __init__(
        self,
        extractor: FeatureExtractor,
        centroids: Float[Tensor, "expert dimension"],
        scale: Scale,
        experts: Sequence[str],
        *,
        base: str = "base",
        centre: Float[Tensor, " dimension"] | None = None,
    ) -> None:
        """Store centroids and scale of `experts`, and the expert that takes what belongs to none of them.

        Raises:
            CoterieError: when names and centroids do not match.
        """
        if not len(experts) == len(centroids) == len(scale.own) == len(scale.others):
            raise CoterieError(f"{len(centroids)} centroids do not fit the {len(experts)} experts {', '.join(experts)}")
        super().__init__(extractor, centre)
        self.centroids = centroids
        self.scale = scale
        self.experts = tuple(experts)
        self.base = base

    def weigh(self, read: Float[Tensor, "row dimension"]) -> Routing:
        """Weigh by memberships; similarities are those."""
        found = self.scale.memberships(cosines(self._centred(read), self.centroids))
        total = found.amax(dim=-1, keepdim=True).clamp(0, 1)
        shares = (found * published_sharpness(len(self.experts))).softmax(dim=-1)
        weights = torch.cat([1 - total, total * shares], dim=1)
        return Routing((self.base, *self.experts), weights, dict(zip(self.experts, found.T, strict=True)))

    def save(self, folder: Path) -> dict[str, Any]:
        """Write centroids and scale and return the entry for mixture.json."""
        tensors = {"centroids": self.centroids, "own": self.scale.own, "others": self.scale.others}
        return self._save(folder / "membership.safetensors", tensors, experts=list(self.experts), base=self.base)

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "MembershipRouter":
        """Build it from its entry and its tensors."""
        extractor, names = load_extractor(record, parts), list(record["experts"])
        dimensions = extractor.dimensions
        wanted = {"centroids": (len(names), dimensions), "own": (len(names),), "others": (len(names),)}
        place = parts.folder / "membership.safetensors"
        tensors = read_floats(place, {**wanted, "centre": (dimensions,)}, "fit again", optional=["centre"])
        scale = Scale(tensors["own"], tensors["others"])
        centre = tensors.get("centre")
        return cls(extractor, tensors["centroids"], scale, names, base=str(record["base"]), centre=centre)


def published_sharpness(count: int) -> float:
    """Return how far apart equation 9 puts one expert that is similar and `count` - 1 that are all equally not.

    Standardised, these stand at sqrt(count - 1) and -1 / sqrt(count - 1).
    """
    return count / math.sqrt(count - 1) if count > 1 else 0.0
