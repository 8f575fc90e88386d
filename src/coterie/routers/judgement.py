"""How well every expert does on rows that it was not trained on: what routers are fitted to."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Judgement:
    """The loss of every expert, and of every even pair of experts, on the reference answers of rows.

    Attributes:
        experts: names, in the order of the expert axes.
        nll: (row, expert): mean negative log-likelihood per token, in nats.
        pairs: (row, expert, expert): the same for the even mixture of two experts' logits; one with itself is `nll`.
        tokens: (row,): tokens that each mean is over.
    """

    experts: tuple[str, ...]
    nll: Float[Tensor, "row expert"]
    pairs: Float[Tensor, "row expert expert"]
    tokens: Float[Tensor, " row"]

    def mixture_nll(self, weights: Float[Tensor, "row expert"]) -> Float[Tensor, " row"]:
        """Estimate the loss of any mixture of the experts' logits, to second order in how far they differ.

        Mixing logits gains over the mean loss by Jensen's gap of the log-partition, which is quadratic in small
        differences: sum_{e<f} w_e w_f g_ef, with g_ef four times the gap of the even pair. Exact for a single expert
        and for an even pair; weights must sum to 1.
        """
        gaps = 2 * (self.nll[:, :, None] + self.nll[:, None, :]) - 4 * self.pairs  # [row, E, E]
        gain = torch.einsum("ne,nef,nf->n", weights, gaps, weights) / 2  # each pair stands there twice
        return (weights * self.nll).sum(dim=1) - gain

    def best_of_rows(self) -> list[str]:
        """Return the expert with the smallest loss on each row."""
        return [self.experts[place] for place in self.nll.argmin(dim=1).tolist()]

    def best_single(self) -> str:
        """Return the expert with the smallest loss per token over all rows."""
        totals = (self.nll * self.tokens[:, None]).sum(dim=0)
        return self.experts[int(totals.argmin())]

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file keeps, rows and columns in the order of the experts."""
        return {"nll": self.nll, "pairs": self.pairs, "tokens": self.tokens}

    @classmethod
    def from_tensors(cls, experts: tuple[str, ...], tensors: Mapping[str, Tensor]) -> "Judgement":
        """Build from what `tensors` gave."""
        return cls(experts, tensors["nll"], tensors["pairs"], tensors["tokens"])
