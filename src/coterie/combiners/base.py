"""What a combiner asks of the engine: which model rows to run, and how their final states become one prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from coterie.backbone.layers import Choice


@dataclass(frozen=True)
class RowPlan:
    """Model rows for a batch of prompts.

    Attributes:
        prompts: number of the prompt that each row runs.
        choice: which experts each row runs.
        votes: (prompt, row): weights with which the rows' logits sum to a prompt's next-token logits, in float32.
    """

    prompts: tuple[int, ...]
    choice: Choice
    votes: Float[Tensor, "prompt row"]


@runtime_checkable
class Combiner(Protocol):
    """Plans model rows for prompts that have weights over experts."""

    kind: str
    axes: frozenset[str]

    def plan(self, weights: Float[Tensor, "prompt expert"]) -> RowPlan:
        """Plan the rows for prompts whose weights have columns in the bank's order."""
        ...


def kept_rows(plan: RowPlan, prompts: Sequence[int]) -> list[int]:
    """Return the numbers of the rows that run one of `prompts`, in their order."""
    kept = set(prompts)
    return [row for row, prompt in enumerate(plan.prompts) if prompt in kept]
