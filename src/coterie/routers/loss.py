"""Routing by predicted loss: a regression from a prompt's feature to how well each expert will do on it.

Similar prompts are not what matters in the end, but which expert is good at a prompt; that can be learned from
cross-fitted losses: of every expert, on rows that it was not trained on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.artifacts import read_floats
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.features.prefill import PrefillStates
from coterie.routers.base import RouterParts, Routing
from coterie.routers.feature import FeatureRouter, load_extractor

FOLDS = 5
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)  # times the mean squared length of the features
DECAYS, HIDDEN, STEPS, RATE = (0.1, 1.0), 32, 150, 3e-3  # of the network: tried weight decays, units, steps, their size
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

    def gain(self, weights: Float[Tensor, "row expert"], over: str) -> Float[Tensor, " row"]:
        """Return what a mixture gains over one expert on every row, in nats summed over its tokens."""
        return (self.nll[:, self.experts.index(over)] - self.mixture_nll(weights)) * self.tokens

    def take(self, rows: Tensor) -> "CrossFitLosses":
        """Keep some rows, by their numbers or a mask."""
        return CrossFitLosses(self.experts, self.nll[rows], self.pairs[rows], self.tokens[rows])

    def mean(self, nll: Float[Tensor, " row"]) -> float:
        """Return the mean per token of a loss that every row has."""
        return float((nll.double() * self.tokens).sum() / self.tokens.double().sum())

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


class Mlp(NamedTuple):
    """The same through one layer of rectified units, where a line does not do: `relu(unit @ inner.T + inner_bias)`."""

    inner: Float[Tensor, "hidden dimension"]
    inner_bias: Float[Tensor, " hidden"]
    weight: Float[Tensor, "expert hidden"]
    bias: Float[Tensor, " expert"]


Head = Ridge | Mlp


class LossRouter(FeatureRouter):
    """Gives expert e the weight softmax(-sharpness * predicted loss)_e; of states it is called `prefill`."""

    kinds = ("loss", PrefillStates.name)

    def __init__(
        self,
        extractor: FeatureExtractor,
        head: Head,
        experts: Sequence[str],
        sharpness: float,
        centre: Float[Tensor, " dimension"] | None = None,
    ) -> None:
        """Store the regression for the losses of `experts`; weights follow them by `sharpness`, per nat.

        Raises:
            CoterieError: when names and predictions do not match.
        """
        if not len(experts) == len(head.bias) == len(head.weight):
            raise CoterieError(f"{len(head.bias)} predictions do not fit the {len(experts)} experts")
        super().__init__(extractor, centre)
        self.kind = extractor.name if extractor.name in self.kinds else "loss"
        self.head = head
        self.experts = tuple(experts)
        self.sharpness = sharpness

    def weigh(self, read: Float[Tensor, "row dimension"]) -> Routing:
        """Weigh by predicted losses; similarities are those, negated."""
        predicted = predict(self.head, self._centred(read))
        similarities = dict(zip(self.experts, -predicted.T, strict=True))
        return Routing(self.experts, weigh(predicted, self.sharpness), similarities)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the regression and return the entry for mixture.json."""
        tensors, experts = self.head._asdict(), list(self.experts)
        return self._save(folder / "loss.safetensors", tensors, experts=experts, sharpness=self.sharpness)

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "LossRouter":
        """Build it from its entry and its tensors."""
        extractor, names = load_extractor(record, parts), list(record["experts"])
        file, width = parts.folder / "loss.safetensors", extractor.dimensions
        inner = {"inner": (None, width), "inner_bias": (None,)}
        wanted = {"weight": (len(names), None), "bias": (len(names),), "centre": (width,), **inner}
        tensors = read_floats(file, wanted, "fit again", optional=["centre", *inner])
        centre = tensors.pop("centre", None)
        head = Mlp(**tensors) if "inner" in tensors else Ridge(**tensors)
        hidden = {len(head.inner), len(head.inner_bias)} if isinstance(head, Mlp) else {width}
        if hidden != {head.weight.shape[1]}:
            raise ValueError(f"{file} holds weights of {head.weight.shape[1]} inputs, not {hidden}")
        return cls(extractor, head, names, record["sharpness"], centre)


def predict(head: Head, features: Float[Tensor, "row dimension"]) -> Float[Tensor, "row expert"]:
    """Predict every expert's loss relative to the experts' mean, in nats a token."""
    seen = torch.nn.functional.normalize(features, dim=-1)
    if isinstance(head, Mlp):
        seen = (seen @ head.inner.T + head.inner_bias).relu()
    return seen @ head.weight.T + head.bias


def weigh(predicted: Float[Tensor, "row expert"], sharpness: float) -> Float[Tensor, "row expert"]:
    """Turn predicted losses into weights that sum to 1."""
    return (-sharpness * predicted).softmax(dim=-1)


class Chosen(NamedTuple):
    """A regression, with what cross-validation chose for it: the kind of features, by its place among those tried.

    `penalty` is a weight decay for a network.
    """

    place: int
    head: Head
    penalty: float
    sharpness: float


class Fitted(NamedTuple):
    """The regression, the weights that rows get of others which had no part in them, and the loss of these weights.

    Those are chosen anew without the row, kind, penalty and sharpness too, so that nothing is chosen on what it is
    judged by.
    """

    chosen: Chosen
    weights: Float[Tensor, "row expert"]
    expected_nll: float


def fit_loss_router(
    tried: Sequence[Float[Tensor, "row _"]], losses: CrossFitLosses, *, seed: int = 0, with_mlp: bool = False
) -> Fitted:
    """Fit the regression: of the kinds of features the one, with the penalty and sharpness, that expects the least.

    Rows weigh by their tokens, as in every mean NLL here.
    """
    fold, count = folds_of(len(losses.tokens), seed), len(losses.experts)
    weights = torch.full_like(losses.nll, 1 / count)
    for number in fold.unique():
        own, others = fold == number, fold != number
        if bool(others.any()):
            found = _chosen([features[others] for features in tried], losses.take(others), seed, with_mlp)
            weights[own] = weigh(predict(found.head, tried[found.place][own]), found.sharpness)
    expected = losses.mean(losses.mixture_nll(weights))
    return Fitted(_chosen(tried, losses, seed, with_mlp), weights, expected)


def _chosen(tried: Sequence[Tensor], losses: CrossFitLosses, seed: int, with_mlp: bool) -> Chosen:
    """Choose by the estimated loss of the mixture, with predictions of regressions that did not see the row.

    With `with_mlp` small networks are tried too; the best of them is kept where its mixture's loss lies below that of
    the best line by more than twice the standard error of the difference.
    """
    target = losses.nll.double() - losses.nll.double().mean(dim=1, keepdim=True)
    tokens = losses.tokens.double()
    lines = {
        (place, penalty): predicted
        for place, features in enumerate(tried)
        for penalty, predicted in out_of_fold(features, target, tokens, PENALTIES, seed=seed).items()
    }
    line = _best(lines, losses)
    place, features = line.place, tried[line.place]
    if with_mlp:
        fits = {decay: partial(fit_mlps, features, target, tokens, decay=decay, seed=seed) for decay in DECAYS}

        def left_out(decay: float) -> Tensor:
            return _cross_fitted(lambda folds: [[one] for one in fits[decay](folds)], features, target, seed)[0]

        network = _best({(place, decay): left_out(decay) for decay in DECAYS}, losses)
        gain = (line.nll - network.nll) * tokens
        if float(gain.sum()) > 2 * float(gain.std()) * len(gain) ** 0.5:
            (head,) = fits[network.penalty](torch.ones(1, len(features), dtype=torch.bool))
            return Chosen(place, head, network.penalty, network.sharpness)
    return Chosen(place, fit_ridge(features, target, tokens, penalty=line.penalty), line.penalty, line.sharpness)


class _Tried(NamedTuple):
    """What `Chosen` has beside the regression, and the estimated loss of every row."""

    place: int
    penalty: float
    sharpness: float
    nll: Float[Tensor, " row"]


def _best(predictions: Mapping[tuple[int, float], Tensor], losses: CrossFitLosses) -> _Tried:
    """Return the features and the penalty, of those with their predictions, and the sharpness with the least loss."""

    def each() -> Iterator[_Tried]:
        for (place, penalty), predicted in predictions.items():
            for sharpness in SHARPNESSES:
                weights = weigh(predicted, sharpness).to(losses.nll.dtype)
                yield _Tried(place, penalty, sharpness, losses.mixture_nll(weights).double())

    return min(each(), key=lambda own: losses.mean(own.nll))


def fit_ridge(
    features: Float[Tensor, "row dimension"],
    target: Float[Tensor, "row expert"],
    tokens: Float[Tensor, " row"] | None = None,
    *,
    penalty: float,
) -> Ridge:
    """Regress on unit features; rows weigh by their tokens, and the penalty is in mean squared lengths of these."""
    unit, weights, scale = _scaled(features, tokens)
    return _ridges(unit, target, weights, [penalty * scale])[0]


def out_of_fold(
    features: Float[Tensor, "row dimension"],
    target: Float[Tensor, "row expert"],
    tokens: Float[Tensor, " row"] | None,
    penalties: Sequence[float],
    *,
    seed: int = 0,
) -> dict[float, Float[Tensor, "row expert"]]:
    """Predict every row by a regression on the other folds, at each of some penalties."""
    unit, weights, scale = _scaled(features, tokens)
    scaled = [penalty * scale for penalty in penalties]

    def fit(folds: Tensor) -> list[list[Ridge]]:
        return [_ridges(unit[seen], target[seen], weights[seen], scaled) for seen in folds]

    return dict(zip(penalties, _cross_fitted(fit, unit.float(), target, seed, len(penalties)), strict=True))


def _cross_fitted(
    fit: Callable[[Tensor], Sequence[Sequence[Head]]], features: Tensor, target: Tensor, seed: int, heads: int = 1
) -> Float[Tensor, "head row expert"]:
    """Predict every row by each of the heads that `fit` makes, for each fold, of the rows of the others.

    It is told these as (fold, row). Where there are none, nothing is known: 0.
    """
    fold, predicted = folds_of(len(features), seed), target.new_zeros(heads, *target.shape)
    numbers = fold.unique()
    if len(numbers) > 1:
        for number, made in zip(numbers, fit(fold != numbers[:, None]), strict=True):
            own = fold == number
            predicted[:, own] = torch.stack([predict(head, features[own]).double() for head in made])
    return predicted


def fit_mlps(
    features: Float[Tensor, "row dimension"],
    target: Float[Tensor, "row expert"],
    tokens: Float[Tensor, " row"],
    seen: Bool[Tensor, "network row"],
    *,
    decay: float,
    seed: int = 0,
) -> list[Mlp]:
    """Train small networks side by side, each by AdamW for as many steps as `STEPS` on all the rows that it sees.

    Rows weigh by their tokens. A network sees features and targets scaled to a root mean square of 1; the scales are in
    its weights afterwards. All start alike, and none is changed by what another sees.
    """
    width, count = features.shape[1] ** 0.5, seen.sum(dim=1)[:, None]
    scaled = width * torch.nn.functional.normalize(features.float(), dim=-1)
    squares = target.float().square().mean(dim=1)
    spread = ((seen * squares).sum(dim=1, keepdim=True) / count).sqrt().clamp(min=1e-6)[:, :, None]
    wanted = target.float() / spread
    weights = seen * tokens.float()
    shares = weights / weights.sum(dim=1, keepdim=True) / target.shape[1]
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(HIDDEN, features.shape[1], generator=generator) / width, torch.zeros(1, HIDDEN)]
    drawn += [torch.randn(target.shape[1], HIDDEN, generator=generator) / HIDDEN**0.5, torch.zeros(1, target.shape[1])]
    parts = [own.expand(len(seen), -1, -1).clone().requires_grad_() for own in drawn]
    optimizer = torch.optim.AdamW(parts, lr=RATE, weight_decay=decay)
    inner, inner_bias, weight, bias = parts
    with torch.enable_grad():
        for _ in range(STEPS):
            units = (scaled @ inner.flatten(0, 1).T).unflatten(1, inner.shape[:2]).transpose(0, 1) + inner_bias
            found = torch.baddbmm(bias, units.relu(), weight.transpose(1, 2))
            optimizer.zero_grad()
            (shares[:, :, None] * (found - wanted).square()).sum().backward()
            optimizer.step()
    inner, inner_bias, weight, bias = (own.detach() for own in parts)
    return [
        Mlp(*own) for own in zip(width * inner, inner_bias[:, 0], spread * weight, (spread * bias)[:, 0], strict=True)
    ]


def folds_of(count: int, seed: int) -> Int[Tensor, " row"]:
    """Return the number of the fold that each row is in."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % min(FOLDS, count)


def _scaled(features: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Return unit features, the rows' weights, and the mean squared length of centred features."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    weights = torch.ones(len(unit), dtype=torch.float64) if tokens is None else tokens.double()
    return unit, weights, float(unit.sub(unit.mean(dim=0)).square().sum(dim=1).mean())


def _ridges(unit: Tensor, target: Tensor, tokens: Tensor, penalties: Sequence[float]) -> list[Ridge]:
    """Solve in rows or in dimensions, whichever are fewer; intercepts are not penalised."""
    shares = tokens / tokens.mean()
    centre = (shares[:, None] * unit).mean(dim=0)
    level = (shares[:, None] * target).mean(dim=0)
    roots = shares.sqrt()[:, None]
    rows, wanted = roots * (unit - centre), roots * (target - level)
    count, dimensions = rows.shape
    gram = rows @ rows.T if count < dimensions else rows.T @ rows
    right = wanted if count < dimensions else rows.T @ wanted

    def solved(penalty: float) -> Ridge:
        found = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), right)
        weight = (rows.T @ found if count < dimensions else found).T
        return Ridge(weight.float(), (level - weight @ centre).float())

    return [solved(penalty) for penalty in penalties]
