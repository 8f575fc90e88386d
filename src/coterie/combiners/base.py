"""What a combiner asks of the engine: which model rows to run, and how their final states become one prediction."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from coterie.backbone.layers import Choice
from coterie.routers.base import Grain, Routing
from coterie.settings.groups import SamplingSettings


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


class Combiner(ABC):
    """Plans model rows for prompts that were routed.

    Attributes:
        kind: its name, as it stands in mixture.json.
        finest: the finest grain of a router's weights that it can follow.
        finishes_answers: experts meet in finished answers, so it can neither stream, nor continue or score a text.
        approximates: the way in which it merges experts, where that is not the exact mixture; None where it is.
    """

    kind: str
    finest: Grain = "prompt"
    finishes_answers: bool = False
    approximates: str | None = None

    @abstractmethod
    def plan(self, routing: Routing) -> RowPlan:
        """Plan the rows for prompts whose routing has the bank's experts, in the bank's order.

        Rows keep their order when prompts leave: the plan of some prompts is the plan of all without the others' rows.
        """

    def draws(self, settings: SamplingSettings) -> list[SamplingSettings]:
        """Return the settings of every answer that is drawn for a prompt: a single one, unless answers vote."""
        return [settings]


def kept_rows(plan: RowPlan, prompts: Sequence[int]) -> list[int]:
    """Return the numbers of the rows that run one of `prompts`, in their order."""
    kept = set(prompts)
    return [row for row, prompt in enumerate(plan.prompts) if prompt in kept]
