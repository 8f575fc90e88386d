"""What a client asks, as requests to the engine: how the experts are weighed, how tokens are chosen, how long."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.data.batching import TokenRow
from coterie.data.examples import Example
from coterie.engine.request import Request
from coterie.errors import CoterieError, unknown_name
from coterie.experts.names import BACKBONE
from coterie.mixture import Mixture
from coterie.routers.base import Router, Routing
from coterie.routers.derived import keep_top
from coterie.routers.fixed import FixedRouter, one_hot
from coterie.serve.catalogue import Cell
from coterie.serve.errors import ApiError
from coterie.serve.schemas import AdapterScale, AnswerRequest, CoterieField
from coterie.settings.groups import rerouting_interval
from coterie.settings.sampling import SamplingSettings

VARIANTS = 64  # of each model that are kept


@dataclass(frozen=True)
class Asked:
    """Requests to the engine.

    Attributes:
        mixture: what answers them.
        requests: one for every prompt.
        seed: of their answers.
    """

    mixture: Mixture
    requests: list[Request]
    seed: int

    def weights(self, prompt: int) -> dict[str, float] | None:
        """Return what the experts weigh for a prompt, together 1; None where its answer's tokens tell it."""
        routing = self.requests[prompt].routing
        if not isinstance(routing, Routing) or routing.gates:
            return None
        return {name: weight for name, weight in routing.normalized().row(0).items() if weight}


def ask(cell: Cell, rows: Sequence[TokenRow], body: AnswerRequest, question: Example | None, timeout: float) -> Asked:
    """Ask for the answers to prompts, or to a question, which may take so many seconds together.

    Prompts are routed here, so this runs where the base model may be run.

    Raises:
        CoterieError: for what does not fit the mixture.
    """
    mixture = mixed(cell, body.coterie, body.lora)
    if question is None and mixture.combiner.finishes_answers:
        raise CoterieError("combiner 'texts' lets answers to a question vote, so it goes on with no text; ask a chat")
    settings = SamplingSettings(**body.sampling())
    draws = mixture.combiner.draws(settings, body.n)
    limits = [room(mixture, row, body.limit) for row in rows]
    deadline = time.monotonic() + timeout
    requests = mixture.requests(rows, limits, draws)
    also = {"deadline": deadline, "prompt_logprobs": body.prompt_alternatives}
    return Asked(mixture, [replace(request, **also) for request in requests], settings.seed)


def mixed(cell: Cell, wanted: CoterieField, lora: Sequence[AdapterScale] | None = None) -> Mixture:
    """Return a model's mixture with the router, the weights and the combiner that one request wants.

    What is wanted again is the same object, since requests of one router are weighed together.

    Raises:
        CoterieError: for an unknown name, or what does not go together.
    """
    weights, combiner = wanted.weights, wanted.combiner
    if lora is not None:
        weights, combiner = scales(cell, lora), combiner or "layers"
    key = (wanted.router, combiner, wanted.top_k, wanted.every, json.dumps(weights))
    if key not in cell.variants:
        while len(cell.variants) >= VARIANTS:
            del cell.variants[next(iter(cell.variants))]
        router = chosen_router(cell, weights or wanted.router)
        cell.variants[key] = vary(cell.mixture, router, combiner, wanted.top_k, wanted.every)
    return cell.variants[key]


def chosen_router(cell: Cell, wanted: Mapping[str, float] | str | None) -> Router | None:
    """Return the router that is called so in the mixture as it was fitted, or the one that gives these weights.

    Raises:
        CoterieError: for a name that there is not.
    """
    grid = cell.desk.grid
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return one_hot(BACKBONE, grid.mixture.bank.names) if wanted == BACKBONE else grid.own.named_router(wanted)
    for name in wanted:
        grid.mixture.bank.index(name)
    return FixedRouter(wanted)


def vary(
    mixture: Mixture, router: Router | None, combiner: str | None, top_k: int | None, every: int | str | None
) -> Mixture:
    """Return a mixture with another router and combiner, as `coterie generate` does; None leaves what there is.

    Raises:
        CoterieError: for an unknown name, or what does not go together.
    """
    if every is None:
        mixture = mixture.replace(router=router, combiner=combiner)
    else:
        mixture = mixture.replace(router=router).rerouted(rerouting_interval(str(every)), combiner=combiner)
    return mixture if top_k is None else mixture.replace(router=keep_top(mixture.router, top_k))


def scales(cell: Cell, lora: Sequence[AdapterScale]) -> dict[str, float]:
    """Return the weights that llama.cpp's list of scales means: experts by number or name, others have none.

    Raises:
        ApiError: for an expert that there is not.
    """
    experts = cell.desk.experts
    named = {}
    for one in lora:
        name = experts[one.id] if isinstance(one.id, int) and 0 <= one.id < len(experts) else str(one.id)
        if name not in experts:
            raise ApiError(str(unknown_name("expert", name, experts)), param="lora")
        named[name] = one.scale
    return named if any(named.values()) else {BACKBONE: 1.0}


def room(mixture: Mixture, row: TokenRow, wanted: int | None) -> int:
    """Return how many tokens an answer may have: as many as are wanted and fit behind the prompt, and one at least.

    Raises:
        ApiError: for a prompt that is longer than the model's context, or when neither says where an answer ends.
    """
    context, length = mixture.backbone.context, len(row.ids)
    if context is None and wanted is None:
        raise ApiError("this model reads texts of any length, so say how long an answer may be", param="max_tokens")
    if context is not None and length > context:
        words = f"the prompt has {length} tokens, but the model's context has {context}; shorten it"
        raise ApiError(words, code="context_length_exceeded")
    fitting = [most for most in (wanted, context and context + 1 - length) if most is not None]
    return max(1, min(fitting))
