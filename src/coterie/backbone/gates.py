"""Gates: what weighs the experts inside every layer, at every token of the layer's input."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.data.devices import on_device
from coterie.errors import CoterieError, check_known

SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, gate: x @ gate.T,
    "arrow": lambda x, gate: (x @ gate.T).abs(),
    "spectr": lambda x, gate: (x @ gate.flatten(0, 1).T).unflatten(-1, gate.shape[:2]).norm(dim=-1),
}
"""How inputs (row, position, in) and a layer's gate give scores (row, position, expert)."""


class Weighing(NamedTuple):
    """What one layer's gate makes of every token."""

    logits: Float[Tensor, "row position expert"]
    """Scores over the temperature, in float32."""
    chosen: Bool[Tensor, "row position expert"]
    """The experts of the `top_k` largest scores."""
    weights: Float[Tensor, "row position expert"]
    """The softmax of the logits of the chosen experts, 0 for the others."""


@dataclass(frozen=True, eq=False)
class Gates:
    """A gate for every adapted layer; its weights are the softmax of the experts' scores on the layer's input x.

    An expert that does not change a layer takes part there all the same: it stands for leaving the layer as it is, so
    what it weighs is taken from the others. The gates of Arrow and SpectR score it 0, the least there is.

    Attributes:
        experts: names, in the order of the rows of every gate.
        layers: by module path: (expert, in) for linear and arrow, (expert, rank, in) for spectr.
        score: linear (gate_e . x), arrow (|gate_e . x|) or spectr (the norm of gate_e x).
        top_k: the softmax is over the k largest scores of each token, and only these experts are computed; None: all.
        temperature: what scores are divided by.
        floors: (expert) by module path: what a score gains for every unit of |x|, where an expert is to take over when
            the others score low.

    Raises:
        CoterieError: for an unknown score, more experts asked for than there are, or a temperature that is not above 0.
    """

    experts: tuple[str, ...]
    layers: Mapping[str, Tensor]
    score: str = "linear"
    top_k: int | None = None
    temperature: float = 1.0
    floors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the rules above."""
        check_known("score of gates", self.score, SCORES)
        if self.top_k is not None and not 1 <= self.top_k <= len(self.experts):
            raise CoterieError(
                f"top_k of gates must be between 1 and {len(self.experts)} (the number of experts), got {self.top_k}"
            )
        if not 0 < self.temperature < math.inf:
            raise CoterieError(f"the temperature of gates must be a number above 0, got {self.temperature}")

    def scores(self, path: str, x: Float[Tensor, "row position in"]) -> Float[Tensor, "row position expert"]:
        """Return what a layer's softmax compares, before the temperature, in float32."""
        x = x.float()
        scores = SCORES[self.score](x, self.layers[path].to(x))
        if path in self.floors:
            scores = scores + x.norm(dim=-1, keepdim=True) * self.floors[path].to(x)
        return scores

    def weigh(self, path: str, x: Float[Tensor, "row position in"]) -> Weighing:
        """Choose and weigh a layer's experts at every token; of equal scores, the earlier expert's is chosen."""
        logits = self.scores(path, x) / self.temperature
        order = logits.argsort(dim=-1, descending=True, stable=True)[..., : self.top_k]
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, True)
        return Weighing(logits, chosen, logits.masked_fill(~chosen, -math.inf).softmax(dim=-1))

    def to(self, device: torch.device) -> "Gates":
        """Return the same gates on a device."""
        layers, floors = (
            {path: on_device(t, device) for path, t in side.items()} for side in (self.layers, self.floors)
        )
        return replace(self, layers=layers, floors=floors)


@dataclass(frozen=True)
class MeanWeights:
    """What gates weigh while a model reads, on average over the tokens and layers of every row.

    Attributes:
        mask: tells tokens from padding.
        layers: the averages over tokens, one a layer.
    """

    mask: Int[Tensor, "row position"]
    layers: list[Float[Tensor, "row expert"]] = field(default_factory=list)

    def add(self, weights: Float[Tensor, "row position expert"]) -> None:
        """Take in one layer's weights."""
        real = self.mask.to(weights.device)[..., None]
        self.layers.append(((weights * real).sum(dim=1) / real.sum(dim=1)).to(self.mask.device))

    def mean(self) -> Float[Tensor, "row expert"]:
        """Return the averages, on the CPU."""
        return torch.stack(self.layers).mean(dim=0).cpu()
