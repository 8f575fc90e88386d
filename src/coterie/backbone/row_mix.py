"""Which experts the rows of a batch run: as combiners ask for it, and as the layers of a model read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from coterie.backbone.gates import Gates
from coterie.data.devices import on_device

EXACT = "exact"


class Gated(NamedTuple):
    """Gates for some of a bank's experts: `experts[i]` is the place in the bank of `gates.experts[i]`."""

    experts: tuple[int, ...]
    gates: Gates


@dataclass(frozen=True)
class RequestRows:
    """The model rows of one request, as if it were alone.

    Attributes:
        weights: what each row runs, over the bank's experts: one-hot for an expert alone, else a mixture in the layers.
        votes: the weights with which the rows' logits sum to the request's, in float32.
        gates: each layer's gate weighs each token; `weights` is then only what the row would run without.
        merge: how weights become one adapter that the row runs; the exact way is the mixture in the layers.
    """

    weights: Float[Tensor, "row expert"]
    votes: Float[Tensor, " row"]
    gates: Gated | None = None
    merge: str = EXACT


class Alone(NamedTuple):
    """Experts that rows run alone, in the order of the stack: `first` to `end`, without it.

    Attributes:
        first: place of the first expert in the stack.
        end: place behind the last one.
        places: the rows of each expert in turn, and where each row stands there (see `lora.add_padded`); None where
            rows stand so anyway.
    """

    first: int
    end: int
    places: tuple[Int[Tensor, " place"], Int[Tensor, " row"]] | None = None


class Chosen(NamedTuple):
    """The experts that rows run, fewer than all, with their weights; None where each row runs one alone.

    `unused` says where these are 0, if they are anywhere.
    """

    experts: Int[Tensor, "row chosen"]
    shares: Float[Tensor, "row chosen"] | None
    unused: Bool[Tensor, "row chosen"] | None


class GatedRows(NamedTuple):
    """Gates, the rows that they weigh, and the places in the bank of their experts, on the model's device."""

    gates: Gates
    rows: Bool[Tensor, " row"]
    experts: Int[Tensor, " expert"]


@dataclass(frozen=True)
class RowMix:
    """What every row of a batch runs, on the model's device, in several forms; the layers take the cheapest.

    Attributes:
        weights: over the experts of the stack, one set for a row or one for each of its positions.
        unused: where they are 0; None where every row runs all experts.
        alone: the same where every row runs one expert alone.
        chosen: the same where no row runs all experts.
        gated: gates, and the rows that they weigh.
        held: keeps merged adapters in the stack for as long as this mix is there.
    """

    weights: Float[Tensor, "row #position expert"]  # noqa: F821
    unused: Bool[Tensor, "row #position expert"] | None = None  # noqa: F821
    alone: Alone | None = None
    chosen: Chosen | None = None
    gated: tuple[GatedRows, ...] = ()
    held: tuple[object, ...] = ()

    @cached_property
    def most_weighed(self) -> int:
        """How many experts gates choose at most at a token, or weights do where none choose."""
        counts = [own.gates.top_k or len(own.experts) for own in self.gated]
        chosen = self.weights.shape[-1] if self.chosen is None else self.chosen.experts.shape[1]
        return max(*counts, chosen)

    @property
    def tensors(self) -> list[Tensor]:
        """All of its numbers."""
        tensors = [self.weights, self.unused, *(self.chosen or ()), *(own.rows for own in self.gated)]
        return [tensor for tensor in tensors if tensor is not None]


def chosen_at_most(mix: RowMix, experts: int) -> int:
    """Return how many chosen experts `padded` gives each row: the next power of two; 0 for a whole stack."""
    most = 0 if mix.chosen is None else 1 << (mix.chosen.experts.shape[1] - 1).bit_length()
    return most if most < experts else 0


def padded(mix: RowMix, rows: int, experts: int, chosen: int) -> RowMix:
    """Return a mix with further rows, which run nothing, whose shapes hang on these numbers alone."""

    def longer(tensor: Tensor) -> Tensor:
        return pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, rows - len(tensor)))

    weights, own = longer(pad(mix.weights, (0, experts - mix.weights.shape[-1]))), None
    if chosen and mix.chosen is not None:
        places, shares, _ = mix.chosen
        shares = torch.ones_like(places, dtype=weights.dtype) if shares is None else shares
        places, shares = (longer(pad(half, (0, chosen - half.shape[1]))) for half in (places, shares))
        own = Chosen(places, shares, shares == 0)
    gated = tuple(gates._replace(rows=longer(gates.rows)) for gates in mix.gated)
    return RowMix(weights, weights == 0, None, own, gated, mix.held)


PADDING = 1.5  # how much longer rows may get by standing in groups of one size


def alone(weights: Float[Tensor, "row expert"], device: torch.device) -> Alone | None:
    """Group rows by their experts, if each runs one alone, with a weight of 1, and all about equally often."""
    if not bool(((weights == 1).sum(dim=1) == 1).all()) or int(weights.count_nonzero()) != len(weights):
        return None
    owners = weights.argmax(dim=1)
    first, end = int(owners.min()), int(owners.max()) + 1
    counts = (owners - first).bincount()
    most = int(counts.max())
    if len(counts) * most > PADDING * len(owners):
        return None
    order = owners.argsort(stable=True)
    if len(counts) * most == len(owners) and bool((owners[1:] >= owners[:-1]).all()):
        return Alone(first, end)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[owners[order] - first]  # within the expert's rows
    place += (owners[order] - first) * most
    padded = torch.zeros(len(counts) * most, dtype=torch.long)
    padded[place] = order
    back = torch.empty_like(order).index_put((order,), place)
    return Alone(first, end, (on_device(padded, device), on_device(back, device)))


def chosen(weights: Float[Tensor, "row expert"], device: torch.device) -> Chosen | None:
    """Name the experts of each row, if no row runs all of them."""
    most = max(1, int((weights != 0).sum(dim=1).max()))
    if most == weights.shape[1]:
        return None
    experts = weights.abs().argsort(dim=1, descending=True, stable=True)[:, :most]
    shares = weights.gather(1, experts)
    if bool((shares == 1).all()):
        return Chosen(on_device(experts, device), None, None)
    return Chosen(on_device(experts, device), on_device(shares, device), unused(shares, device))


def unused(weights: Float[Tensor, "*row expert"], device: torch.device) -> Bool[Tensor, "*row expert"] | None:
    """Say where weights are 0; None where they are not."""
    found = weights == 0
    return on_device(found, device) if bool(found.any()) else None


def gated_rows(requests: Sequence[RequestRows], device: torch.device) -> tuple[GatedRows, ...]:
    """Return every kind of gates among requests, with the rows that it weighs."""
    owners = [own.gates for own in requests for _ in own.votes]
    numbers = [None if own is None else (id(own.gates), own.experts) for own in owners]
    kinds = dict(zip(numbers, owners, strict=True))
    return tuple(
        GatedRows(
            kind.gates, on_device([other == number for other in numbers], device), on_device(kind.experts, device)
        )
        for number, kind in kinds.items()
        if kind is not None
    )
