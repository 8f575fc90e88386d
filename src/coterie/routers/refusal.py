"""Knowing when to say no: a wrapper that gives a prompt to one expert alone where it is unlike all that was trained on.

A prompt's familiarity is how near it lies to training rows, beside how near these lie to their own nearest ones: the
local outlier factor (Breunig et al. 2000, "LOF: Identifying Density-Based Local Outliers") in its simplified form.
Where rows of the kinds that come from outside are known, what lies nearer to them than to training rows is the less
familiar for it. Below which familiarity the mixture stays out is calibrated on what it gained over that expert: on rows
like the training data, by copies that were not trained on them, and on unlike ones.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import read_floats, write_tensors
from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor, GrowingFeatures, WholeTexts
from coterie.routers.base import Router, RouterParts, Routing, Wrapper
from coterie.routers.centroid import fold
from coterie.routers.feature import load_extractor

NEIGHBOURS = 10
SAME = 1e-9
"""1 - cosine below which two rows are the same one."""
CAUTION = 0.1
"""The share of its gain on familiar rows that a mixture may lose by staying out."""
HARM = 1e-3
"""Nats by which a row counts as harmed: less is rounding."""
STRANGENESS = 3.0
"""How many times it counts against a prompt that it is nearer to a stranger than to a training row, as a logarithm."""
MOST_ROWS = 2000  # that are kept to compare with, drawn evenly: 18 MB of a model of 135M


class Observed(NamedTuple):
    """Rows whose references the mixture was scored on.

    Attributes:
        familiarity: of every row.
        gain: the expert's loss minus the mixture's, in nats, summed over the row's tokens.
    """

    familiarity: Float[Tensor, " row"]
    gain: Float[Tensor, " row"]

    def gain_above(self, thresholds: Float[Tensor, " threshold"]) -> Float[Tensor, " threshold"]:
        """Return what is gained where the mixture answers the rows from each threshold up, and the expert the rest."""
        answered = self.familiarity >= thresholds[:, None]
        return (answered * self.gain.double()).sum(dim=1)


class Calibration(NamedTuple):
    """What a refusal is calibrated on: rows like the training data, and unlike ones (there may be none)."""

    inside: Observed
    outside: Observed

    def threshold(self, caution: float) -> float:
        """Return the familiarity from which on the mixture answers.

        The highest one may cost `caution` of the gain on the rows inside at most. It is lowered to the middle between
        that and the most familiar of the outside rows that the mixture harms, where all of these lie below; where it
        harms none of them, everything is answered that is as familiar as anything that was seen. What it helps outside
        counts for nothing: the sample is small, and refusing is cheap. Where nothing is gained inside, nothing is
        answered (inf).
        """
        total = float(self.inside.gain.double().sum())
        if total <= 0:
            return torch.inf
        places = torch.cat([self.inside.familiarity.unique(), torch.tensor([torch.inf])])
        kept = self.inside.gain_above(places) >= (1 - caution) * total * (1 - 1e-9)
        highest = float(places[kept].max())
        if not len(self.outside.gain):
            return highest
        harmed = self.outside.familiarity[self.outside.gain < -HARM]
        if not len(harmed):
            return float(torch.cat([self.inside.familiarity, self.outside.familiarity]).min())
        return (highest + min(float(harmed.max()), highest)) / 2


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
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        kept = features[order[:MOST_ROWS].sort().values]
        spread = _near(_distances(kept, kept), torch.ones(len(kept)))[0]
        return cls(kept, spread.float(), strangers=strangers)

    def __call__(self, features: Float[Tensor, "row dimension"]) -> Float[Tensor, " row"]:
        """Return the logarithm of how much nearer the nearest rows are to their own nearest ones than to each prompt.

        So it is about 0 for rows like these, and less for others. By `STRANGENESS` times as much it is less where the
        nearest stranger is nearer than the nearest row. A row that equals one of these, or a stranger, is not compared
        with it: training rows are as familiar as new ones of their kind.
        """
        if (width := self.rows.shape[1]) < features.shape[1]:
            features = fold(features, width)  # gradients, which mixtures of before compare in fewer dimensions
        if self.centre is not None:
            return _around(self.centre, self.rows, features)
        assert self.spread is not None  # as there is no centre
        distances = _distances(features, self.rows)
        distance, spread = _near(distances, self.spread)
        found = (spread / distance).log()
        if self.strangers is not None:
            own, strange = (_nearest(near) for near in (distances, _distances(features, self.strangers)))
            found -= STRANGENESS * (own / strange).log().clamp(min=0)
        return found.float()

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
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Return every row's mean distance to the nearest known ones, and the mean of their own spreads.

    Who has nobody but itself is as far as what has nothing in common, 1.
    """
    nearest = distances.topk(min(NEIGHBOURS, distances.shape[1]), largest=False)
    counted = nearest.values.isfinite()
    count, alone = counted.sum(dim=1).clamp(min=1), ~counted.any(dim=1)
    found = (torch.where(counted, own, 0.0).sum(dim=1) / count for own in (nearest.values, spread[nearest.indices]))
    distance, around = (own.masked_fill(alone, 1.0) for own in found)
    return distance, around


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


class RefusalRouter(Wrapper):
    """Routes as another router does where a prompt is familiar, and gives it to one expert alone where it is not."""

    kind = "refusal"
    kinds = (kind,)
    saved = ("fallback", "caution")

    def __init__(
        self,
        router: Router,
        familiarity: Familiarity,
        calibration: Calibration,
        fallback: str,
        caution: float = CAUTION,
        extractor: FeatureExtractor | None = None,
    ) -> None:
        """Wrap a router of prompts.

        Args:
            router: weighs the experts for familiar prompts.
            familiarity: the training rows.
            calibration: what the threshold is chosen by.
            fallback: the expert that gets all of an unfamiliar prompt.
            caution: the share of its gain on familiar rows that the mixture may lose by staying out.
            extractor: of the features that are compared; None for those that the router reads itself.

        Raises:
            CoterieError: for a router that weighs experts in the layers, or a caution that is no share.
        """
        if router.grain == "layer":
            raise CoterieError(
                f"router {router.kind!r} weighs experts inside the layers, where no prompt as a whole can be refused; "
                "take a router of prompts"
            )
        if not 0 <= caution <= 1:
            raise CoterieError(f"caution is the share of the gain that may be lost, from 0 to 1; got {caution:g}")
        super().__init__(router)
        self.grain, self.every, self.cache = router.grain, router.every, router.cache
        self.familiarity = familiarity
        self.calibration = calibration
        self.fallback = fallback
        self.caution = caution
        self.extractor = extractor
        self.threshold = calibration.threshold(caution)

    @property
    def refused(self) -> dict[str, float]:
        """The shares of the rows that it was calibrated on which it refuses: `inside`, and `outside`."""
        seen = self.calibration._asdict().items()
        return {side: float((own.familiarity < self.threshold).float().mean()) for side, own in seen}

    def read(self, prompts: Sequence[TokenRow]) -> Any:
        """Read what the wrapped router reads, and features where these are others."""
        read = self.router.read(prompts)
        return read if self.extractor is None else (read, self.extractor(prompts))

    @property
    def readings(self) -> Mapping[Hashable, Callable[[Sequence[TokenRow]], Any]]:
        """What the wrapped router reads, and features where these are others."""
        if self.extractor is None:
            return self.router.readings
        return {**self.router.readings, self.extractor.key: self.extractor}

    @property
    def growing(self) -> GrowingFeatures:
        """What the wrapped router reads, where that is compared too."""
        return self.router.growing if self.extractor is None else WholeTexts(self.read)

    def weigh(self, read: Any) -> Routing:
        """Weigh as the wrapped router does, scaled to sum 1, or give everything to the fallback."""
        read, features = (read, read) if self.extractor is None else read
        routing = self.router.weigh(read).normalized()
        names, weights = routing.experts, routing.weights
        if self.fallback not in names:
            names, weights = (*names, self.fallback), torch.nn.functional.pad(weights, (0, 1))
        alone = torch.zeros(len(names))
        alone[names.index(self.fallback)] = 1.0
        answered = self.familiarity(features) >= self.threshold
        return Routing(names, torch.where(answered[:, None], weights, alone), routing.similarities)

    def with_caution(self, caution: float | None) -> Router:
        """Return the router with another caution, or the one that never refuses (None).

        Raises:
            CoterieError: when it is no share.
        """
        if caution is None:
            return self.router
        known = self.familiarity, self.calibration, self.fallback
        return RefusalRouter(self.router, *known, caution, self.extractor)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the rows and the calibration, and the wrapped router; return the entry for mixture.json."""
        inside, outside = self.calibration
        tensors = {**self.familiarity.tensors(), "inside": torch.stack(inside)}
        if len(outside.gain):
            tensors["outside"] = torch.stack(outside)
        write_tensors(folder / "refusal.safetensors", tensors)
        how = {"description": self.extractor.name, **self.extractor.record} if self.extractor else {}
        return {**super().save(folder), **how}

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "RefusalRouter":
        """Build it from its entry and its tensors, around the router that was built already."""
        if parts.inner is None:
            raise KeyError("of")
        seen = {"inside": (2, None), "outside": (2, None)}
        wanted = {"rows": (None, None), "spread": (None,), "centre": (None,), "strangers": (None, None), **seen}
        optional = ["spread", "centre", "strangers", "outside"]
        tensors = read_floats(parts.folder / "refusal.safetensors", wanted, "fit again", optional=optional)
        extractor = load_extractor(record, parts) if "description" in record else None
        outside = Observed(*tensors.get("outside", torch.zeros(2, 0)))
        calibration = Calibration(Observed(*tensors["inside"]), outside)
        fallback, caution = str(record["fallback"]), float(record["caution"])
        familiarity = Familiarity.read(tensors)
        width = familiarity.rows.shape[1]
        if extractor and (not width or extractor.dimensions % width):
            raise ValueError(f"rows of {width} dimensions cannot be compared with features of {extractor.dimensions}")
        return cls(parts.inner, familiarity, calibration, fallback, caution, extractor)
