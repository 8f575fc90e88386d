"""Choosing among methods by evidence: the cheapest that is about as good as the best, or none of them."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from coterie.evaluation.statistics import Interval, mean_difference, sign_flip_test, sign_flip_tests
from coterie.records.choice import CandidateRecord
from coterie.records.evaluation import LEVEL

KEPT = 0.9
"""The share of the best's gain that a cheaper candidate has to have."""


class Candidate(NamedTuple):
    """One way to answer.

    Attributes:
        name: what it is called.
        cost: tokens that a model reads for a mean request, as multiples of what one expert alone reads.
        nll: mean NLL per token of every held-out row, in nats.
    """

    name: str
    cost: float
    nll: Float[Tensor, " row"]


class Compared(NamedTuple):
    """A candidate beside the cheapest one and beside the best.

    Attributes:
        candidate: itself.
        nll: its mean over all tokens.
        gap: its difference to the first candidate, with a 95% interval.
        p: that the best is not better than it, adjusted for all candidates at once; 1 for the best itself.
    """

    candidate: Candidate
    nll: float
    gap: Interval
    p: float


class Choice(NamedTuple):
    """What was chosen, and all that it was compared with, the cheapest first."""

    chosen: str
    compared: tuple[Compared, ...]

    @property
    def own(self) -> Compared:
        """The chosen candidate."""
        return next(one for one in self.compared if one.candidate.name == self.chosen)

    def records(self) -> tuple[CandidateRecord, ...]:
        """Return what a record of the choice holds of every candidate."""
        return tuple(
            CandidateRecord(
                name=one.candidate.name,
                cost=one.candidate.cost,
                nll=one.nll,
                difference=one.gap.value,
                interval=one.gap.ends,
                p=one.p,
            )
            for one in self.compared
        )


def choose(candidates: Sequence[Candidate], tokens: Float[Tensor, " row"]) -> Choice:
    """Choose the first candidate, unless the best is significantly better: then the cheapest that is about as good.

    The best is the one with the smallest loss. About as good is what it is not significantly better than and what has
    nine tenths of its gain over the first: not to be told apart is not to be alike, and of few rows a cheap candidate
    with half of the gain is not told apart. The test is the paired sign-flip test on losses per token, adjusted for as
    many candidates as there are. Of two that cost the same, the one with the smaller loss comes first.
    """
    weights = tokens.tolist()
    means = {one.name: float((one.nll * tokens).sum() / tokens.sum()) for one in candidates}
    first, *others = candidates
    order = [first, *sorted(others, key=lambda one: (one.cost, means[one.name]))]
    best = min(order, key=lambda one: means[one.name])
    rivals = {one.name: one.nll.tolist() for one in order if one is not best}
    adjusted = {best.name: 1.0, **sign_flip_tests(rivals, best.nll.tolist(), weights=weights)}
    compared = tuple(
        Compared(one, means[one.name], difference(one.nll, first.nll, tokens), adjusted[one.name]) for one in order
    )
    if adjusted[first.name] >= LEVEL:
        return Choice(first.name, compared)
    least = KEPT * (means[first.name] - means[best.name])
    good = (one.name for one in order if adjusted[one.name] >= LEVEL and means[first.name] - means[one.name] >= least)
    return Choice(next(good), compared)


def difference(nll: Float[Tensor, " row"], control: Float[Tensor, " row"], tokens: Float[Tensor, " row"]) -> Interval:
    """Return the paired difference of two mean losses per token, with its 95% interval."""
    return mean_difference(nll.tolist(), control.tolist(), weights=tokens.tolist())


def chance(nll: Float[Tensor, " row"], control: Float[Tensor, " row"], tokens: Float[Tensor, " row"]) -> float:
    """Return the p-value of that difference, by paired sign flips."""
    return sign_flip_test(nll.tolist(), control.tolist(), weights=tokens.tolist())
