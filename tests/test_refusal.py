"""A router that can say no: what is unfamiliar goes to the base adapter, at a threshold with a known answer."""

import math
from dataclasses import replace

import pytest
import torch

from coterie.data.batching import TokenRow
from coterie.data.examples import load_examples
from coterie.data.unlike import UNLIKE
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.methods.elrea.fitted_routers import calibrated
from coterie.routers.base import Router, RouterParts, Routing
from coterie.routers.centroid import CentroidRouter
from coterie.routers.fixed import FixedRouter
from coterie.routers.loss import CrossFitLosses
from coterie.routers.refusal import FOLDED, Calibration, Familiarity, Observed, RefusalRouter
from coterie.routers.table import load_router
from coterie.routers.token import TokenLevel
from helpers import normal

PROMPT = TokenRow((1,), 1, (False,), (True,))
NOTHING = Observed(torch.zeros(0), torch.zeros(0))


def observed(*pairs: tuple[float, float]) -> Observed:
    return Observed(*torch.tensor(pairs).T)


# ---------------------------------------------------------------------------------------------------- the threshold

INSIDE = observed((0.5, 1.0), (0.6, 1.0), (0.7, 4.0), (0.8, 4.0))
"""A gain of 10 nats: 10% of it may go with the first row, 20% with the first two."""


@pytest.mark.parametrize(
    ("caution", "wanted"),
    [(0.0, 0.5), (0.05, 0.5), (0.1, 0.6), (0.2, 0.7), (0.6, 0.8), (0.99, 0.8), (1.0, math.inf)],
)
def test_where_nothing_outside_is_known_as_much_is_given_up_as_caution_allows(caution, wanted):
    assert Calibration(INSIDE, NOTHING).threshold(caution) == pytest.approx(wanted)


def test_harm_outside_moves_the_threshold_above_it_as_far_as_the_gain_inside_allows():
    """The rows outside lie at 0.1 and 0.65: the second can be refused for a fifth of the gain, not for a tenth."""
    outside = observed((0.1, -1.0), (0.65, -1.0))
    found = {caution: Calibration(INSIDE, outside).threshold(caution) for caution in (0.1, 0.2)}
    assert found == pytest.approx({0.1: 0.6, 0.2: (0.65 + 0.7) / 2})


def test_the_threshold_lies_in_the_middle_of_the_gap_between_what_helps_and_what_harms():
    assert Calibration(INSIDE, observed((0.1, -1.0), (0.3, -2.0))).threshold(0.0) == pytest.approx(0.4)


def test_where_the_mixture_harms_nothing_outside_everything_is_answered():
    assert Calibration(INSIDE, observed((0.1, 1.0), (0.3, 0.0))).threshold(0.1) == -math.inf


def test_what_helps_outside_by_chance_does_not_lower_the_threshold():
    """The most familiar row outside is harmed a little, those below are helped a lot: all of them are refused."""
    outside = observed((0.1, 5.0), (0.2, 5.0), (0.3, -0.1))
    assert Calibration(INSIDE, outside).threshold(0.0) == pytest.approx((0.3 + 0.5) / 2)


def test_a_mixture_that_gains_nothing_inside_never_answers():
    assert Calibration(observed((0.5, -1.0), (0.9, 0.5)), NOTHING).threshold(0.0) == math.inf


@pytest.mark.parametrize("caution", [0.0, 0.1, 0.3])
def test_on_made_up_domains_the_gain_inside_stays_and_the_harm_outside_goes(caution):
    """Two domains around their directions, where experts help; strangers in all directions, whom they harm."""
    around = torch.eye(64)[[0, 1]].repeat_interleave(100, dim=0)

    def rows(seed: int) -> torch.Tensor:
        return around + 0.05 * normal(200, 64, seed=seed)

    familiarity = Familiarity.of(rows(1))
    gains = (0.2 + 0.1 * normal(200, seed=2), -0.5 + 0.1 * normal(200, seed=3))
    strangers = [normal(200, 64, seed=seed) for seed in (4, 5)]
    calibration = Calibration(Observed(familiarity(rows(1)), gains[0]), Observed(familiarity(strangers[0]), gains[1]))
    threshold = calibration.threshold(caution)
    kept = float((familiarity(rows(6)) >= threshold).float().mean())
    assert kept >= 0.9 * (1 - caution)
    assert not (familiarity(strangers[1]) >= threshold).any()


# -------------------------------------------------------------------------------------------------------- familiarity


def test_familiarity_is_the_mean_cosine_to_the_five_nearest_rows_around_their_mean():
    rows, prompts = 3 + normal(40, 16, seed=1), 3 + normal(3, 16, seed=2)
    near = [p - rows.mean(dim=0) for p in prompts]
    others = rows - rows.mean(dim=0)
    wanted = [sorted((float(torch.cosine_similarity(p, r, dim=0)) for r in others), reverse=True)[:5] for p in near]
    found = Familiarity.of(rows)(prompts)
    assert found.tolist() == pytest.approx([sum(own) / 5 for own in wanted], abs=1e-5)


def test_training_rows_are_not_compared_with_themselves():
    rows = normal(10, 16, seed=1)
    whole = Familiarity.of(rows)
    for number, own in enumerate(whole(rows)):
        others = Familiarity(torch.cat([whole.rows[:number], whole.rows[number + 1 :]]), whole.centre)
        assert float(own) == pytest.approx(float(others(rows[number : number + 1])[0]), abs=1e-5)


def test_the_scale_of_features_does_not_matter():
    rows, prompts = normal(20, 16, seed=1), normal(3, 16, seed=2)
    torch.testing.assert_close(Familiarity.of(7 * rows)(7 * prompts), Familiarity.of(rows)(prompts))


def test_long_features_are_compared_in_fewer_dimensions_with_nearly_the_same_cosines():
    """Rows of two kinds, opposite each other; a kind's common part is four fifths of the squared length."""
    kinds = torch.ones(30, 1)
    kinds[15:] = -1
    rows = normal(30, 8 * FOLDED, seed=1) + 2 * kinds * normal(8 * FOLDED, seed=3)
    found = Familiarity.of(rows)
    assert found.rows.shape == (30, FOLDED)
    assert float((found(rows) - 0.8).abs().max()) < 0.06


def test_one_row_alone_is_familiar_with_nothing():
    rows = normal(1, 8)
    assert Familiarity.of(rows)(rows).tolist() == [0.0]


# --------------------------------------------------------------------------------------------------------- the router


def described(features: torch.Tensor) -> FeatureExtractor:
    return FeatureExtractor("gradient", lambda rows: features[: len(rows)], {})


@pytest.fixture
def wrapped() -> RefusalRouter:
    """Knows rows along the first two axes, and refuses what has a cosine below 0.5 to them."""
    centroids = torch.eye(3)[:2]
    router = CentroidRouter.by_cluster(described(torch.eye(3)), centroids, ["a", "b"])
    calibration = Calibration(observed((0.6, 1.0)), observed((0.4, -1.0)))
    return RefusalRouter(router, Familiarity(torch.eye(3)[:2], torch.zeros(3)), calibration, "base")


def test_familiar_prompts_are_weighed_as_before_and_others_go_to_the_fallback(wrapped):
    """Cosines to the nearest rows: (0.9 + 0.1) / 2 of about (9, 1), 0 of the third axis."""
    features = torch.tensor([[9.0, 9.0, 0.0], [0.0, 0.0, 1.0]])
    found = wrapped.weigh(features)
    assert wrapped.threshold == pytest.approx(0.5)
    torch.testing.assert_close(found.weights[0], wrapped.router.weigh(features).normalized().weights[0])
    assert found.row(1) == {"base": 1.0, "a": 0.0, "b": 0.0}
    assert list(found.similarities) == ["a", "b"]


def test_a_fallback_that_the_router_does_not_know_joins_its_experts():
    router = RefusalRouter(
        FixedRouter({"a": 1.0, "b": 3.0}),
        Familiarity(torch.eye(2), torch.zeros(2)),
        Calibration(INSIDE, NOTHING),
        "backbone",
        extractor=described(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])),
    )
    found = router.route([PROMPT, PROMPT])
    assert found.row(0) == {"a": 0.25, "b": 0.75, "backbone": 0.0}
    assert found.row(1) == {"a": 0.0, "b": 0.0, "backbone": 1.0}


def test_caution_can_be_changed_afterwards_and_off_is_the_router_itself(wrapped):
    assert wrapped.with_caution(None) is wrapped.router
    assert wrapped.with_caution(1.0).threshold == math.inf
    with pytest.raises(CoterieError, match="caution is the share .* from 0 to 1; got 1.5"):
        wrapped.with_caution(1.5)
    plain = FixedRouter({"a": 1.0})
    assert plain.with_caution(None) is plain
    with pytest.raises(CoterieError, match="router 'fixed' was never calibrated"):
        FixedRouter({"a": 1.0}).with_caution(0.1)


def test_it_wraps_a_router_that_follows_the_text_too(wrapped):
    features = torch.tensor([[0.0, 0.0, 1.0]])
    assert TokenLevel(wrapped, every=1).weigh(features).row(0)["base"] == 1.0
    assert wrapped.reads == wrapped.router.reads


def test_gates_inside_layers_are_not_wrapped(wrapped):
    class InLayers(Router):
        kind, grain = "gate", "layer"

        def weigh(self, read: object) -> Routing:
            raise AssertionError

    with pytest.raises(CoterieError, match="'gate' weighs experts inside the layers"):
        RefusalRouter(InLayers(), wrapped.familiarity, wrapped.calibration, "base")


def test_a_refusal_around_a_router_that_reads_something_else_is_saved_with_its_own_features(mixture, tmp_path):
    features = mixture.router.features
    router = RefusalRouter(
        FixedRouter(dict.fromkeys(mixture.bank.names, 0.25)),
        Familiarity.of(features(mixture.tokens(["add 3 4", "SPELL CAT NOW"]))),
        Calibration(observed((0.5, 1.0)), observed((0.2, -1.0))),
        "base",
        extractor=features,
    )
    entry = router.save(tmp_path)
    again = load_router(entry, RouterParts(tmp_path, mixture.folder, mixture.backbone, mixture.bank))
    prompts = mixture.tokens(["add 5 6", "What is the capital of Kenya?"])
    assert torch.equal(again.route(prompts).weights, router.route(prompts).weights)


# ------------------------------------------------------------------------------------------------------ what is fitted


def test_calibrating_by_losses_gives_the_gain_per_row_in_nats_over_all_its_tokens():
    """The mixture is the expert `a` alone: better by 0.5 a token inside, worse by 1 outside."""
    inside = CrossFitLosses(
        ("base", "a"), torch.tensor([[2.0, 1.5]] * 3), torch.zeros(3, 2, 2), torch.tensor([2.0, 4, 6])
    )
    outside = CrossFitLosses(("base", "a"), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2, 2), torch.tensor([3.0]))
    inside, outside = (replace(own, pairs=(own.nll[:, :, None] + own.nll[:, None, :]) / 2) for own in (inside, outside))
    alone = torch.tensor([[0.0, 1.0]])
    rows = torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3]])
    found = calibrated(
        FixedRouter({"base": 0.0, "a": 1.0}),
        (rows, alone.expand(3, -1), inside),
        (torch.tensor([[-1.0, 1.0]]), alone, outside),
        described(rows),
    )
    assert found.calibration.inside.gain.tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert found.calibration.outside.gain.tolist() == pytest.approx([-3.0])


def test_fitted_routers_refuse_by_default_and_eval_can_turn_it_off(grid):
    for method in ("elrea-refusing", "loss-routing", "prefill"):
        refusing = grid.cell(method).router
        assert isinstance(refusing, RefusalRouter) and refusing.fallback == "base"
        assert grid.cell(f"{method}:caution=off").router is refusing.router
        assert grid.cell(f"{method}:caution=.3").router.caution == 0.3
    with pytest.raises(CoterieError, match="'elrea:caution=2' is no variant"):
        grid.cell("elrea:caution=2")
    with pytest.raises(CoterieError, match="'gradient-centroids' was never calibrated"):
        grid.cell("elrea:caution=0.5")


def test_the_sample_that_comes_along_has_rows_of_many_kinds_with_answers():
    rows = load_examples(UNLIKE)
    assert len({row.id for row in rows}) == len(rows) == 56
    assert len({row.source for row in rows}) >= 20
    assert max(len(row.instruction) + len(row.response) for row in rows) < 250  # it is scored quickly
