"""Routing by the data set that an example says it comes from (ELREA's per-dataset adapters)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.routers.base import PER_REQUEST, Routing


class SourceRouter:
    """Gives everything to the expert that was trained on the prompt's own data set: it must be told which that is."""

    kind = "source"
    axes = PER_REQUEST

    def __init__(self, experts: Mapping[str, str]) -> None:
        """Store the expert's name of every source.

        Raises:
            CoterieError: when there is none.
        """
        if not experts:
            raise CoterieError("routing by data set needs at least one source with an expert")
        self.experts = dict(experts)

    def route(self, prompts: Sequence[TokenRow]) -> Routing:
        """Weigh the experts for every prompt; axes (request, expert).

        Raises:
            CoterieError: for a prompt without a source, or with one that has no expert.
        """
        names = list(dict.fromkeys(self.experts.values()))
        weights = torch.zeros(len(prompts), len(names))
        for number, prompt in enumerate(prompts):
            if prompt.source not in self.experts:
                known = ", ".join(sorted(self.experts))
                raise CoterieError(
                    f"prompt {number + 1} has the source {prompt.source!r}, but there are experts for {known} only; "
                    "give rows with one of these as their source, or use another router"
                )
            weights[number, names.index(self.experts[prompt.source])] = 1.0
        return Routing(tuple(names), ("request", "expert"), weights)

    def save(self, folder: Path) -> dict[str, Any]:
        """Return the entry for mixture.json; there are no tensors."""
        return {"kind": self.kind, "experts": self.experts}
