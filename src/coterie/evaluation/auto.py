"""`coterie fit auto`: one data set to experts, and by cross-fitted losses to the router, the combiner, or no mixture.

Everything is chosen on losses of copies that were not trained on the rows that they are judged on, with weights of
routers that were not fitted to these rows either (`methods/elrea/cross_fit.py`). Routers are compared by the estimated
loss of their mixtures; the chosen one is then scored exactly, in the logits and in the layers.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie import ranks
from coterie.artifacts import as_path, read_json, run_folder, write_json, write_text
from coterie.combiners.table import make_combiner
from coterie.data.examples import Example, load_all
from coterie.errors import CoterieError
from coterie.evaluation.candidates import EXTRAS_USED, Way, ways
from coterie.evaluation.choice import KEPT, Candidate, Choice, chance, choose, difference
from coterie.experts.bank import load_bank
from coterie.experts.names import BASE
from coterie.features.prefill import candidate_layers
from coterie.methods.common import Data, assign_folds, hash_examples, named_sources
from coterie.methods.elrea import fitted_routers
from coterie.methods.elrea.extras import EXTRAS
from coterie.methods.elrea.fit import Prepared, fit_experts, prepare, work_of
from coterie.methods.elrea.refusing import UNLIKE_ROWS
from coterie.methods.elrea.run import ElreaRun, within_budget
from coterie.methods.extras import prepare_extras
from coterie.mixture import Mixture
from coterie.mixture.folder import MIXTURE_FILE, hash_mixture
from coterie.progress import part, whole
from coterie.records.auto import AutoRecord
from coterie.records.choice import AUTO_FILE, PAGE_FILE
from coterie.records.evaluation import LEVEL
from coterie.routers.base import Routing
from coterie.routers.fixed import uniform
from coterie.routers.loss import CrossFitLosses
from coterie.routers.refusal import RefusalRouter
from coterie.settings.auto import AutoSettings
from coterie.settings.groups import ExtrasSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat

logger = logging.getLogger(__name__)

AUTO, METHODS = "auto", "methods"
FOLDS = "working/judging"


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
        unlike = hash_examples(load_all([settings.unlike], UNLIKE_ROWS)) if settings.unlike else None
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
    if len(kept.rows) < settings.least_rows:
        raise CoterieError(
            f"{len(kept.rows)} examples are too few to judge {settings.clustering.clusters} clusters in "
            f"{settings.judge_folds} folds; give {settings.least_rows} or more, or lower --clusters or --judge-folds"
        )
    return prepared._replace(kept=kept)


def _work(settings: AutoSettings, rows: int) -> dict[str, float]:
    """Return what the parts weigh: each fold trains all once more without its own rows, which all experts score."""
    fitting, experts = work_of(settings, rows), settings.clustering.clusters + 1
    judging = (settings.judge_folds - 1) * (fitting["base"] + fitting["experts"]) + experts * rows
    return {**fitting, "judging": judging, "scores": (experts + 1) * rows}


def _choose(run: ElreaRun, settings: AutoSettings) -> Mixture:
    """Judge the experts, compare what can be done with them, and write the mixture of what was chosen."""
    judge = partial(fitted_routers.judged, keep=run.folder / FOLDS)
    specs = {**EXTRAS, "judged": replace(EXTRAS["judged"], make=judge)}
    with part("judging"):
        prepare_extras(run, EXTRAS_USED, specs, in_run=True)
    losses = run.losses
    tried = {way.name: way for way in ways(run, losses, settings.caution)}
    candidates = [Candidate(way.name, way.cost, losses.mixture_nll(way.weights)) for way in tried.values()]
    choice = choose(candidates, losses.tokens)
    with part("scores"):
        record = _recorded(choice, tried, run, losses, settings)
    router = tried[record.chosen].router
    mixture = replace(run.mixture, router=router, combiner=make_combiner(record.combiner), method=AUTO)
    mixture.write_description(run.folder, read_json(run.folder / MIXTURE_FILE))
    write_json(run.folder / AUTO_FILE, record.plain())
    write_text(run.folder / PAGE_FILE, record.page())
    logger.info("%s", " ".join(record.sentences))
    return mixture


# ------------------------------------------------------------------------------------------------ scored exactly


def _recorded(
    choice: Choice, tried: Mapping[str, Way], run: ElreaRun, losses: CrossFitLosses, settings: AutoSettings
) -> AutoRecord:
    """Score the chosen candidate exactly, by both combiners; what is not borne out is the base adapter."""
    facts: dict[str, Any] = {"chosen": choice.chosen, "combiner": "layers"}
    way = tried[choice.chosen]
    if choice.chosen != BASE:
        base = losses.nll[:, losses.experts.index(BASE)]
        exact = {name: _scored(run, way.weights, losses, name) for name in ("layers", "logits")}
        gains = {name: losses.mean(base) - losses.mean(own) for name, own in exact.items()}
        if gains["layers"] < KEPT * gains["logits"] and chance(exact["logits"], exact["layers"], losses.tokens) < LEVEL:
            facts["combiner"] = "logits"  # every expert's rows are run for it
        nll = exact[facts["combiner"]]
        found, p = difference(nll, base, losses.tokens), chance(nll, base, losses.tokens)
        facts |= {"expected": found.value, "interval": found.ends, "p": p}
        facts["combiners"] = {name: losses.mean(own) for name, own in exact.items()}
        if found.value >= 0 or p >= LEVEL:
            facts |= {"chosen": BASE, "combiner": "layers", "outweighed": True}
        elif isinstance(way.router, RefusalRouter):
            facts["refused"] = way.router.refused
    return AutoRecord(
        **facts,
        rows=len(losses.tokens),
        trained_tokens=settings.passes * sum(len(row.ids) for row in run.kept.rows),
        candidates=choice.records(),
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
