"""What `coterie fit auto` chooses among: routers, with the weights that they give rows which they did not see."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.experts.names import BASE
from coterie.methods.elrea import fitted_routers, refusing
from coterie.methods.elrea.fitted_routers import HeldOut, unseen_weights
from coterie.methods.elrea.refusing import UnlikeRows
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.elrea.score_tables import Described, ariadne_of, avengers_of, lorauter_of
from coterie.methods.extras import load_extra
from coterie.routers.base import Router, Routing
from coterie.routers.derived import keep_top
from coterie.routers.fixed import FixedRouter, one_hot, uniform
from coterie.routers.loss import CrossFitLosses
from coterie.routers.refusal import RefusalRouter

EXTRAS_USED = ("routing", "performance", "membership", "refusal", "loss", "prefill")
TOPS = (1, 2)
SINGLE = "best-single"


class Way(NamedTuple):
    """A candidate: its router, the weights that it gives rows which it was not fitted to, and what a request costs."""

    name: str
    router: Router
    weights: Float[Tensor, "row expert"]
    cost: float


class _Read(NamedTuple):
    """What a router reads of unlike rows, and what reading a prompt costs, the prefill that tells its kind included."""

    outside: Float[Tensor, "other dimension"]
    cost: float


class _Tried(NamedTuple):
    """A router, what it reads, and its weights: those of training rows are of routers that did not see the row."""

    router: Router
    read: _Read
    inside: Float[Tensor, "row expert"]
    outside: Routing


def ways(run: ElreaRun, losses: CrossFitLosses, caution: float) -> Iterator[Way]:
    """Yield all candidates, the base adapter first; all others refuse, the single best expert too."""
    names, unlike, seen = losses.experts, refusing.unlike_rows(run), refusing.seen_by(run)
    alone = one_hot(BASE, names)
    yield Way(BASE, alone, _same(alone, len(losses.nll)), 1.0)
    for name, (router, read, inside, outside) in _tried(run, losses, unlike).items():
        tops = () if name in ("uniform", "ariadne", SINGLE) else (k for k in TOPS if k < len(outside.experts))
        for top in (None, *tops):
            cut, own, outer = router, inside, outside.normalized()
            if top is not None:
                cut = keep_top(router, top)
                own = Routing(names, own).top(top).normalized().weights
                outer = outer.top(top).normalized()
            sides = (own, losses), (outer.aligned(names).weights, unlike.losses)
            refusal = refusing.calibrated(cut, seen, *sides, caution)
            answered = refusal.calibration.inside.answered(refusal.limits)
            weights = torch.where(answered[:, None], own, _same(alone, len(own)))
            yield Way(name if top is None else f"{name}:top_k={top}", refusal, weights, 1 + read.cost)


def _tried(run: ElreaRun, losses: CrossFitLosses, unlike: UnlikeRows) -> dict[str, _Tried]:
    """Return all routers, those that read no gradient first."""
    states = fitted_routers.held_out(run, "prefill")
    prompt = sum(row.prompt_length for row in run.kept.rows) / sum(len(row.ids) for row in run.kept.rows)
    backward = 3 * run.settings.training.epochs * prompt  # which counts twice, after the forward pass
    read, gradients = _Read(states.outside, prompt), _Read(unlike.gradients, prompt + backward)
    centre = states.inside.mean(dim=0)
    by_states = Described(_trained(run, "prefill").features, states.inside - centre, centre)
    even = uniform(losses.experts)
    outside = Routing(losses.experts, _same(even, len(states.outside)))
    found = {"uniform": _Tried(even, read, _same(even, len(losses.nll)), outside)}
    if (best := losses.best_single()) != BASE:
        unseen, alone = torch.zeros_like(losses.nll), one_hot(best, losses.experts)
        for own, others in fitted_routers.fifths(run):
            unseen[own] = _same(one_hot(losses.take(others).best_single(), losses.experts), len(own))
        found[SINGLE] = _Tried(alone, read, unseen, Routing(losses.experts, _same(alone, len(states.outside))))

    def fitted(router: Router, own: _Read, build: Callable[[ElreaRun, Tensor], Router], seen: Tensor) -> _Tried:
        return _Tried(router, own, unseen_weights(run, build, losses, seen), router.weigh(own.outside))

    def regressed(name: str, own: _Read, held: HeldOut) -> _Tried:
        router = _trained(run, name)
        return _Tried(router, own, held.weights, router.weigh(own.outside))

    every = torch.arange(len(run.labels))
    tables = {"avengers": avengers_of, "lorauter": lorauter_of}
    builds = {name: partial(build, by_states, losses) for name, build in tables.items()}
    for name, build in {**builds, "ariadne": partial(ariadne_of, by_states)}.items():
        found[name] = fitted(build(run, every), read, build, states.inside)
    found["prefill"] = regressed("prefill", read, states)
    found["membership"] = fitted(_trained(run, "membership"), gradients, fitted_routers.membership_of, run.features)
    by_best = partial(fitted_routers.performance_of, losses)
    found["performance"] = fitted(_trained(run, "performance"), gradients, by_best, run.features)
    found["elrea"] = fitted(run.router, gradients, fitted_routers.elrea_of, run.features)
    found["loss"] = regressed("loss", gradients, fitted_routers.held_out(run, "loss"))
    return found


def _same(router: FixedRouter, count: int) -> Float[Tensor, "row expert"]:
    return torch.tensor([list(router.weights.values())]).expand(count, -1)


def _trained(run: ElreaRun, name: str) -> Router:
    """Return the router of an extra, without what makes it refuse prompts."""
    router = load_extra(run.mixture, name).router
    assert router is not None  # those that are asked for have one
    return router.router if isinstance(router, RefusalRouter) else router
