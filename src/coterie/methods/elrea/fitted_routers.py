"""Routers for ELREA's experts that are fitted to what these are good at, and what they are fitted to.

All are fitted to cross-fitted losses: of copies of the experts that were not trained on the rows they are judged on.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie import ranks
from coterie.artifacts import RunFolder, read_floats, write_tensors
from coterie.experts.names import BASE
from coterie.features.growing_text import FeatureExtractor
from coterie.features.prefill import POOLINGS, candidate_layers, prefill_states
from coterie.methods.common import assign_folds
from coterie.methods.elrea.cross_fit import cross_fit
from coterie.methods.elrea.refusing import calibrated, seen_by, unlike_rows
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.extras import TrainedExtra, load_extra, write_losses
from coterie.routers.base import Router
from coterie.routers.centroid import CentroidRouter, centroids_by_best, centroids_of
from coterie.routers.distilled import DistilledRouter, Learnt, distil, misplaced
from coterie.routers.feature import prefill_extractor
from coterie.routers.loss import FOLDS, CrossFitLosses, LossRouter, fit_loss_router
from coterie.routers.membership import MembershipRouter, leave_one_out_scale
from coterie.routers.refusal import RefusalRouter

logger = logging.getLogger(__name__)

HELD_OUT = "held-out.safetensors"


def judged(run: ElreaRun, into: RunFolder, keep: Path | None = None) -> TrainedExtra:
    """Measure the experts' losses on the training rows, with copies that were not trained on them (cross-fitting).

    The copies are gone then, unless they are to be moved to a folder that keeps them.
    """
    losses = cross_fit(run, into)
    write_losses(losses, into)

    def put_away() -> None:
        if keep is None:
            shutil.rmtree(into.path / "folds")
        else:
            shutil.rmtree(keep, ignore_errors=True)
            (into.path / "folds").rename(keep)

    ranks.by_first(put_away)
    return TrainedExtra({}, None, {"judged": list(losses.experts), "best_single": losses.best_single()})


def _tell_refusals(router: RefusalRouter) -> None:
    shares = [100 * share for share in router.refused.values()]
    logger.info("%s stays out of %.0f%% of rows like its own and %.0f%% of others", router.router.kind, *shares)


def routing(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Keep ELREA's own router, where evidence chooses another one for the mixture."""
    return TrainedExtra({}, run.router)


def refusing(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Calibrate a refusal around ELREA's own routing."""
    router, losses, other = run.router, run.losses, unlike_rows(run)
    inside = (unseen_weights(run, elrea_of, losses), losses)
    outside = (weights_of(router, other.gradients, other.losses), other.losses)
    refusal = calibrated(router, seen_by(run), inside, outside)
    _tell_refusals(refusal)
    return TrainedExtra({}, refusal)


def weights_of(router: Router, read: Any, losses: CrossFitLosses) -> Float[Tensor, "row expert"]:  # noqa: ANN401 - what a router reads
    """Return a router's weights, scaled to sum 1, in the order of the losses' experts."""
    return router.weigh(read).normalized().aligned(losses.experts).weights


# ----------------------------------------------------------------------------------------------------- the routers


def elrea_of(run: ElreaRun, seen: Tensor) -> Router:
    """Return ELREA's routing as these training rows alone make it, by their numbers."""
    features, centre, labels, names = _clustered(run, seen)
    centroids = centroids_of(features, labels, len(names))
    return CentroidRouter.by_cluster(run.router.features, centroids, names, base=BASE, centre=centre)


def membership_of(run: ElreaRun, seen: Tensor) -> Router:
    """Return the router that judges cosines by what is usual for each expert among these training rows."""
    features, centre, labels, names = _clustered(run, seen)
    scale = leave_one_out_scale(features, labels, len(names))
    centroids = centroids_of(features, labels, len(names))
    return MembershipRouter(run.router.features, centroids, scale, names, base=BASE, centre=centre)


def performance_of(losses: CrossFitLosses, run: ElreaRun, seen: Tensor) -> Router:
    """Return the router whose centroids are placed by who is best on these training rows (RouterRetriever)."""
    best, features, numbers = losses.best_of_rows(), run.features[seen], seen.tolist()
    centre = features.mean(dim=0)
    found = centroids_by_best(features - centre, [best[i] for i in numbers], [run.sources[i] for i in numbers])
    return CentroidRouter.by_performance(run.router.features, found, centre)


def _clustered(
    run: ElreaRun, seen: Tensor
) -> tuple[Float[Tensor, "row dimension"], Float[Tensor, " dimension"] | None, list[int], list[str]]:
    """Return what some rows' clusters are told by.

    Their features, minus their mean where ELREA's own are; this mean; their clusters, numbered anew where some have no
    row; and the names of these clusters' experts.
    """
    known, labels = torch.tensor(run.labels)[seen].unique(return_inverse=True)
    features, names = run.features[seen], [f"cluster-{number}" for number in known.tolist()]
    centre = None if run.router.centre is None else features.mean(dim=0)
    return features if centre is None else features - centre, centre, labels.tolist(), names


def unseen_weights(
    run: ElreaRun,
    build: Callable[[ElreaRun, Tensor], Router],
    losses: CrossFitLosses,
    features: Float[Tensor, "row dimension"] | None = None,
) -> Float[Tensor, "row expert"]:
    """Return the weights that each training row gets of a router which its fifth of the rows had no part in.

    A cluster whose rows are all left out has no weight there.

    Args:
        run: whose rows these are.
        build: makes a router of some of them, by their numbers.
        losses: name the experts.
        features: that the router reads; by default the gradients.
    """
    features, weights = run.features if features is None else features, torch.zeros_like(losses.nll)
    for own, others in fifths(run):
        weights[own] = weights_of(build(run, others), features[own], losses)
    return weights


def fifths(run: ElreaRun) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers of each fifth of the training rows, cut evenly within the clusters, and of all others."""
    folds = assign_folds(run.labels, min(FOLDS, len(run.labels)), run.settings.seed)
    for number in folds.unique():
        yield (folds == number).nonzero().flatten(), (folds != number).nonzero().flatten()


def membership(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Judge cosines by what is usual for each expert, which equation 9 does not."""
    return TrainedExtra({}, membership_of(run, torch.arange(len(run.labels))))


def performance(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Place centroids by who is best on training rows (RouterRetriever)."""
    return TrainedExtra({}, performance_of(run.losses, run, torch.arange(len(run.labels))))


def loss(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Fit the router that predicts every expert's loss from the prompt's gradient."""
    return _by_loss(run, into, lambda place: run.router.features, [(run.features, unlike_rows(run).gradients)])


def prefill(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Fit the same to the states of the prompt's prefill; block and pooling are chosen by cross-validation."""
    layers, states, backbone = candidate_layers(run.mixture.backbone), _states(run), run.mixture.backbone
    other, kinds = unlike_rows(run).states, list(product(range(len(layers)), range(len(POOLINGS))))

    def told(place: int) -> FeatureExtractor:
        layer, pool = kinds[place]
        logger.info("prefill: block %d of %d, %s", layers[layer], len(backbone.blocks), POOLINGS[pool])
        return prefill_extractor(backbone, layers[layer], POOLINGS[pool])

    return _by_loss(run, into, told, [(states[:, *kind], other[:, *kind]) for kind in kinds], with_mlp=True)


def _states(run: ElreaRun) -> Float[Tensor, "row layer pooling width"]:
    prompts = [row.prompt() for row in run.kept.rows]
    return prefill_states(run.mixture.backbone, prompts, candidate_layers(run.mixture.backbone))


class HeldOut(NamedTuple):
    """What a router that is fitted to losses reads of training rows and of unlike ones, and its weights of the former.

    These are of regressions that did not see the row.
    """

    inside: Float[Tensor, "row dimension"]
    outside: Float[Tensor, "other dimension"]
    weights: Float[Tensor, "row expert"]


def held_out(run: ElreaRun, name: str) -> HeldOut:
    """Read that of `loss` or `prefill`."""
    extra = load_extra(run.mixture, name)
    wanted = {"inside": (None, None), "outside": (None, None), "weights": (None, None)}
    return HeldOut(**read_floats(extra.folder / HELD_OUT, wanted, f"delete {extra.folder}"))


def _by_loss(
    run: ElreaRun,
    into: RunFolder,
    extractor: Callable[[int], FeatureExtractor],
    tried: Sequence[tuple[Tensor, Tensor]],
    *,
    with_mlp: bool = False,
) -> TrainedExtra:
    """Fit to the best of several kinds of features, of training rows and unlike ones; `extractor` makes a kind's."""
    losses, other = run.losses, unlike_rows(run).losses
    centred = [own - own.mean(dim=0) for own, _ in tried]
    fitted = fit_loss_router(centred, losses, seed=run.settings.seed, with_mlp=with_mlp)
    place, regression, penalty, sharpness = fitted.chosen
    features, unlike_features = (own.contiguous() for own in tried[place])
    router = LossRouter(extractor(place), regression, losses.experts, sharpness, features.mean(dim=0))
    head = type(regression).__name__.lower()
    told = router.kind, head, penalty, sharpness, fitted.expected_nll
    logger.info("%s router: %s, penalty %g, sharpness %g, expected NLL %.4f", *told)
    write_tensors(into.path / HELD_OUT, HeldOut(features, unlike_features, fitted.weights)._asdict())
    outside = (weights_of(router, unlike_features, other), other)
    refusal = calibrated(router, seen_by(run), (fitted.weights, losses), outside)
    _tell_refusals(refusal)
    return TrainedExtra({}, refusal, {"head": head, "penalty": penalty, "expected_nll": fitted.expected_nll})


def distilled(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Teach ELREA's own weights to a router that reads the states of the prefill, and tell how far they agree."""
    losses, teacher, names = run.losses, run.router, run.mixture.bank.names
    wanted = teacher.weigh(run.features).normalized().aligned(names).weights
    layers, states, seed = candidate_layers(run.mixture.backbone), _states(run), run.settings.seed
    learnt = {
        (place, pool): distil(states[:, place, pool], wanted, seed=seed)
        for place in range(len(layers))
        for pool in range(len(POOLINGS))
    }
    place, pool = min(learnt, key=lambda choice: learnt[choice].error)
    best = learnt[place, pool]
    extractor = prefill_extractor(run.mixture.backbone, layers[place], POOLINGS[pool])
    router = DistilledRouter(teacher, extractor, best.ridge, names, best.familiarity, best.curve)
    agreement = agreements(best, wanted, losses)
    logger.info("distilled: %s", ", ".join(f"{name} {value:.3f}" for name, value in agreement.items()))
    return TrainedExtra({}, router, {"agreement": agreement})


def agreements(learnt: Learnt, wanted: Float[Tensor, "row expert"], losses: CrossFitLosses) -> Mapping[str, float]:
    """Return how far a pupil agrees with its teacher on rows that it was not taught.

    `top_1` is how often both favour the same expert, `rank_correlation` Spearman's over the experts, `misplaced` the
    share of the weight that the pupil has on other experts, `nll` what its mixture loses to the teacher's.
    """
    pupil, tokens = learnt.weights, losses.tokens
    places = [weights.argsort(dim=1).argsort(dim=1).float() for weights in (pupil, wanted)]
    centred = [place - place.mean(dim=1, keepdim=True) for place in places]
    rank_correlation = torch.nn.functional.cosine_similarity(*centred, dim=1)
    worse = losses.mixture_nll(pupil) - losses.mixture_nll(wanted)
    return {
        "top_1": float((pupil.argmax(dim=1) == wanted.argmax(dim=1)).float().mean()),
        "rank_correlation": float(rank_correlation.mean()),
        "misplaced": float(misplaced(pupil, wanted).mean()),
        "nll": float((worse * tokens).sum() / tokens.sum()),
    }
