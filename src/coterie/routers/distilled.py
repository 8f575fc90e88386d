"""A router that was taught another one's weights, by states that cost no backward pass, and asks it where unsure.

How far the pupil's weights are from the teacher's is known on training rows, by pupils that were not taught them; it
falls with how familiar a prompt is (isotonic regression), which estimates the error on new ones.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import read_floats, write_tensors
from coterie.data.batching import TokenRow
from coterie.features.growing_text import FeatureExtractor, GrowingFeatures, WholeTexts
from coterie.routers.base import Router, RouterParts, Routing, Wrapper
from coterie.routers.familiarity import Familiarity
from coterie.routers.feature import load_extractor
from coterie.routers.loss import Ridge, fit_ridge, out_of_fold, predict

TOLERANCE = 0.1
"""The share of the weight on other experts than the teacher's up to which the pupil is trusted."""
PENALTIES = (0.01, 0.1, 1.0, 10.0)
SMALLEST_WEIGHT = 1e-3  # of which a logarithm is taught


class ErrorCurve(NamedTuple):
    """The pupil's error at some familiarities, which rise while errors fall; below the first it is not known."""

    familiarity: Float[Tensor, " knot"]
    error: Float[Tensor, " knot"]

    def __call__(self, familiarity: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """Estimate errors: that of the knot below each; 1, the largest there is, below the first."""
        below = torch.searchsorted(self.familiarity, familiarity, right=True) - 1
        return torch.where(below < 0, 1.0, self.error[below.clamp(min=0)])


class Read(NamedTuple):
    """Every prompt's states, and what the teacher reads of some prompts, by their places."""

    features: Float[Tensor, "row dimension"]
    asked: list[int]
    by_teacher: Any


class DistilledRouter(Wrapper):
    """Gives the weights softmax(prediction) of a ridge regression, or the teacher's where their error may be high."""

    kind = "distilled"
    kinds = (kind,)
    saved = ("experts", "tolerance")

    def __init__(
        self,
        teacher: Router,
        extractor: FeatureExtractor,
        ridge: Ridge,
        experts: Sequence[str],
        familiarity: Familiarity,
        curve: ErrorCurve,
        tolerance: float = TOLERANCE,
    ) -> None:
        """Store the teacher, and what was learnt of it; it is asked where the estimated error is above `tolerance`."""
        super().__init__(teacher)
        self.extractor = extractor
        self.ridge = ridge
        self.experts = list(experts)
        self.familiarity = familiarity
        self.curve = curve
        self.tolerance = tolerance

    @property
    def features(self) -> FeatureExtractor:
        """What extracts the pupil's features."""
        return self.extractor

    @property
    def readings(self) -> Mapping[Hashable, Callable[[Sequence[TokenRow]], Any]]:
        """What it reads is its own."""
        return {id(self): self.read}

    @property
    def growing(self) -> GrowingFeatures:
        """Whole texts."""
        return WholeTexts(self.read)

    def read(self, prompts: Sequence[TokenRow]) -> Read:
        """Read the states of all prompts, and what the teacher reads of those that it is asked about."""
        features = self.extractor(prompts)
        unsure = self.curve(self.familiarity(features)) > self.tolerance
        asked = unsure.nonzero().flatten().tolist()
        return Read(features, asked, self.router.read([prompts[i] for i in asked]) if asked else None)

    def weigh(self, read: Read) -> Routing:
        """Weigh by what was learnt, or as the teacher."""
        weights = predict(self.ridge, read.features).softmax(dim=-1)
        if read.asked:
            weights[read.asked] = self.router.weigh(read.by_teacher).normalized().aligned(self.experts).weights
        return Routing(tuple(self.experts), weights)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what was learnt, and the teacher; return the entry for mixture.json."""
        tensors = {"weight": self.ridge.weight, "bias": self.ridge.bias, **self.familiarity.tensors()}
        write_tensors(folder / "distilled.safetensors", {**tensors, "curve": torch.stack(self.curve)})
        return {**super().save(folder), "description": self.extractor.name, **self.extractor.record}

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "DistilledRouter":
        """Build it from its entry and its tensors, around the teacher that was built already."""
        if parts.inner is None:
            raise KeyError("of")
        extractor, names = load_extractor(record, parts), list(record["experts"])
        wanted = {
            "weight": (len(names), extractor.dimensions),
            "bias": (len(names),),
            "rows": (None, extractor.dimensions),
            "spread": (None,),
            "centre": (extractor.dimensions,),
            "curve": (2, None),
        }
        optional = ["spread", "centre"]
        tensors = read_floats(parts.folder / "distilled.safetensors", wanted, "fit again", optional=optional)
        ridge, curve = Ridge(tensors["weight"], tensors["bias"]), ErrorCurve(*tensors["curve"])
        rows, tolerance = Familiarity.read(tensors), float(record["tolerance"])
        return cls(parts.inner, extractor, ridge, names, rows, curve, tolerance)


class Learnt(NamedTuple):
    """A pupil, and how well pupils that were not taught a row agree with the teacher there.

    Attributes:
        ridge: the regression to the logarithms of weights.
        familiarity: the rows that it was taught.
        curve: its error by familiarity.
        weights: (row, expert): those that other pupils give each row.
        error: the mean share of the weight that is on other experts than the teacher's.
    """

    ridge: Ridge
    familiarity: Familiarity
    curve: ErrorCurve
    weights: Float[Tensor, "row expert"]
    error: float


def distil(features: Float[Tensor, "row dimension"], weights: Float[Tensor, "row expert"], *, seed: int = 0) -> Learnt:
    """Learn a teacher's weights, which sum to 1; the penalty is the one with the least error in cross-validation."""
    from sklearn.isotonic import IsotonicRegression

    logs = weights.double().clamp(min=SMALLEST_WEIGHT).log()
    target = logs - logs.mean(dim=1, keepdim=True)
    found = []
    for penalty, predicted in out_of_fold(features, target, None, PENALTIES, seed=seed).items():
        own = predicted.softmax(dim=-1).float()
        found.append((float(misplaced(own, weights).mean()), penalty, own))
    error, penalty, own = min(found, key=lambda entry: entry[0])
    familiarity = Familiarity.of(features, seed)
    known = familiarity(features)
    order = known.argsort()
    fitted = IsotonicRegression(increasing=False).fit(known[order].numpy(), misplaced(own, weights)[order].numpy())
    knots = known[order].unique()
    curve = ErrorCurve(knots, torch.from_numpy(fitted.predict(knots.numpy())).float())
    return Learnt(fit_ridge(features, target, penalty=penalty), familiarity, curve, own, error)


def misplaced(weights: Float[Tensor, "row expert"], wanted: Float[Tensor, "row expert"]) -> Float[Tensor, " row"]:
    """Return the share of the weight that is on other experts than wanted: the total variation distance."""
    return (weights - wanted).abs().sum(dim=1) / 2
