"""What a client asks in OpenAI's form, as requests to the engine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from coterie.data.batching import TokenRow
from coterie.engine.request import Request
from coterie.errors import CoterieError
from coterie.mixture import Mixture
from coterie.routers.base import Routing
from coterie.serve.catalogue import Cell
from coterie.settings.reading import from_flat
from coterie.settings.sampling import SamplingSettings


@dataclass(frozen=True)
class Asked:
    """Requests to the engine, with what their answers are told by.

    Attributes:
        cell: what answers.
        requests: one for every prompt.
    """

    cell: Cell
    requests: list[Request]

    def weights(self, prompt: int) -> dict[str, float] | None:
        """Return a prompt's shares by expert; None where they change while it is answered."""
        routing = self.requests[prompt].routing
        if not isinstance(routing, Routing) or routing.gates:
            return None
        return {name: weight for name, weight in routing.normalized().row(0).items() if weight}


def ask(cell: Cell, rows: Sequence[TokenRow], body: Any, timeout: float) -> Asked:  # noqa: ANN401 - either request
    """Ask for the answers to prompts, which may take so many seconds.

    The prompts are routed here, so this runs where the base model may be run.

    Raises:
        CoterieError: for a setting that does not fit.
    """
    mixture: Mixture = cell.mixture
    draws = mixture.combiner.draws(from_flat(SamplingSettings, body.sampling()), body.n)
    limits = [body.limit or room(mixture, row) for row in rows]
    deadline = time.monotonic() + timeout
    requests = [replace(request, deadline=deadline) for request in mixture.requests(rows, limits, draws)]
    return Asked(cell, requests)


def room(mixture: Mixture, row: TokenRow) -> int:
    """Return how many tokens can be written after a prompt before the base model's positions end.

    Raises:
        CoterieError: when its positions are unbounded.
    """
    if mixture.backbone.positions is None:
        raise CoterieError("this base model reads texts of any length, so an answer has no longest one; say max_tokens")
    return mixture.backbone.positions + 1 - len(row.ids)
