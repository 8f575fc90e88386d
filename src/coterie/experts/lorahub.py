"""Weights of adapters without gradients, and one adapter of the weighted ones (LoraHub, arXiv 2307.13269).

The published code searches by Nevergrad's NGOpt; here it is CMA-ES, as `cma` has it, with the same start, bounds,
penalty and number of evaluations.
"""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coterie.errors import CoterieError
from coterie.lora import Adapter, LoraPair, merge
from coterie.progress import steps

logger = logging.getLogger(__name__)

FACTORS = "factors"
_FIRST_STEP = 1 / 3  # of the bound: the standard deviation of the first weights that are tried


@dataclass(frozen=True)
class SearchPlan:
    """How weights are searched; the defaults are the published ones.

    Attributes:
        steps: evaluations of the loss, at most.
        bound: largest absolute weight.
        penalty: what the mean absolute weight is multiplied with before it is added to the loss.
        seed: of the search.
    """

    steps: int = 40
    bound: float = 1.5
    penalty: float = 0.05
    seed: int = 0


def search_weights(loss: Callable[[Sequence[float]], float], count: int, plan: SearchPlan) -> list[float]:
    """Search the weights with the least loss and penalty; they begin at zeros, so none are worse than no adapter.

    The same plan and losses give the same weights; the global state of random numbers is left as it is.

    Args:
        loss: of some weights, such as the mean over a few examples; one that is no finite number counts as the worst.
        count: number of weights.
        plan: how they are searched.

    Returns:
        The best weights that were tried.

    Raises:
        CoterieError: when there is nothing to search, or no weights had a finite loss.
    """
    if count < 1 or plan.steps < 1:
        raise CoterieError(f"{count} adapters and {plan.steps} steps leave nothing to search; give one or more of both")
    with steps("search of weights", plan.steps, "step") as done:

        def value(weights: list[float]) -> float:
            done()
            found = loss(weights) + plan.penalty * sum(map(abs, weights)) / count
            return found if math.isfinite(found) else math.inf

        start = [0.0] * count
        tried = [(value(start), start)]
        search = _strategy(count, plan)
        while (left := plan.steps - len(tried)) and not search.stop():
            points = search.ask()
            generation = [point[:count].tolist() for point in points[:left]]
            values = [value(weights) for weights in generation]
            tried += zip(values, generation, strict=True)
            if len(values) == len(points):
                search.tell(points, values)
    least, best = min(tried)
    if least == math.inf:
        raise CoterieError("no weights had a finite loss; check the adapters and the examples they are weighted by")
    return best


def _strategy(count: int, plan: SearchPlan) -> Any:
    """Start CMA-ES with a random state of its own; it needs two dimensions, of which a single weight uses the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells on import that it cannot plot
        import cma
    return cma.CMAEvolutionStrategy(
        [0.0] * max(count, 2),
        _FIRST_STEP * plan.bound,
        {
            "bounds": [-plan.bound, plan.bound],
            "randn": np.random.RandomState(plan.seed).randn,  # `seed` would set numpy's global state
            "verbose": -10,  # above that, options are read from a file in the working directory
            "verb_log": 0,
        },
    )


def compose(adapters: Sequence[Adapter], weights: Sequence[float], how: str = FACTORS) -> Adapter:
    """Make one adapter of many; weights may be negative.

    Args:
        adapters: on one base model; layers that one of them leaves as they are have an update of zero in it.
        weights: one for every adapter.
        how: a way to merge (`coterie.lora.merge`). `factors`, LoraHub's (sum w B)(sum w A), needs one rank; layers
            whose ranks differ are stacked exactly instead, which is logged.

    Raises:
        CoterieError: for another way to merge, or one that does not go with different ranks.
    """
    stacked = []
    composed: dict[str, LoraPair] = {}
    for path in sorted({path for adapter in adapters for path in adapter}):
        own = [(adapter[path], weight) for adapter, weight in zip(adapters, weights, strict=True) if path in adapter]
        exact = how == FACTORS and len({len(pair.down) for pair, _ in own}) > 1
        stacked += [path] * exact
        shares = torch.tensor([weight for _, weight in own])
        composed[path] = merge([pair for pair, _ in own], shares, "exact" if exact else how)
    if stacked:
        logger.warning("%d of %d layers have different ranks and are stacked exactly", len(stacked), len(composed))
    return composed
