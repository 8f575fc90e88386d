"""What a combiner asks of the engine: which model rows to run, and how their final states become one prediction."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from coterie.backbone.layers import Choice
from coterie.errors import CoterieError
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

        A prompt's own rows have one order, whichever prompts stand beside it.
        """

    def draws(self, settings: SamplingSettings, n: int = 1) -> list[SamplingSettings]:
        """Return the settings of each of the `n` answers that are drawn for every prompt, with seeds of their own.

        The first one's seed is the one that was given, so that it is the answer that is drawn alone.

        Raises:
            CoterieError: when several are wanted, and all would be equal.
        """
        if n > 1 and settings.temperature == 0:
            raise CoterieError(f"at temperature 0 all {n} answers to a prompt are equal; give a temperature above 0")
        seeds = [settings.seed, *(random.Random(f"{settings.seed} {number}").getrandbits(32) for number in range(1, n))]
        return [settings.model_copy(update={"seed": seed}) for seed in seeds]


def matching_rows(plan: RowPlan, prompts: Sequence[int], other: RowPlan) -> list[int]:
    """Return for every row of another plan, made for these prompts of a plan, the row that it is in the plan."""
    own: dict[int, list[int]] = {}
    for row, prompt in enumerate(plan.prompts):
        own.setdefault(prompt, []).append(row)
    left = [iter(own[prompt]) for prompt in prompts]
    return [next(left[prompt]) for prompt in other.prompts]


def kept_rows(plan: RowPlan, prompts: Sequence[int]) -> list[int]:
    """Return the numbers of the rows that run one of `prompts`, in their order."""
    kept = set(prompts)
    return [row for row, prompt in enumerate(plan.prompts) if prompt in kept]
