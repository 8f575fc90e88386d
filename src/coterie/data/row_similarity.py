"""How near rows are to a few examples: to the nearest one, to their convex hull, or to where they are dense.

All three are put on the scale of a cosine: with one example, each of them is the cosine to that example. Embeddings
have length 1. The rules are those of "Leveraging Open Knowledge for Advancing Task Expertise" (arXiv 2408.15915),
which samples from the hull's members and by density; here rows are ranked instead. So nothing is left to chance, and
nothing depends on membership: the hull of vectors of length 1 has no other members of length 1 than its corners.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.settings.groups import SimilarityRule

HULL_TOLERANCE = 1e-8
SMALLEST_CURVATURE = 1e-12
"""Takes the place of 0, the curvature between two equal examples."""

Similarity = Callable[[Float[Tensor, "row shot"]], Float[Tensor, " row"]]
"""Turns the cosines of rows to all examples into one similarity a row."""


def similarity_by(rule: SimilarityRule, shots: Float[Tensor, "shot dimension"], gamma: float) -> Similarity:
    """Return a rule for these examples; `gamma` is the sharpness of `kde`."""
    if rule == "kde":
        return partial(density_similarity, gamma=gamma)
    if rule == "convex-hull":
        return partial(hull_similarity, gram=shots.double() @ shots.double().T)
    return partial(torch.amax, dim=1)  # the cosine to the nearest example


def density_similarity(cosines: Float[Tensor, "row shot"], gamma: float) -> Float[Tensor, " row"]:
    """Return the density of the examples at every row, as the cosine at which one example alone would be as dense.

    The density is the mean of exp(-gamma * squared distance) over the examples. Its logarithm is what is computed, so a
    large gamma, which leads to the largest cosine, does no harm.
    """
    log_density = torch.logsumexp(2 * gamma * (cosines - 1), dim=1) - math.log(cosines.shape[1])
    return 1 + log_density / (2 * gamma)


def hull_similarity(cosines: Float[Tensor, "row shot"], gram: Float[Tensor, "shot shot"]) -> Float[Tensor, " row"]:
    """Return 1 - d^2 / 2 for the distance d of every row to the convex hull of the examples.

    Weight moves between the pair of examples that gains most by it, for all rows at once, until the best such gain
    certifies that no point of the hull is nearer by more than `HULL_TOLERANCE`. The
    cosines between examples are in `gram`.
    """
    result = torch.empty(len(cosines), dtype=cosines.dtype)
    rows = torch.arange(len(cosines))
    weights = torch.nn.functional.one_hot(cosines.argmax(dim=1), cosines.shape[1]).to(cosines.dtype)
    slopes = cosines - weights @ gram
    while len(rows):
        highest, to = slopes.max(dim=1)  # weight moves to the steepest example from the flattest that has any
        lowest, away = slopes.masked_fill(weights <= 0, math.inf).min(dim=1)
        curvature = (gram[to, to] + gram[away, away] - 2 * gram[to, away]).clamp(min=SMALLEST_CURVATURE)
        row = torch.arange(len(weights))
        moved = torch.minimum((highest - lowest) / curvature, weights[row, away])
        weights[row, to] += moved
        weights[row, away] -= moved
        slopes -= moved[:, None] * (gram[to] - gram[away])
        done = highest - lowest <= HULL_TOLERANCE
        if done.any():
            found = cosines[rows[done]]
            result[rows[done]] = (1 + ((found + slopes[done]) * weights[done]).sum(dim=1)) / 2
            rows, weights, slopes = rows[~done], weights[~done], slopes[~done]
    return result
