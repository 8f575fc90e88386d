"""Routing and scoring of every method on the same rows, with the work shared where methods share it."""

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import JsonCache, hash_text, sha256_of
from coterie.cluster import Call, Elsewhere, named_values
from coterie.data.batching import TokenRow
from coterie.engine.scoring import score_votes
from coterie.methods.extras import RECORD
from coterie.methods.family import MethodGrid
from coterie.mixture import Mixture
from coterie.progress import GRADIENTS, part, whole
from coterie.routers.base import Router, Routing
from coterie.routers.fixed import OracleRouter

ROUTING, IN_LOGITS = "routing of all rows", "all that meet in the logits"
"""Parts of the work beside the methods that are scored alone."""


class Routed(NamedTuple):
    """Weights for all rows, and the seconds they took."""

    routing: Routing
    seconds: float


@dataclass
class SharedRouting:
    """Routes one set of prompts by many routers; what several of them read off the prompts is read once."""

    prompts: Sequence[TokenRow]
    _read: dict[Hashable, tuple[Any, float]] = field(default_factory=dict)

    def __call__(self, router: Router) -> Routed:
        """Route all prompts; the seconds are what this router would take alone."""
        for what, read in router.readings.items():
            if what not in self._read:
                started = time.perf_counter()
                self._read[what] = (read(self.prompts), time.perf_counter() - started)
        found, seconds = zip(*(self._read[what] for what in router.readings), strict=True)
        return Routed(router.weigh(found[0] if len(found) == 1 else found), sum(seconds))

    def all(self, routers: Iterable[Router]) -> list[Routed]:
        """Route all prompts by all routers, those that read the same side by side."""
        routers = list(routers)
        known = {tuple(one.readings): 0 for one in routers}
        readings = {what: f"reading {number}" for number, what in enumerate(known)}
        routed = []
        with whole("routing", dict.fromkeys(readings.values(), 1.0)):
            for router in routers:
                with part(readings[tuple(router.readings)]):
                    routed.append(self(router))
        return routed


@dataclass(frozen=True)
class Scored:
    """What all methods' likelihoods on the references are.

    Attributes:
        cells: every method's mixture, on the common bank.
        routed: every method's weights; the oracle's come from the scores.
        nll: every method's mean NLL per token of every row; methods that only answer have none.
        expert_nll: (row, expert): the fitted experts alone.
        tokens: (row,): tokens that each mean is over.
        seconds: of scoring, for every method that was scored alone.
        shared_seconds: of the one pass that scored all others, and every fitted expert alone.
    """

    cells: Mapping[str, Mixture]
    routed: Mapping[str, Routed]
    nll: Mapping[str, Float[Tensor, " row"]]
    expert_nll: Float[Tensor, "row expert"]
    tokens: Float[Tensor, " row"]
    seconds: Mapping[str, float]
    shared_seconds: float


def no_cache(name: str, make: Callable[[], Any]) -> Any:
    """Compute the value: a cache that stores nothing."""
    return make()


def cache_name(what: str, grid: MethodGrid, methods: Sequence[str]) -> str:
    """Name what is measured of methods, so that it is another one where the extras behind them were trained anew."""
    extras = [sha256_of(grid.extras[need].folder / RECORD) for need in grid.family.needs(methods)]
    if len(methods) == 1 and not extras:
        return f"{what}-{methods[0]}"
    return f"{what}-{hash_text(*methods, *extras)[:16]}"


def score_methods(
    grid: MethodGrid,
    rows: Sequence[TokenRow],
    names: Sequence[str],
    cached: JsonCache = no_cache,
    elsewhere: Elsewhere | None = None,
) -> Scored:
    """Route and score all methods on rows with answers.

    Args:
        grid: has what they need.
        rows: with answers.
        names: of the methods.
        cached: keeps what takes long for another try.
        elsewhere: says how workers open the grid, where they are to score.
    """
    cells = {name: grid.cell(name) for name in names}
    oracles = {name: cell.router for name, cell in cells.items() if isinstance(cell.router, OracleRouter)}
    alone = tuple(dict.fromkeys([*grid.fitted, *(expert for one in oracles.values() for expert in one.experts)]))
    shared = SharedRouting([row.prompt() for row in rows])
    routable = {name: cell for name, cell in cells.items() if name not in oracles}
    scorable = [name for name, cell in routable.items() if not cell.combiner.finishes_answers]
    in_logits = [name for name in scorable if cells[name].combiner.kind == "logits"]
    apart = [name for name in scorable if name not in in_logits]
    seconds = {}
    work = {ROUTING: GRADIENTS, IN_LOGITS: float(len(alone)), **dict.fromkeys(apart, 2.0)}
    with whole("scores", work):
        with part(ROUTING):
            routed = dict(zip(routable, shared.all(cell.router for cell in routable.values()), strict=True))
        own = {name: routed[name].routing for name in in_logits}
        in_one = cache_name("likelihoods", grid, [*in_logits, *oracles])
        calls = {in_one: Call(IN_LOGITS, _score_logits, (rows, own, alone))}
        by_itself = {name: cache_name("likelihood", grid, [name]) for name in apart}
        calls |= {key: Call(n, _score_alone, (n, rows, routed[n].routing)) for n, key in by_itself.items()}
        values = named_values(calls, grid, cached, elsewhere)
    together = values[in_one]
    nll = {name: torch.tensor(own) for name, own in together["nll"].items()}
    expert_nll, tokens = torch.tensor(together["expert_nll"]), torch.tensor(together["tokens"])
    for name, key in by_itself.items():
        nll[name], seconds[name] = torch.tensor(values[key]["nll"]), values[key]["seconds"]
    for name, router in oracles.items():
        own_nll = expert_nll[:, [alone.index(expert) for expert in router.experts]]
        routed[name] = Routed(router.weigh(own_nll), 0.0)
        nll[name] = own_nll.min(dim=1).values
    return Scored(cells, routed, nll, expert_nll[:, : len(grid.fitted)], tokens, seconds, together["seconds"])


def _score_alone(grid: MethodGrid, name: str, rows: Sequence[TokenRow], routing: Routing) -> dict[str, Any]:
    cell = grid.cell(name)
    started = time.perf_counter()
    found = cell.score_rows(rows, routing, name).nll[0]
    return {"nll": found.tolist(), "seconds": time.perf_counter() - started}


def _score_logits(
    grid: MethodGrid, rows: Sequence[TokenRow], routed: Mapping[str, Routing], alone: Sequence[str]
) -> dict[str, Any]:
    """Score all methods that meet in the logits, and some experts each alone, in one pass."""
    bank = grid.mixture.bank
    single = torch.eye(len(bank))[[bank.index(name) for name in alone]]  # [alone, E]
    own = [routed[name].aligned(bank.names).weights for name in routed]
    votes = torch.stack([*own, *(row.expand(len(rows), -1) for row in single)])
    started = time.perf_counter()
    found = score_votes(
        grid.own.backbone,
        grid.mixture.layers,
        bank.names,
        rows,
        votes,
        f"{len(routed)} methods and {len(alone)} experts",
    )
    return {
        "nll": dict(zip(routed, found.nll.tolist(), strict=False)),
        "expert_nll": found.nll[len(routed) :].T.tolist(),
        "tokens": found.tokens.tolist(),
        "seconds": time.perf_counter() - started,
    }
