"""What a combiner asks of the engine: which model rows to run, and how their final states become one prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from coterie.backbone.layers import Choice
from coterie.routers.base import Routing


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
    """Plans model rows for prompts that were routed.

    Attributes:
        kind: its name, as it stands in mixture.json.
        axes: the axes of a routing that it reads; a router with others does not fit.
    """

    kind: str
    axes: frozenset[str]

    def plan(self, routing: Routing) -> RowPlan:
        """Plan the rows for prompts whose routing has the bank's experts, in the bank's order.

        Rows keep their order when prompts leave: the plan of some prompts is the plan of all without the others' rows.
        """
        ...


def kept_rows(plan: RowPlan, prompts: Sequence[int]) -> list[int]:
    """Return the numbers of the rows that run one of `prompts`, in their order."""
    kept = set(prompts)
    return [row for row, prompt in enumerate(plan.prompts) if prompt in kept]
