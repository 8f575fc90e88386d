"""Routers that look at no prompt: the same weights for everybody."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coterie.data.batching import TokenRow
from coterie.errors import CoterieError, unknown_name
from coterie.routers.base import PER_REQUEST, Routing


class FixedRouter:
    """Gives every prompt the same weights."""

    kind = "fixed"
    axes = PER_REQUEST

    def __init__(self, weights: dict[str, float]) -> None:
        """Store one weight per expert name.

        Raises:
            CoterieError: when there is none, or one is negative or not finite.
        """
        if not weights:
            raise CoterieError("a fixed router needs at least one expert")
        self.weights = dict(weights)
        self.route([])  # the rules of `Routing` hold for these weights

    def route(self, prompts: Sequence[TokenRow]) -> Routing:
        """Return the stored weights for every prompt; axes (request, expert)."""
        row = torch.tensor(list(self.weights.values()), dtype=torch.float32)
        Routing(tuple(self.weights), ("expert",), row)
        return Routing(tuple(self.weights), ("request", "expert"), row.expand(len(prompts), -1).clone())

    def save(self, folder: Path) -> dict[str, Any]:
        """Return the entry for mixture.json; there are no tensors."""
        return {"kind": self.kind, "weights": self.weights}


def uniform(experts: Sequence[str]) -> FixedRouter:
    """Give every expert the same weight, together 1.

    In the paper's Uniform Weights each is 1. Logits are normalised, so that is the same there; updates that are added
    up in the layers, or merged, would count once for every expert.
    """
    return FixedRouter(dict.fromkeys(experts, 1 / max(1, len(experts))))


def one_hot(expert: str, experts: Sequence[str]) -> FixedRouter:
    """Give everything to one expert.

    Raises:
        CoterieError: when no expert has this name.
    """
    if expert not in experts:
        raise unknown_name("expert", expert, experts)
    return FixedRouter({name: float(name == expert) for name in experts})
