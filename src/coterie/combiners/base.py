"""What a combiner asks of the engine: which model rows to run, and how their final states become one prediction."""

import random
from abc import ABC, abstractmethod

from coterie.backbone.row_mix import RequestRows
from coterie.errors import CoterieError
from coterie.routers.base import Grain, Routing
from coterie.settings.groups import SamplingSettings


class Combiner(ABC):
    """Plans the model rows of requests that were routed.

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
    def plan(self, routing: Routing) -> list[RequestRows]:
        """Plan each request's rows, as if it were alone; the routing has the bank's experts, in the bank's order."""

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
