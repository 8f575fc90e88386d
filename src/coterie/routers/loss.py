"""Routing by predicted loss: a ridge regression from a prompt's feature to how well each expert will do on it.

Similar prompts are not what matters in the end, but which expert is good at a prompt; that can be learned from
cross-fitted losses: of every expert, on rows that it was not trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coterie.artifacts import read_floats
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.features.prefill import PrefillStates
from coterie.routers.base import RouterParts, Routing
from coterie.routers.feature import FeatureRouter, load_extractor

FOLDS = 5
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # times the mean squared length of the features
SHARPNESSES = (0.0, *(2.0**power for power in range(11)))  # per nat; 0 is uniform, 1024 nearly the single best


@dataclass(frozen=True, eq=False)
class CrossFitLosses:
    """Every expert's loss, and that of every even pair, on the reference answers of rows that it was not trained on.

    Attributes:
        experts: names, in the order of the expert axes.
        nll: (row, expert): mean negative log-likelihood per token, in nats.
        pairs: (row, expert, expert): the same for the even mixture of two experts' logits; one with itself is `nll`.
        tokens: (row,): tokens that each mean is over.
    """

    experts: tuple[str, ...]
    nll: Float[Tensor, "row expert"]
    pairs: Float[Tensor, "row expert expert"]
    tokens: Float[Tensor, " row"]

    def mixture_nll(self, weights: Float[Tensor, "row expert"]) -> Float[Tensor, " row"]:
        """Estimate the loss of any mixture of the experts' logits, to second order in how far they differ.

        Mixing logits gains over the mean loss by Jensen's gap of the log-partition, which is quadratic in small
        differences: sum_{e<f} w_e w_f g_ef, with g_ef four times the gap of the even pair. Exact for a single expert
        and for an even pair; weights must sum to 1.
        """
        gaps = 2 * (self.nll[:, :, None] + self.nll[:, None, :]) - 4 * self.pairs  # [row, E, E]
        gain = torch.einsum("ne,nef,nf->n", weights, gaps, weights) / 2  # each pair stands there twice
        return (weights * self.nll).sum(dim=1) - gain

    def best_of_rows(self) -> list[str]:
        """Return the expert with the smallest loss on each row."""
        return [self.experts[place] for place in self.nll.argmin(dim=1).tolist()]

    def best_single(self) -> str:
        """Return the expert with the smallest loss per token over all rows."""
        totals = (self.nll * self.tokens[:, None]).sum(dim=0)
        return self.experts[int(totals.argmin())]


class Ridge(NamedTuple):
    """A linear prediction from unit features: `unit @ weight.T + bias`, in nats relative to the experts' mean."""

    weight: Float[Tensor, "expert dimension"]
    bias: Float[Tensor, " expert"]


class LossRouter(FeatureRouter):
    """Gives expert e the weight softmax(-sharpness * predicted loss)_e; of states it is called `prefill`."""

    kinds = ("loss", PrefillStates.name)

    def __init__(
        self,
        extractor: FeatureExtractor,
        ridge: Ridge,
        experts: Sequence[str],
        sharpness: float,
        centre: Float[Tensor, " dimension"] | None = None,
    ) -> None:
        """Store the regression for the losses of `experts`; weights follow them by `sharpness`, per nat.

        Raises:
            CoterieError: when names and predictions do not match.
        """
        if not len(experts) == len(ridge.bias) == len(ridge.weight):
            raise CoterieError(f"{len(ridge.bias)} predictions do not fit the {len(experts)} experts")
        super().__init__(extractor, centre)
        self.kind = extractor.name if extractor.name in self.kinds else "loss"
        self.ridge = ridge
        self.experts = tuple(experts)
        self.sharpness = sharpness

    def weigh(self, read: Float[Tensor, "row dimension"]) -> Routing:
        """Weigh by predicted losses; similarities are those, negated."""
        predicted = predict(self.ridge, self._centred(read))
        similarities = dict(zip(self.experts, -predicted.T, strict=True))
        return Routing(self.experts, weigh(predicted, self.sharpness), similarities)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the regression and return the entry for mixture.json."""
        tensors = {"weight": self.ridge.weight, "bias": self.ridge.bias}
        experts = list(self.experts)
        return self._save(folder / "loss.safetensors", tensors, experts=experts, sharpness=self.sharpness)

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "LossRouter":
        """Build it from its entry and its tensors."""
        extractor, names = load_extractor(record, parts), list(record["experts"])
        wanted = {
            "weight": (len(names), extractor.dimensions),
            "bias": (len(names),),
            "centre": (extractor.dimensions,),
        }
        tensors = read_floats(parts.folder / "loss.safetensors", wanted, "fit again", optional=["centre"])
        ridge = Ridge(tensors["weight"], tensors["bias"])
        return cls(extractor, ridge, names, record["sharpness"], tensors.get("centre"))


def predict(ridge: Ridge, features: Float[Tensor, "row dimension"]) -> Float[Tensor, "row expert"]:
    """Predict every expert's loss relative to the experts' mean, in nats a token."""
    return torch.nn.functional.normalize(features, dim=-1) @ ridge.weight.T + ridge.bias


def weigh(predicted: Float[Tensor, "row expert"], sharpness: float) -> Float[Tensor, "row expert"]:
    """Turn predicted losses into weights that sum to 1."""
    return (-sharpness * predicted).softmax(dim=-1)


class Fitted(NamedTuple):
    """A regression with what was chosen for it by cross-validation, and the loss it is estimated to reach.

    `weights` are those that regressions which did not see a row give it.
    """

    ridge: Ridge
    penalty: float
    sharpness: float
    expected_nll: float
    weights: Float[Tensor, "row expert"]


def fit_loss_router(features: Float[Tensor, "row dimension"], losses: CrossFitLosses, *, seed: int = 0) -> Fitted:
    """Fit the regression; its penalty and the weights' sharpness minimise the estimated loss of the mixture.

    Every row's estimate uses predictions of regressions that did not see it (5 folds); rows weigh by their tokens, as
    in every mean NLL here.
    """
    target = losses.nll.double() - losses.nll.double().mean(dim=1, keepdim=True)
    tokens = losses.tokens.double()
    best = None
    for penalty in PENALTIES:
        predicted = out_of_fold(features, target, tokens, penalty=penalty, seed=seed)
        for sharpness in SHARPNESSES:
            weights = weigh(predicted, sharpness).to(losses.nll.dtype)
            nll = losses.mixture_nll(weights).double()
            expected = float((nll * tokens).sum() / tokens.sum())
            if best is None or expected < best[0]:
                best = (expected, penalty, sharpness, weights)
    assert best is not None  # the tables above are not empty
    expected, penalty, sharpness, weights = best
    return Fitted(fit_ridge(features, target, tokens, penalty=penalty), penalty, sharpness, expected, weights)


def fit_ridge(
    features: Float[Tensor, "row dimension"],
    target: Float[Tensor, "row expert"],
    tokens: Float[Tensor, " row"] | None = None,
    *,
    penalty: float,
) -> Ridge:
    """Regress on unit features; rows weigh by their tokens, and the penalty is in mean squared lengths of these."""
    unit, weights, scale = _scaled(features, tokens)
    return _ridge(unit, target, weights, penalty * scale)


def out_of_fold(
    features: Float[Tensor, "row dimension"],
    target: Float[Tensor, "row expert"],
    tokens: Float[Tensor, " row"] | None = None,
    *,
    penalty: float,
    seed: int = 0,
) -> Float[Tensor, "row expert"]:
    """Predict every row by a regression on the other folds."""
    unit, weights, scale = _scaled(features, tokens)
    fold = folds_of(len(unit), seed)
    predicted = torch.zeros_like(target)
    for number in fold.unique():
        own, others = fold == number, fold != number
        if bool(others.any()):
            ridge = _ridge(unit[others], target[others], weights[others], penalty * scale)
            predicted[own] = predict(ridge, unit[own].float()).double()
    return predicted


def folds_of(count: int, seed: int) -> Int[Tensor, " row"]:
    """Return the number of the fold that each row is in."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % min(FOLDS, count)


def _scaled(features: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Return unit features, the rows' weights, and the mean squared length of centred features."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    weights = torch.ones(len(unit), dtype=torch.float64) if tokens is None else tokens.double()
    return unit, weights, float(unit.sub(unit.mean(dim=0)).square().sum(dim=1).mean())


def _ridge(unit: Tensor, target: Tensor, tokens: Tensor, penalty: float) -> Ridge:
    """Solve in rows or in dimensions, whichever are fewer; intercepts are not penalised."""
    shares = tokens / tokens.mean()
    centre = (shares[:, None] * unit).mean(dim=0)
    level = (shares[:, None] * target).mean(dim=0)
    roots = shares.sqrt()[:, None]
    rows, wanted = roots * (unit - centre), roots * (target - level)
    count, dimensions = rows.shape
    gram = rows @ rows.T if count < dimensions else rows.T @ rows
    gram.diagonal().add_(penalty)
    right = wanted if count < dimensions else rows.T @ wanted
    solved = torch.linalg.solve(gram, right)
    weight = (rows.T @ solved if count < dimensions else solved).T
    return Ridge(weight.float(), (level - weight @ centre).float())
