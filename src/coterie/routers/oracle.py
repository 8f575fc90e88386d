"""The router that nobody can have: it knows the references."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.routers.base import PER_REQUEST, Routing


class OracleRouter:
    """Gives everything to the expert with the smallest loss on a row's reference answer; for evaluations only.

    Its gain over the base adapter is what routing to single experts could reach at most, part of it by luck: the
    smallest of several noisy losses is small also where experts are equally good.
    """

    kind = "oracle"
    axes = PER_REQUEST

    def __init__(self, experts: Sequence[str]) -> None:
        """Store the experts to choose from."""
        self.experts = tuple(experts)

    def route(self, prompts: Sequence[TokenRow]) -> Never:
        """Refuse: a prompt alone does not tell.

        Raises:
            CoterieError: always.
        """
        raise CoterieError("the oracle looks at reference answers, so it exists in `coterie eval` only")

    def choose(self, nll: Float[Tensor, "row expert"]) -> Routing:
        """Choose by the experts' losses on the references, columns in the order of `experts`."""
        weights = torch.nn.functional.one_hot(nll.argmin(dim=1), len(self.experts)).float()
        return Routing(self.experts, ("request", "expert"), weights)

    def save(self, folder: Path) -> dict[str, Any]:
        """Refuse.

        Raises:
            CoterieError: always.
        """
        raise CoterieError("the oracle exists in evaluations only and is not saved")
