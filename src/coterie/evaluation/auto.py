"""`coterie fit auto`: one data set to experts, and by cross-fitted losses to the router, the combiner, or no mixture.

Everything is chosen on losses of copies that were not trained on the rows that they are judged on, with weights of
routers that were not fitted to these rows either (`methods/elrea/cross_fit.py`). Routers are compared by the estimated
loss of their mixtures; the chosen one is then scored exactly, in the logits and in the layers.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie import ranks
from coterie.artifacts import as_path, read_json, run_folder, write_json, write_text
from coterie.combiners.table import make_combiner
from coterie.data.examples import Example, load_all
from coterie.evaluation.choice import Candidate, Choice, choose, difference
from coterie.evaluation.statistics import Interval, sign_flip_test
from coterie.experts.bank import load_bank
from coterie.experts.names import BASE
from coterie.features.growing_text import FeatureExtractor
from coterie.features.prefill import candidate_layers
from coterie.methods.common import Data, hash_examples, named_sources
from coterie.methods.elrea import fitted_routers
from coterie.methods.elrea.cross_fit import assign_folds
from coterie.methods.elrea.extras import EXTRAS
from coterie.methods.elrea.fit import Prepared, check_enough, fit_experts, prepare, work_of
from coterie.methods.elrea.run import ElreaRun, within_budget
from coterie.methods.extras import load_extra, prepare_extras, read_losses
from coterie.mixture import Mixture
from coterie.mixture.folder import MIXTURE_FILE, hash_mixture
from coterie.progress import part, whole
from coterie.records.auto import AUTO_FILE, PAGE_FILE, AutoRecord, CandidateRecord
from coterie.records.evaluation import LEVEL
from coterie.routers.base import Router, Routing
from coterie.routers.derived import keep_top
from coterie.routers.fixed import FixedRouter, one_hot, uniform
from coterie.routers.loss import CrossFitLosses
from coterie.routers.refusal import RefusalRouter
from coterie.settings.auto import AutoSettings
from coterie.settings.groups import ExtrasSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat

logger = logging.getLogger(__name__)

AUTO, METHODS = "auto", "methods"
FOLDS = "working/judging"
TOPS = (1, 2)
EXTRAS_USED = ("performance", "membership", "refusal", "loss", "prefill")


def auto(model: str, data: Data, *, output: str | Path, **settings: Any) -> Mixture:  # noqa: ANN401
    """Fit experts to one data set, choose by evidence what to do with them, and return the mixture.

    Args:
        model: base model: hub id, local folder, .gguf file, or an alias.
        data: training data: a JSONL file or `datasets` source, several of them, or examples.
        output: folder to write the mixture to; its `auto.md` tells what was chosen and why.
        **settings: fields of `AutoSettings` and its groups by their plain names, such as budget=1_000_000.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    named, examples = named_sources(data)
    flat = {"model": model, "data": named, "output": str(output), **settings}
    return fit_auto(from_flat(AutoSettings, flat), examples or None)


@takes_fields(AutoSettings)
@ranks.joined()
def fit_auto(settings: AutoSettings, examples: list[Example] | None = None) -> Mixture:
    """Do all of it, by all processes that were launched.

    An interrupted run goes on where it stopped and ends with the same files.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    output = as_path(settings.output)
    backbone, prompts, kept, inputs = ranks.each(lambda: _prepare(settings, examples))
    with run_folder(output, settings, inputs) as run, whole(settings.command, _work(settings, len(kept.rows))):
        mixture = fit_experts(run, settings, backbone, prompts, kept)
        unlike = hash_examples(load_all([settings.unlike], fitted_routers.UNLIKE_ROWS)) if settings.unlike else None
        judged_from = {"mixture": hash_mixture(run.path), "judge_folds": settings.judge_folds, "unlike": unlike}
        run.claim(METHODS, judged_from)
        how = ExtrasSettings(judge_folds=settings.judge_folds, unlike=settings.unlike)
        opened = ElreaRun(mixture, settings, how, run.path, inputs, kept)
        mixture = _choose(opened, settings)
    return replace(mixture, folder=output)


def _prepare(settings: AutoSettings, examples: list[Example] | None) -> Prepared:
    if settings.unlike:
        load_all([settings.unlike], 1)
    prepared = prepare(settings, examples)
    candidate_layers(prepared.backbone)
    kept = within_budget(prepared.kept, settings)
    check_enough(max(len(kept.rows) // settings.judge_folds, 0), settings)
    return prepared._replace(kept=kept)


def _work(settings: AutoSettings, rows: int) -> dict[str, float]:
    """Return what the parts weigh: each fold trains all once more without its own rows, which all experts score."""
    fitting, experts = work_of(settings, rows), settings.clustering.clusters + 1
    judging = (settings.judge_folds - 1) * (fitting["base"] + fitting["experts"]) + experts * rows
    return {**fitting, "judging": judging, "scores": (experts + 1) * rows}


class _Way(NamedTuple):
    """A candidate: its router, the weights that it gives rows which it was not fitted to, and what a request costs."""

    name: str
    router: Router
    weights: Float[Tensor, "row expert"]
    cost: float


def _choose(run: ElreaRun, settings: AutoSettings) -> Mixture:
    """Judge the experts, compare what can be done with them, and write the mixture of what was chosen."""
    judge = partial(fitted_routers.judged, keep=run.folder / FOLDS)
    specs = {**EXTRAS, "judged": replace(EXTRAS["judged"], make=judge)}
    with part("judging"):
        prepare_extras(run, EXTRAS_USED, specs, in_run=True)
    losses = read_losses(load_extra(run.mixture, "judged"))
    ways = {way.name: way for way in _ways(run, losses, settings.caution)}
    candidates = [Candidate(way.name, way.cost, losses.mixture_nll(way.weights)) for way in ways.values()]
    choice = choose(candidates, losses.tokens)
    with part("scores"):
        record = _recorded(choice, ways, run, losses)
    router = ways[record.chosen].router
    mixture = replace(run.mixture, router=router, combiner=make_combiner(record.combiner), method=AUTO)
    mixture.write_description(run.folder, read_json(run.folder / MIXTURE_FILE))
    write_json(run.folder / AUTO_FILE, record.plain())
    write_text(run.folder / PAGE_FILE, record.page())
    logger.info("%s", " ".join(record.sentences))
    return mixture


def _ways(run: ElreaRun, losses: CrossFitLosses, caution: float) -> Iterator[_Way]:
    """Yield all candidates, the base adapter first; those that look at prompts refuse unfamiliar ones."""
    names, other = losses.experts, fitted_routers.unlike_rows(run)
    for name, expert in {"base": BASE, "best-single": losses.best_single()}.items():
        if name == "base" or expert != BASE:
            router = one_hot(expert, names)
            yield _Way(name, router, _fixed(router, len(losses.nll)), 1.0)
    prompt = sum(row.prompt_length for row in run.kept.rows) / sum(len(row.ids) for row in run.kept.rows)
    backward = 3 * run.settings.training.epochs * prompt  # a backward pass is worth two forward ones
    by_states = fitted_routers.held_out(run, "prefill")
    reading = _trained(run, "prefill")
    even = uniform(names)
    sides = [(by_states.inside, _fixed(even, len(losses.nll)), losses)]
    sides += [(by_states.outside, _fixed(even, len(other.losses.nll)), other.losses)]
    yield _refusing("uniform", even, sides[0], sides[1], 1 + prompt, caution, reading.features)
    tried: dict[str, tuple[Router, Tensor, Tensor, Tensor]] = {}
    by_gradients = {
        "membership": fitted_routers.membership_of,
        "performance": partial(fitted_routers.performance_of, losses),
        "elrea": fitted_routers.elrea_of,
    }
    for name, build in by_gradients.items():
        router = run.router if name == "elrea" else _trained(run, name)
        tried[name] = (router, run.features, other.gradients, fitted_routers.unseen_weights(run, build, losses))
    for name in ("loss", "prefill"):
        held = fitted_routers.held_out(run, name)
        tried[name] = (_trained(run, name), held.inside, held.outside, held.weights)
    for name, (router, inside, outside, own) in tried.items():
        known = len(router.weigh(inside[:1]).experts)  # who is nowhere the best has no centroid by performance
        for top in (None, *(k for k in TOPS if k < known)):
            cut = router if top is None else keep_top(router, top)
            kept = own if top is None else Routing(names, own).top(top).normalized().weights
            outer = fitted_routers.weights_of(cut, outside, other.losses)
            label = name if top is None else f"{name}:top_k={top}"
            cost = 1 + (prompt if name == "prefill" else backward)
            yield _refusing(label, cut, (inside, kept, losses), (outside, outer, other.losses), cost, caution)


_Side = tuple[Float[Tensor, "_ dimension"], Float[Tensor, "_ expert"], CrossFitLosses]
"""Features, weights and losses of rows."""


def _refusing(
    name: str,
    router: Router,
    inside: _Side,
    outside: _Side,
    cost: float,
    caution: float,
    extractor: FeatureExtractor | None = None,
) -> _Way:
    """Let a candidate leave unfamiliar prompts to the base adapter."""
    refusal = fitted_routers.calibrated(router, inside, outside, extractor, caution)
    _, weights, losses = inside
    answered = refusal.calibration.inside.familiarity >= refusal.threshold
    alone = _fixed(one_hot(BASE, losses.experts), len(weights))
    return _Way(name, refusal, torch.where(answered[:, None], weights, alone), cost)


def _fixed(router: FixedRouter, count: int) -> Float[Tensor, "row expert"]:
    return torch.tensor([list(router.weights.values())]).expand(count, -1)


def _trained(run: ElreaRun, name: str) -> Router:
    """Return the router of an extra, without what makes it refuse prompts."""
    router = load_extra(run.mixture, name).router
    assert router is not None  # those that are asked for have one
    return router.router if isinstance(router, RefusalRouter) else router


# ------------------------------------------------------------------------------------------------ scored exactly


def _recorded(choice: Choice, ways: Mapping[str, _Way], run: ElreaRun, losses: CrossFitLosses) -> AutoRecord:
    """Score the chosen candidate exactly, by both combiners; what is not borne out is the base adapter."""
    facts: dict[str, Any] = {"chosen": choice.chosen, "combiner": "layers"}
    way = ways[choice.chosen]
    if choice.chosen != BASE:
        base = losses.nll[:, losses.experts.index(BASE)]
        exact = {name: _scored(run, way.weights, losses, name) for name in ("layers", "logits")}
        gap = _mean(exact["logits"], losses) - _mean(exact["layers"], losses)
        if gap < 0 and _p(exact["logits"], exact["layers"], losses) < LEVEL:
            facts["combiner"] = "logits"  # every expert's rows are run for it
        nll = exact[facts["combiner"]]
        found, p = difference(nll, base, losses.tokens), _p(nll, base, losses)
        facts |= {"expected": found.value, "interval": _known(found), "p": p}
        facts["combiners"] = {name: _mean(own, losses) for name, own in exact.items()}
        if found.value >= 0 or p >= LEVEL:
            facts |= {"chosen": BASE, "combiner": "layers", "outweighed": True}
        elif isinstance(way.router, RefusalRouter):
            seen = way.router.calibration._asdict().items()
            refused = {side: float((own.familiarity < way.router.threshold).float().mean()) for side, own in seen}
            facts["refused"] = refused
    settings = run.settings
    times = (settings.training.epochs + settings.experts.expert_epochs) * run.extras.judge_folds
    return AutoRecord(
        **facts,
        rows=len(losses.tokens),
        trained_tokens=times * sum(len(row.ids) for row in run.kept.rows),
        candidates=tuple(
            CandidateRecord(
                name=one.candidate.name,
                cost=one.candidate.cost,
                nll=one.nll,
                difference=one.gap.value,
                interval=_known(one.gap),
                p=one.p,
            )
            for one in choice.compared
        ),
    )


def _scored(run: ElreaRun, weights: Float[Tensor, "row expert"], losses: CrossFitLosses, combiner: str) -> Tensor:
    """Score all rows under these weights of the copies that were not trained on them."""
    count = run.extras.judge_folds
    folds, nll = assign_folds(run.labels, count, run.settings.seed), torch.zeros(len(weights))
    for fold in range(count):
        folder = run.folder / FOLDS / str(fold) / "experts"
        places = {name: folder / name for name in losses.experts}
        # a cluster without rows in the other folds has no copy of its own: that is the base adapter
        bank = load_bank({n: p if p.is_dir() else folder / BASE for n, p in places.items()}, run.mixture.backbone.model)
        mixture = replace(run.mixture, bank=bank, router=uniform(bank.names), combiner=make_combiner(combiner))
        own = torch.nonzero(folds == fold).flatten()
        rows = [run.kept.rows[i] for i in own.tolist()]
        label = f"fold {fold + 1}, {combiner}"
        nll[own] = mixture.score_rows(rows, Routing(losses.experts, weights[own]), label).nll[0]
    return nll


def _mean(nll: Tensor, losses: CrossFitLosses) -> float:
    return float((nll * losses.tokens).sum() / losses.tokens.sum())


def _p(nll: Tensor, control: Tensor, losses: CrossFitLosses) -> float:
    return sign_flip_test(nll.tolist(), control.tolist(), weights=losses.tokens.tolist())


def _known(found: Interval) -> tuple[float, float] | None:
    return (found.low, found.high) if math.isfinite(found.low) else None
