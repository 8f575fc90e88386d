"""Choosing a few of many adapters for a task, from how they do on its examples and how alike they are.

The selection step of "Leveraging Open Knowledge for Advancing Task Expertise" (arXiv 2408.15915, algorithm 1), on plain
numbers: ranks by accuracy and by the perplexity of reasoning, then the most diverse group of the best. Values count to
six decimals, equal ones share the smaller rank, and names break what is still even, so that no order of adapters and no
rounding of a machine decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from coterie.errors import CoterieError, check_known
from coterie.lora import Adapter, StackedPair, stack

DECIMALS = 6
MOST_GROUPS = 1_000_000


class ShotScores(NamedTuple):
    """How adapters do on the shots."""

    correct: Float[Tensor, "adapter shot"]
    """1 for a right answer, 0 for a wrong one, NaN where a shot has nothing to tell it by."""
    nll: Float[Tensor, "adapter shot"]
    """Mean negative log-likelihood per token of the shot's rationale, in nats."""
    tokens: Float[Tensor, " shot"]
    """Tokens of the rationale."""


def log_perplexities(scores: ShotScores, of: str = "mean") -> Float[Tensor, " adapter"]:
    """Return the logarithm of every adapter's reasoning perplexity, averaged over the shots.

    A shot's perplexity is the exponential of its `mean` NLL per token, as the published code has it, or of the `sum`
    over its tokens, as the paper writes it; long rationales rule that one.
    """
    exponents = scores.nll if of == "mean" else scores.nll * scores.tokens
    return exponents.double().logsumexp(dim=1).float() - math.log(exponents.shape[1])


@dataclass(frozen=True)
class Ranked:
    """An adapter among its rivals.

    Attributes:
        name: its name.
        accuracy: share of right answers; NaN where no shot can be graded.
        log_perplexity: of its reasoning.
        rank_accuracy: 1 for the most accurate.
        rank_perplexity: 1 for the least perplexed.
        rank_sum: what counts: both ranks, or the one that was asked for.
    """

    name: str
    accuracy: float
    log_perplexity: float
    rank_accuracy: int
    rank_perplexity: int
    rank_sum: int


def ranked(names: Sequence[str], scores: ShotScores, *, by: str = "both", perplexity_of: str = "mean") -> list[Ranked]:
    """Rank adapters, best first, by `both` ranks (the paper's), by `accuracy` or by `perplexity` alone.

    The names stand in the order of the scores; `perplexity_of` is the `of` of `log_perplexities`.
    """
    accuracy = _rounded(scores.correct.nanmean(dim=1))  # among the shots that can be graded; NaN where none can
    perplexity = _rounded(log_perplexities(scores, perplexity_of))
    by_accuracy = _ranks([0.0 if math.isnan(value) else -value for value in accuracy])
    by_perplexity = _ranks(perplexity)
    found = []
    for values in zip(names, accuracy, perplexity, by_accuracy, by_perplexity, strict=True):
        one, other = values[3:]
        found.append(Ranked(*values, {"both": one + other, "accuracy": one, "perplexity": other}[by]))
    return sorted(found, key=lambda adapter: (adapter.rank_sum, adapter.log_perplexity, adapter.name))


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DECIMALS) for value in values.tolist()]


def _ranks(values: Sequence[float]) -> list[int]:
    """Return ranks from 1; equal values share the smallest of theirs."""
    from scipy.stats import rankdata

    return rankdata(values, method="min").astype(int).tolist()


# ------------------------------------------------------------------------------------------------------- similarity


def similarities(adapters: Sequence[Adapter], of: str = "updates") -> Float[Tensor, "adapter adapter"]:
    """Return how alike adapters are: the mean over layers of the cosine between flattened matrices.

    A layer that one of the two leaves as it is counts as a cosine of 0.

    Args:
        adapters: on one base model; ranks and layers may differ.
        of: `updates` compares B A, which no rotation of the factors changes, without ever forming it; `factors`
            compares A with A and B with B by absolute cosine, as the published code does.

    Raises:
        CoterieError: for another way to compare.
    """
    check_known("way to compare adapters", of, ("updates", "factors"))
    total, layers = torch.zeros(2, len(adapters), len(adapters), dtype=torch.float64)
    for path in sorted({path for adapter in adapters for path in adapter}):
        pair = StackedPair(*(side.double() for side in stack([adapter.get(path) for adapter in adapters])))
        changes = torch.tensor([path in adapter for adapter in adapters])
        if of == "updates":
            total += _cosines_of_updates(pair)
        else:  # smaller ranks are filled up with zeros
            downs, ups = (normalize(side.flatten(1), dim=1) for side in pair)
            total += ((downs @ downs.T).abs() + (ups @ ups.T).abs()) / 2
        layers += changes[:, None] | changes[None]
    return (total / layers.clamp(min=1)).float()


def _cosines_of_updates(pair: StackedPair) -> Float[Tensor, "adapter adapter"]:
    """Compare updates: <B1 A1, B2 A2> is the sum of (B1' B2) * (A1 A2'), of the size of the ranks only."""
    experts, rank = pair.down.shape[:2]
    downs, ups = (side.flatten(0, 1) for side in pair)
    products = (downs @ downs.T) * (ups @ ups.T)
    inner = products.unflatten(0, (experts, rank)).unflatten(-1, (experts, rank)).sum(dim=(1, 3))
    norms = inner.diagonal().clamp(min=0).sqrt()
    return inner / (norms[:, None] * norms[None]).clamp(min=torch.finfo(inner.dtype).tiny)


# ----------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class AdapterGroup:
    """Some of the candidates, as a group.

    Attributes:
        names: of its members, best first.
        rank_sum: of its members together.
        similarity: mean over its pairs.
        rank_diversity: 1 for the least similar group of this size; 0 where diversity does not count.
        score: sum of both ranks, of which the chosen group has the least.
    """

    names: tuple[str, ...]
    rank_sum: int
    similarity: float
    rank_diversity: int
    score: int


def groups(
    candidates: Sequence[Ranked], similarity: Float[Tensor, "candidate candidate"], size: int, *, diverse: bool = True
) -> list[AdapterGroup]:
    """Compare all groups of one size, best first.

    The paper ranks groups by the inverse of their mean similarity, which means nothing where that is negative; the
    smallest mean similarity first is the same order where it does. It counts only if groups shall be `diverse`.

    Raises:
        CoterieError: when there are fewer candidates, or too many groups to compare.
    """
    if not 1 <= size <= len(candidates):
        raise CoterieError(f"{size} adapters shall be kept of {len(candidates)}; lower --keep or add adapters")
    if math.comb(len(candidates), size) > MOST_GROUPS:
        raise CoterieError(
            f"{len(candidates)} candidates make {math.comb(len(candidates), size):,} groups of {size}, more than "
            f"{MOST_GROUPS:,}; lower --candidates"
        )
    members = torch.combinations(torch.arange(len(candidates)), size)
    within = similarity[members[:, :, None], members[:, None]]
    pairs = ~torch.eye(size, dtype=torch.bool)
    means = _rounded(within[:, pairs].mean(dim=1)) if size > 1 else [0.0] * len(members)
    ranks = _ranks(means) if diverse else [0] * len(members)
    found = []
    for places, mean, rank in zip(members.tolist(), means, ranks, strict=True):
        names = tuple(candidates[place].name for place in places)
        rank_sum = sum(candidates[place].rank_sum for place in places)
        found.append(AdapterGroup(names, rank_sum, mean, rank, rank_sum + rank))
    return sorted(found, key=lambda group: (group.score, group.rank_sum, group.similarity, group.names))


# ---------------------------------------------------------------------------------------------------------- halving


def halving_rounds(adapters: int, shots: int, first: int | None, least: int) -> list[tuple[int, int]]:
    """Plan successive halving: shots of every round, and how many adapters are scored in it.

    Every round has twice the shots of the one before and the better half of its adapters, never fewer than `least`;
    the last one has all shots. Without `first` all adapters are scored on all shots.
    """
    rounds: list[tuple[int, int]] = []
    while first is not None and first < shots and adapters > least:
        rounds.append((first, adapters))
        first, adapters = 2 * first, max(least, math.ceil(adapters / 2))
    return [*rounds, (shots, adapters)]


def agreement(one: Sequence[int], other: Sequence[int]) -> float | None:
    """Return Kendall's tau-b between two rankings of the same adapters; None where it says nothing."""
    from scipy.stats import kendalltau

    if len(one) < 2 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return round(float(kendalltau(one, other).statistic), DECIMALS)
