"""`Routing`, the one value that every router returns, and the protocol of routers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.gates import Gates
from coterie.data.batching import TokenRow
from coterie.errors import CoterieError

AXES = ("request", "token", "layer", "expert")
PER_REQUEST = frozenset({"request", "expert"})


@dataclass(frozen=True, eq=False)
class Routing:
    """Weights over experts, with named axes.

    Attributes:
        experts: names, in the order of the last axis; every name stands once.
        axes: names of the weights' axes, a subsequence of request, token, layer, expert; the last one is `expert`.
        weights: finite and >= 0; they need not sum to 1 (ELREA's do not).
        similarities: what a router compared, by the same experts, where it compares anything.
        gates: where weights depend on the inputs of layers: what computes them there. `weights` is then what they gave
            on average over the tokens and layers of each prompt.

    Raises:
        CoterieError: when axes, shape or values break these rules.
    """

    experts: tuple[str, ...]
    axes: tuple[str, ...]
    weights: Tensor
    similarities: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Gates | None = None

    def __post_init__(self) -> None:
        """Check the rules above."""
        if self.axes[-1:] != ("expert",) or list(self.axes) != [axis for axis in AXES if axis in self.axes]:
            raise CoterieError(
                f"routing axes must be some of {', '.join(AXES)} in this order, ending with expert; got {self.axes}"
            )
        if self.weights.dim() != len(self.axes) or self.weights.shape[-1] != len(self.experts):
            raise CoterieError(
                f"routing weights of shape {tuple(self.weights.shape)} do not fit the axes {self.axes} "
                f"and {len(self.experts)} experts"
            )
        if len(set(self.experts)) != len(self.experts):
            raise CoterieError(f"every expert is routed once, but the routing names {', '.join(self.experts)}")
        if not bool(torch.isfinite(self.weights).all()) or bool((self.weights < 0).any()):
            raise CoterieError("routing weights must be finite and not negative; check the router's features")

    def normalized(self) -> "Routing":
        """Scale weights to sum 1 over experts; rows of zeros become uniform."""
        total = self.weights.sum(dim=-1, keepdim=True)
        uniform = torch.full_like(self.weights, 1 / len(self.experts))
        return self._with(torch.where(total > 0, self.weights / total, uniform))

    def top(self, k: int) -> "Routing":
        """Keep the k largest weights of every row, zero the rest; ties keep the earlier expert.

        Raises:
            CoterieError: when there are not k experts.
        """
        if not 1 <= k <= len(self.experts):
            raise CoterieError(
                f"--top-k-experts must be between 1 and {len(self.experts)} (the number of experts), got {k}"
            )
        if self.gates:
            raise CoterieError("--top-k-experts does not act on gates inside layers; leave it out for this router")
        order = self.weights.argsort(dim=-1, descending=True, stable=True)
        return self._with(self.weights.scatter(-1, order[..., k:], 0.0))

    def aligned(self, names: Sequence[str]) -> "Routing":
        """Return the same routing with the experts of a bank, in the bank's order; those that were not routed get 0.

        Raises:
            CoterieError: when a routed expert is not in the bank.
        """
        weights = self.for_experts(names)
        return Routing(tuple(names), self.axes, weights, self.similarities, self.gates)

    def for_experts(self, names: Sequence[str]) -> Float[Tensor, "*rows expert"]:
        """Return the weights with columns in the order of `names`; experts that were not routed get 0.

        Raises:
            CoterieError: when a routed expert is not among them.
        """
        missing = set(self.experts) - set(names)
        if missing:
            raise CoterieError(f"the router knows experts that the bank does not hold: {', '.join(sorted(missing))}")
        result = self.weights.new_zeros(*self.weights.shape[:-1], len(names))
        result[..., [list(names).index(name) for name in self.experts]] = self.weights
        return result

    def take(self, requests: Sequence[int]) -> "Routing":
        """Keep these requests, in this order (the first axis is the requests')."""
        similarities = {name: values[list(requests)] for name, values in self.similarities.items()}
        return Routing(self.experts, self.axes, self.weights[list(requests)], similarities, self.gates)

    def row(self, request: int) -> dict[str, float]:
        """Return one request's weights by expert name."""
        return dict(zip(self.experts, self.weights[request].tolist(), strict=True))

    def _with(self, weights: Tensor) -> "Routing":
        return Routing(self.experts, self.axes, weights, self.similarities, self.gates)


@runtime_checkable
class Router(Protocol):
    """Anything that turns prompts into weights.

    Attributes:
        kind: its name, as it stands in mixture.json.
        axes: what its weights may depend on; a combiner that cannot read all of it does not fit.
    """

    kind: str
    axes: frozenset[str]

    def route(self, prompts: Sequence[TokenRow]) -> Routing:
        """Weigh the experts for every prompt."""
        ...

    def save(self, folder: Path) -> dict[str, Any]:
        """Write tensors into `folder` and return the entry for mixture.json."""
        ...
