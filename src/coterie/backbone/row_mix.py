"""Which experts the rows of a batch run: as combiners ask for it, and as the layers of a model read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.backbone.gates import Gates

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


class Groups(NamedTuple):
    """Rows of one expert each, expert by expert: the rows in `order` are ordered, `counts[i]` of them for `experts[i]`.

    Attributes:
        experts: their places in the stack.
        counts: rows of each.
        order: the rows, expert by expert; None where they stand so.
        back: the places of the rows in `order`.
    """

    experts: Int[Tensor, " expert"]
    counts: tuple[int, ...]
    order: Int[Tensor, " row"] | None
    back: Int[Tensor, " row"] | None


@dataclass(frozen=True)
class RowMix:
    """What every row of a batch runs, on the model's device.

    Attributes:
        weights: over the experts of the stack, one set for a row or one for each of its positions.
        groups: the same where every row runs one expert alone.
        gated: gates, and the rows that they weigh.
        held: keeps merged adapters in the stack for as long as this mix is there.
    """

    weights: Float[Tensor, "row #position expert"]  # noqa: F821
    groups: Groups | None = None
    gated: tuple[tuple[Gated, Bool[Tensor, " row"]], ...] = ()
    held: tuple[object, ...] = ()


def grouped(weights: Float[Tensor, "row expert"], device: torch.device) -> Groups | None:
    """Group rows by their experts, if each runs one alone, with a weight of 1."""
    if not bool(((weights == 1).sum(dim=1) == 1).all()) or int(weights.count_nonzero()) != len(weights):
        return None
    owners = weights.argmax(dim=1)
    experts, counts = owners.unique(return_counts=True)
    order = owners.argsort(stable=True)
    stands = bool((order[1:] > order[:-1]).all())
    places = None if stands else (order.to(device), order.argsort().to(device))
    return Groups(experts.to(device), tuple(counts.tolist()), *(places or (None, None)))


def gated_rows(requests: Sequence[RequestRows], device: torch.device) -> tuple[tuple[Gated, Bool[Tensor, " row"]], ...]:
    """Return every kind of gates among requests, with the rows that it weighs."""
    owners = [own.gates for own in requests for _ in own.votes]
    numbers = [None if own is None else (id(own.gates), own.experts) for own in owners]
    kinds = dict(zip(numbers, owners, strict=True))
    return tuple(
        (kind, torch.tensor([other == number for other in numbers], device=device))
        for number, kind in kinds.items()
        if kind is not None
    )
