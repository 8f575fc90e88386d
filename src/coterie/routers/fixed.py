"""Routers that read no prompt's text: fixed weights, the prompt's own data set, or its reference answer (oracle)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Never

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.data.batching import TokenRow
from coterie.errors import CoterieError, unknown_name
from coterie.routers.base import Router, RouterParts, Routing
from coterie.settings.keywords import names_in


class FixedRouter(Router):
    """Gives every prompt the same weights."""

    kind = "fixed"
    kinds = (kind,)
    saved = ("weights",)

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Store one weight per expert name.

        Raises:
            CoterieError: when there is none, or one is negative or not finite.
        """
        if not weights:
            raise CoterieError("a fixed router needs at least one expert")
        self.weights = dict(weights)
        self._row = Routing(tuple(weights), torch.tensor([list(weights.values())], dtype=torch.float32))

    def weigh(self, read: Sequence[TokenRow]) -> Routing:
        """Return the stored weights for every prompt."""
        return self._row.take([0] * len(read))

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "FixedRouter":
        """Build it from its entry, whose weights must be numbers."""
        return cls({name: float(weight) for name, weight in record["weights"].items()})


def uniform(experts: str | Sequence[str]) -> FixedRouter:
    """Give every expert the same weight, together 1.

    In the paper's Uniform Weights each is 1. Logits are normalised, so that is the same there; updates that are added
    up in the layers, or merged, would count once for every expert.
    """
    names = names_in(experts)
    return FixedRouter(dict.fromkeys(names, 1 / max(1, len(names))))


def one_hot(expert: str, experts: Sequence[str]) -> FixedRouter:
    """Give everything to one expert.

    Raises:
        CoterieError: when no expert has this name.
    """
    if expert not in experts:
        raise unknown_name("expert", expert, experts)
    return FixedRouter({name: float(name == expert) for name in experts})


class SourceRouter(Router):
    """Gives everything to the expert that was trained on the prompt's own data set: it must be told which that is."""

    kind = "source"
    kinds = (kind,)
    saved = ("experts",)

    def __init__(self, experts: Mapping[str, str]) -> None:
        """Store the expert's name of every source.

        Raises:
            CoterieError: when there is none.
        """
        if not experts:
            raise CoterieError("routing by data set needs at least one source with an expert")
        self.experts = dict(experts)

    def weigh(self, read: Sequence[TokenRow]) -> Routing:
        """Weigh the experts by the prompts' sources.

        Raises:
            CoterieError: for a prompt without a source, or with one that has no expert.
        """
        names = list(dict.fromkeys(self.experts.values()))
        weights = torch.zeros(len(read), len(names))
        for number, prompt in enumerate(read):
            if prompt.source not in self.experts:
                known = ", ".join(sorted(self.experts))
                raise CoterieError(
                    f"prompt {number + 1} has the source {prompt.source!r}, but there are experts for {known} only; "
                    "give rows with one of these as their source, or use another router"
                )
            weights[number, names.index(self.experts[prompt.source])] = 1.0
        return Routing(tuple(names), weights)


@dataclass(frozen=True, eq=False)
class OracleRouter(Router):
    """Picks each row's lowest-loss expert from the references (evaluation only).

    Its gain over the base adapter is what routing to single experts could reach at most, part of it by luck: the
    smallest of several noisy losses is small also where experts are equally good.
    """

    kind = "oracle"

    experts: Sequence[str]

    def read(self, prompts: Sequence[TokenRow]) -> Never:
        """Refuse: a prompt alone does not tell.

        Raises:
            CoterieError: always.
        """
        raise CoterieError("the oracle looks at reference answers, so it exists in `coterie eval` only")

    def weigh(self, read: Float[Tensor, "row expert"]) -> Routing:
        """Choose by the experts' losses on the references, columns in the order of `experts`."""
        best = torch.nn.functional.one_hot(read.argmin(dim=1), len(self.experts))
        return Routing(tuple(self.experts), best.float())
