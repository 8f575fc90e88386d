"""Choosing among methods by evidence: the cheapest that is not significantly worse than the best."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from coterie.evaluation.statistics import Interval, mean_difference, sign_flip_test, sign_flip_tests
from coterie.records.evaluation import LEVEL


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


def choose(candidates: Sequence[Candidate], tokens: Float[Tensor, " row"]) -> Choice:
    """Choose the cheapest candidate that the one with the smallest loss is not significantly better than.

    The test is the paired sign-flip test on losses per token, adjusted for as many candidates as there are; so
    something that is not better than the cheapest by more than chance explains is never chosen. Of two that cost the
    same, the one with the smaller loss comes first, but the first candidate of all is what the others have to beat.
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
    chosen = next(one.name for one in order if adjusted[one.name] >= LEVEL)
    return Choice(chosen, compared)


def difference(nll: Float[Tensor, " row"], control: Float[Tensor, " row"], tokens: Float[Tensor, " row"]) -> Interval:
    """Return the paired difference of two mean losses per token, with its 95% interval."""
    return mean_difference(nll.tolist(), control.tolist(), weights=tokens.tolist())


def chance(nll: Float[Tensor, " row"], control: Float[Tensor, " row"], tokens: Float[Tensor, " row"]) -> float:
    """Return the p-value of that difference, by paired sign flips."""
    return sign_flip_test(nll.tolist(), control.tolist(), weights=tokens.tolist())
