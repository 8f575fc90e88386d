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
from coterie.routers.base import PER_REQUEST, Routing


@dataclass(frozen=True, eq=False)
class Description:
    """A way to describe prompts.

    Attributes:
        name: gradient or embedding.
        describe: turns prompts into features (row, dimension), not necessarily of unit length.
        record: what it was made from, for mixture.json.
    """

    name: str
    describe: Callable[[Sequence[TokenRow]], Tensor]
    record: Mapping[str, Any]

    def __call__(self, prompts: Sequence[TokenRow]) -> Float[Tensor, "row dimension"]:
        """Describe prompts, in float32 on the CPU."""
        return self.describe(prompts).float().cpu()


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

    @abstractmethod
    def _weigh(self, features: Float[Tensor, "row dimension"]) -> Routing:
        """Weigh the experts for features that are centred already."""

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        write_tensors(path, tensors if self.centre is None else {**tensors, "centre": self.centre})

    def _entry(self, **fields: Any) -> dict[str, Any]:
        return {"kind": self.kind, "description": self.description.name, **fields, **self.description.record}
