"""The answers that an engine writes, and what is done for several of them at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from coterie.backbone.row_mix import RequestRows
from coterie.data.devices import on_device
from coterie.engine.reading import Text
from coterie.engine.request import Begun, Request, Rerouting
from coterie.engine.sampling_stages import SampledText
from coterie.engine.speculation import Drafting
from coterie.engine.text import TextStream
from coterie.errors import CoterieError
from coterie.routers.base import Routing


class Waiting(NamedTuple):
    """A request that has not begun, and the rows that it will have."""

    handle: int
    request: Request
    plan: RequestRows


@dataclass(eq=False)
class Answer:
    """One answer that is being written.

    Attributes:
        handle: of its request.
        request: what was asked.
        text: what the model reads.
        begun: when it joined, and what was known of its prompt.
        sampled: how its tokens are chosen.
        stream: its text as far as it is certain.
        drafting: what is proposed for it, and how good that was.
        draw: which of the request's answers it is.
        shares: what the experts weigh, where weights change while it is written.
        followed: what is known of the text to whoever weighs the experts again.
        known: tokens whose states are known there.
        is_due: the experts are to be weighed again before anything else is read.
    """

    handle: int
    request: Request
    text: Text
    begun: Begun
    sampled: SampledText
    stream: TextStream
    drafting: Drafting
    draw: int = 0
    shares: tuple[float, ...] | None = None
    followed: Any = None
    known: int = 0
    is_due: bool = False

    @property
    def written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.text.ids) - len(self.request.prompt.ids)


def planned(request: Request) -> RequestRows:
    """Return the rows of a request; where its weights are not known yet, a row that runs no expert."""
    if not isinstance(request.routing, Rerouting):
        return request.combiner.plan(request.routing)[0]
    if request.combiner.finest == "prompt":
        raise CoterieError(f"combiner {request.combiner.kind!r} does not follow weights that change; use layers")
    return RequestRows(torch.zeros(1, len(request.routing.experts)), torch.ones(1))


def by_rerouting(answers: Sequence[Answer]) -> list[tuple[Rerouting, list[Answer]]]:
    """Group answers whose weights change by what weighs them."""
    groups: dict[int, tuple[Rerouting, list[Answer]]] = {}
    for answer in answers:
        if isinstance(rerouting := answer.request.routing, Rerouting):
            groups.setdefault(id(rerouting), (rerouting, []))[1].append(answer)
    return list(groups.values())


def begin(rerouting: Rerouting, answers: Sequence[Answer]) -> list[Any]:
    """Begin to follow the texts of answers."""
    return rerouting.texts.begin([answer.request.prompt for answer in answers])


def weigh(rerouting: Rerouting, answers: Sequence[Answer]) -> list[Routing]:
    """Weigh the experts for the texts of answers, as far as they are known."""
    return rerouting.weights([answer.followed for answer in answers])


def padded_drafts(answers: Sequence[Answer], device: torch.device) -> Int[Tensor, "answer draft"] | None:
    """Return what is proposed for answers, filled up; None where nothing is."""
    if not (longest := max(len(answer.text.drafts) for answer in answers)):
        return None
    rows = [answer.text.drafts + [-1] * (longest - len(answer.text.drafts)) for answer in answers]
    return on_device(rows, device)
