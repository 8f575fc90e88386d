"""What a run's refusals are calibrated on: rows unlike its training data, and requests that cross its clusters."""

import sys
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import RunFolder, read_floats, write_tensors
from coterie.data.batching import check_lengths
from coterie.data.examples import load_all
from coterie.data.unlike import UNLIKE, cross, join
from coterie.errors import CoterieError
from coterie.experts.names import BASE
from coterie.features.growing_text import FeatureExtractor
from coterie.features.prefill import POOLINGS, candidate_layers, middle_layers, prefill_states, side_by_side
from coterie.methods.elrea.cross_fit import score_pairs
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.extras import TrainedExtra, load_extra, read_losses, write_losses
from coterie.routers.base import Router
from coterie.routers.familiarity import Familiarity, Nearest, kept_rows
from coterie.routers.feature import middle_extractor
from coterie.routers.loss import CrossFitLosses
from coterie.routers.refusal import CAUTION, Calibration, Observed, RefusalRouter, support

FEATURES, CROSSING_KINDS, CROSSED = "features.safetensors", "crossing_kinds", "crossed"
UNLIKE_ROWS = 200  # of an out-of-domain sample that are scored at most


def unlike(run: ElreaRun, into: RunFolder) -> TrainedExtra:
    """Measure the experts' losses, and read features, on rows that are unlike the training data.

    Of requests that cross clusters only the kind is read: half of each is what one expert was trained on.
    """
    examples = load_all([run.extras.unlike or str(UNLIKE)], UNLIKE_ROWS)
    mixture = run.mixture
    rows = [mixture.prompts.row(example) for example in examples]
    check_lengths(rows, mixture.backbone.positions, [f"unlike row {example.id}" for example in examples])
    losses = CrossFitLosses(mixture.bank.names, **score_pairs(mixture, rows, "unlike rows"))
    write_losses(losses, into)
    prompts = [row.prompt() for row in rows]
    layers, middle = candidate_layers(mixture.backbone), middle_layers(mixture.backbone)
    kind_of, most = middle_extractor(mixture.backbone, middle), mixture.backbone.positions or sys.maxsize
    drawn, known = cross(run.labels, run.settings.seed), run.kept.examples
    crossing = {pair: mixture.prompts.row(join(*(known[i] for i in pair))).prompt() for pair in drawn}
    states = prefill_states(mixture.backbone, prompts, layers)
    features = {
        "gradients": run.router.features(prompts),
        "states": states,
        "kinds": side_by_side(states[:, [layers.index(layer) for layer in middle]]),
        "known_kinds": kind_of([row.prompt() for row in run.kept.rows]),
    }
    if short := {pair: row for pair, row in crossing.items() if len(row.ids) <= most}:
        features |= {CROSSING_KINDS: kind_of(list(short.values())), CROSSED: torch.tensor(list(short)).float()}
    write_tensors(into.path / FEATURES, features)
    return TrainedExtra({}, None, {"judged": list(losses.experts)})


class UnlikeRows(NamedTuple):
    """Rows that are unlike the training data.

    Attributes:
        losses: of the experts.
        expected: whether prompts like these are to come, as they were given; those that come along are a mere sample.
        gradients: their gradient features.
        states: those of their prefill.
        kinds: those of the middle of the model, which tell a kind of text.
        known_kinds: the same of the training rows.
        crossing_kinds: the same of requests that cross their clusters.
        crossed: the numbers of the two training rows that each of these is made of.
    """

    losses: CrossFitLosses
    expected: bool
    gradients: Float[Tensor, "row dimension"]
    states: Float[Tensor, "row layer pooling width"]
    kinds: Float[Tensor, "row dimension"]
    known_kinds: Float[Tensor, "known dimension"]
    crossing_kinds: Float[Tensor, "crossing dimension"]
    crossed: Float[Tensor, "crossing 2"]

    @property
    def strangers(self) -> Float[Tensor, "stranger dimension"] | None:
        """What prompts are compared with beside the training rows, as such are to come; a mere sample is not."""
        own = torch.cat([self.crossing_kinds, self.kinds] if self.expected else [self.crossing_kinds])
        return own if len(own) else None


def unlike_rows(run: ElreaRun) -> UnlikeRows:
    """Read what the extra of this name has measured."""
    extra = load_extra(run.mixture, "unlike")
    losses = read_losses(extra)
    count = len(losses.tokens)
    wanted = {"gradients": (count, None), "states": (count, None, len(POOLINGS), None), "kinds": (count, None)}
    wanted |= {"known_kinds": (len(run.kept.rows), None), CROSSING_KINDS: (None, None), CROSSED: (None, 2)}
    expected = extra.settings.get("unlike") is not None
    found = read_floats(extra.folder / FEATURES, wanted, f"delete {extra.folder}", optional=[CROSSING_KINDS, CROSSED])
    crossed = found.get(CROSSED, torch.zeros(0, 2))
    if len(crossed) != len(found.get(CROSSING_KINDS, ())) or bool(
        ((crossed < 0) | (crossed >= len(run.kept.rows))).any()
    ):
        raise CoterieError(f"{extra.folder / FEATURES} does not tell what crosses its rows; delete {extra.folder}")
    return UnlikeRows(losses, expected, **{CROSSING_KINDS: found["kinds"][:0], **found, CROSSED: crossed})


class Seen(NamedTuple):
    """How familiar rows that a refusal is calibrated on are, and what tells it of prompts.

    Attributes:
        extractor: of the kind of text that a prompt is.
        familiarity: the training rows.
        inside: how familiar each of these is, and the others that are nearest to it.
        outside: the same of the unlike ones.
    """

    extractor: FeatureExtractor
    familiarity: Familiarity
    inside: tuple[Float[Tensor, " row"], Nearest]
    outside: tuple[Float[Tensor, " other"], Nearest]

    @classmethod
    def of(cls, extractor: FeatureExtractor, unlike: UnlikeRows) -> "Seen":
        """Compare all rows with the training rows, and with those strangers that are to come.

        The unlike rows that come along are no such: a sample of all there is would rather part rows of its own kinds
        from the training data. A row is not compared with requests that are made of it, which no new one has.
        """
        known, other, strangers = unlike.known_kinds, unlike.kinds, unlike.strangers
        familiarity, own = Familiarity.of(known, strangers=strangers), None
        if strangers is not None:
            own = torch.zeros(len(known), len(strangers), dtype=torch.bool)
            own[unlike.crossed.long().T, torch.arange(len(unlike.crossed))] = True
        return cls(extractor, familiarity, familiarity.compare(known, own), familiarity.compare(other))


def seen_by(run: ElreaRun) -> Seen:
    """Return what tells how familiar a prompt is to a run."""
    backbone = run.mixture.backbone
    return Seen.of(middle_extractor(backbone, middle_layers(backbone)), unlike_rows(run))


def calibrated(
    router: Router,
    seen: Seen,
    inside: tuple[Float[Tensor, "row expert"], CrossFitLosses],
    outside: tuple[Float[Tensor, "other expert"], CrossFitLosses],
    caution: float = CAUTION,
) -> RefusalRouter:
    """Wrap a router so that prompts for which it is not borne out go to the base adapter.

    Args:
        router: to wrap.
        seen: how familiar the rows are.
        inside: of the training rows: weights of routers that did not see the row, and losses.
        outside: the same of unlike rows.
        caution: the share of the rows inside that is left as unfamiliar.
    """
    known = inside[1].take(kept_rows(len(inside[1].tokens)))

    def observed(side: tuple[Tensor, CrossFitLosses], compared: tuple[Tensor, Nearest]) -> Observed:
        (weights, losses), (familiarity, nearest) = side, compared
        return Observed(familiarity, losses.gain(weights, BASE), support(known, BASE, weights, nearest))

    calibration = Calibration(observed(inside, seen.inside), observed(outside, seen.outside))
    return RefusalRouter(router, seen.familiarity, calibration, BASE, caution, seen.extractor, known)
