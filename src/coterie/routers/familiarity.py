"""How familiar a prompt is: how near it lies to training rows, beside how near these lie to their own nearest ones.

That is the local outlier factor (Breunig et al. 2000, "LOF: Identifying Density-Based Local Outliers") in its
simplified form. Where rows of the kinds that come from outside are known, what lies nearer to them than to training
rows is the less familiar for it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.routers.centroid import fold

NEIGHBOURS = 10
SAME = 1e-9
"""1 - cosine below which two rows are the same one."""
STRANGENESS = 3.0
"""How many times it counts against a prompt that it is nearer to a stranger than to a training row, as a logarithm."""
MOST_ROWS = 2000  # that are kept to compare with, drawn evenly: 18 MB of a model of 135M


class Nearest(NamedTuple):
    """Of every prompt the training rows that are nearest to it, without itself.

    Attributes:
        rows: their numbers.
        found: whether there is one; a prompt has as many as there are others, and `NEIGHBOURS` at most.
    """

    rows: Int[Tensor, "prompt near"]
    found: Bool[Tensor, "prompt near"]


def kept_rows(count: int, seed: int = 0) -> Int[Tensor, " kept"]:
    """Return the numbers of the rows that are kept to compare with: all, or `MOST_ROWS` drawn evenly."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:MOST_ROWS].sort().values


class Familiarity(NamedTuple):
    """Training rows that prompts are compared with, by cosines as they are.

    What all rows share is what tells them from strangers: around their own mean, rows of one kind are noise, and
    a stranger lies as near to some of them as they do to each other.

    Attributes:
        rows: their features.
        spread: the mean distance of each, 1 - cosine, to its nearest ones.
        centre: None; mixtures that were fitted when rows were compared around their mean have it, and no spread.
        strangers: features of rows that are none of these kinds; None where nobody told which come.
    """

    rows: Float[Tensor, "row dimension"]
    spread: Float[Tensor, " row"] | None
    centre: Float[Tensor, " dimension"] | None = None
    strangers: Float[Tensor, "stranger dimension"] | None = None

    @classmethod
    def of(
        cls,
        features: Float[Tensor, "row dimension"],
        seed: int = 0,
        strangers: Float[Tensor, "stranger dimension"] | None = None,
    ) -> "Familiarity":
        """Keep `MOST_ROWS` of the rows at most, and the strangers that are told, if some are."""
        kept = features[kept_rows(len(features), seed)]
        spread = _near(_distances(kept, kept), torch.ones(len(kept)))[0]
        return cls(kept, spread.float(), strangers=strangers)

    def __call__(self, features: Float[Tensor, "row dimension"]) -> Float[Tensor, " row"]:
        """Return what `compare` does, without the nearest rows."""
        return self.compare(features)[0]

    def compare(
        self, features: Float[Tensor, "row dimension"], made_of: Bool[Tensor, "row stranger"] | None = None
    ) -> tuple[Float[Tensor, " row"], Nearest]:
        """Return how familiar prompts are, and the rows that are nearest to each.

        Familiarity is the logarithm of how much nearer the nearest rows are to their own nearest ones than to the
        prompt: about 0 for rows like these, and less for others. By `STRANGENESS` times as much it is less where the
        nearest stranger is nearer than the nearest row. A row that equals one of these, or a stranger, is not compared
        with it, nor with strangers that are made of it: training rows are as familiar as new ones of their kind.
        """
        if (width := self.rows.shape[1]) < features.shape[1]:
            features = fold(features, width)  # gradients, which mixtures of before compare in fewer dimensions
        if self.centre is not None:
            nobody = torch.zeros(len(features), 0)
            return _around(self.centre, self.rows, features), Nearest(nobody.long(), nobody.bool())
        assert self.spread is not None  # as there is no centre
        distances = _distances(features, self.rows)
        distance, spread, nearest = _near(distances, self.spread)
        found = (spread / distance).log()
        if self.strangers is not None:
            strange = _distances(features, self.strangers)
            if made_of is not None:
                strange.masked_fill_(made_of, torch.inf)
            found -= STRANGENESS * (_nearest(distances) / _nearest(strange)).log().clamp(min=0)
        return found.float(), nearest

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> "Familiarity":
        """Take it from tensors of these names.

        Raises:
            ValueError: when they hold neither a spread for each row nor a centre of the rows' dimensions, or strangers
                of other dimensions.
        """
        rows, spread, centre, strangers = (tensors.get(name) for name in cls._fields)
        assert rows is not None  # whoever read the file has asked for them
        if (spread is None or len(spread) != len(rows)) and (centre is None or len(centre) != rows.shape[1]):
            raise ValueError("familiar rows need a spread for each of them, or a centre")
        if strangers is not None and not (len(strangers) and strangers.shape[1] == rows.shape[1]):
            raise ValueError(f"strangers of shape {tuple(strangers.shape)} cannot be compared with rows")
        return cls(rows, spread, centre, strangers)

    def tensors(self) -> dict[str, Tensor]:
        """Return what `read` takes."""
        return {name: own for name, own in self._asdict().items() if own is not None}


def _distances(
    features: Float[Tensor, "row dimension"], known: Float[Tensor, "other dimension"]
) -> Float[Tensor, "row other"]:
    """Return 1 - cosine to every known row, and inf to the row itself; in float64, where equal rows are told."""
    unit, others = (torch.nn.functional.normalize(own.double(), dim=-1) for own in (features, known))
    distances = 1 - unit @ others.T
    return distances.masked_fill(distances < SAME, torch.inf)


def _near(
    distances: Float[Tensor, "row other"], spread: Float[Tensor, " other"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"], Nearest]:
    """Return every row's mean distance to the nearest known ones, the mean of their own spreads, and which they are.

    Who has nobody but itself is as far as what has nothing in common, 1.
    """
    nearest = distances.topk(min(NEIGHBOURS, distances.shape[1]), largest=False)
    counted = nearest.values.isfinite()
    count, alone = counted.sum(dim=1).clamp(min=1), ~counted.any(dim=1)
    found = (torch.where(counted, own, 0.0).sum(dim=1) / count for own in (nearest.values, spread[nearest.indices]))
    distance, around = (own.masked_fill(alone, 1.0) for own in found)
    return distance, around, Nearest(nearest.indices, counted)


def _nearest(distances: Float[Tensor, "row other"]) -> Float[Tensor, " row"]:
    return distances.amin(dim=1).nan_to_num(posinf=1.0)  # who has nobody but itself, as in `_near`


def _around(
    centre: Float[Tensor, " dimension"],
    rows: Float[Tensor, "other dimension"],
    features: Float[Tensor, "row dimension"],
) -> Float[Tensor, " row"]:
    """Return the mean cosine to the five nearest rows around their mean, as mixtures of before are calibrated."""
    found = torch.nn.functional.normalize(features - centre, dim=-1) @ rows.T
    nearest = found.masked_fill(found > 1 - 1e-5, -torch.inf).topk(min(5, len(rows)), dim=1).values
    known = nearest.isfinite()
    return torch.where(known, nearest, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)
