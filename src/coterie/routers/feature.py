"""Routers that look at a prompt through a feature: a gradient, an embedding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import write_tensors
from coterie.data.batching import TokenRow
from coterie.features.growing_text import GrowingTexts, Rewritten
from coterie.routers.base import PER_REQUEST, Routing


@dataclass(frozen=True, eq=False)
class Description:
    """A way to describe prompts.

    Attributes:
        name: gradient or embedding.
        describe: turns prompts into features (row, dimension), not necessarily of unit length.
        record: what it was made from, for mixture.json.
        growing: follows prompts whose answers are written; None: they are described again as a whole.
    """

    name: str
    describe: Callable[[Sequence[TokenRow]], Tensor]
    record: Mapping[str, Any]
    growing: Callable[[Sequence[TokenRow]], GrowingTexts] | None = None

    def __call__(self, prompts: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Describe prompts, in float32 on the CPU."""
        return self.describe(prompts).float().cpu()

    def follow(self, prompts: Sequence[TokenRow]) -> GrowingTexts:
        """Describe prompts, and go on while their answers are written."""
        return self.growing(prompts) if self.growing else Rewritten(self.describe, prompts)


class FeatureRouter(ABC):
    """Weighs experts by a prompt's feature; prompts that are described once can be routed by several of these."""

    kind: str
    axes = PER_REQUEST

    def __init__(self, description: Description, centre: Float[Tensor, " dimension"] | None = None) -> None:
        """Store how prompts are described, and the training mean that is subtracted from every feature (None: none)."""
        self.description = description
        self.centre = centre

    def route(self, prompts: Sequence[TokenRow]) -> Routing:
        """Weigh the experts for every prompt; axes (request, expert)."""
        return self.route_features(self.description(prompts))

    def route_features(self, features: Float[Tensor, "row dimension"]) -> Routing:
        """Weigh the experts for prompts whose features are known; axes (request, expert)."""
        return self._weigh(features if self.centre is None else features - self.centre)

    def follow(self, prompts: Sequence[TokenRow]) -> "FeatureFollower":
        """Start to follow prompts whose answers are going to be written."""
        return FeatureFollower(self, self.description.follow(prompts))

    @abstractmethod
    def _weigh(self, features: Float[Tensor, "row dimension"]) -> Routing:
        """Weigh the experts for features that are centred already."""

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        write_tensors(path, tensors if self.centre is None else {**tensors, "centre": self.centre})

    def _entry(self, **fields: Any) -> dict[str, Any]:
        return {"kind": self.kind, "description": self.description.name, **fields, **self.description.record}


class FeatureFollower:
    """Follows texts by their features."""

    def __init__(self, router: FeatureRouter, texts: GrowingTexts) -> None:
        """Start with texts; `router` weighs experts by their features."""
        self._router = router
        self._texts = texts

    def routing(self) -> Routing:
        """Weigh the experts for every text as far as it is known."""
        return self._router.route_features(self._texts.features())

    def write(self, tokens: Sequence[Sequence[int]]) -> None:
        """Take in the next tokens of every text, before the model reads them."""
        self._texts.write(tokens)

    def observe(self, states: Float[Tensor, "request position width"]) -> None:
        """Take in the model's last hidden states at the tokens that it has just read."""
        self._texts.observe(states)

    def keep(self, requests: Sequence[int]) -> None:
        """Drop all requests but these."""
        self._texts.keep(requests)
