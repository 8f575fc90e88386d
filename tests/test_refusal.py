"""A router that can say no: what is unfamiliar goes to the base adapter, at a threshold with a known answer."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from coterie.artifacts import write_tensors
from coterie.data.batching import TokenRow
from coterie.data.examples import load_examples
from coterie.data.unlike import UNLIKE
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.methods.elrea.refusing import Seen, calibrated
from coterie.routers.base import Router, RouterParts, Routing
from coterie.routers.centroid import CentroidRouter, fold
from coterie.routers.derived import DerivedRouter, keep_top
from coterie.routers.familiarity import Familiarity, Nearest
from coterie.routers.fixed import FixedRouter
from coterie.routers.loss import CrossFitLosses
from coterie.routers.refusal import Calibration, Observed, RefusalRouter, support
from coterie.routers.table import load_router
from coterie.routers.token import TokenLevel
from helpers import normal, pairs_that_gain_nothing

PROMPT = TokenRow((1,), 1, (False,), (True,))
NOTHING = Observed(torch.zeros(0), torch.zeros(0))


def observed(*pairs: tuple[float, float]) -> Observed:
    return Observed(*torch.tensor(pairs).T)


# ---------------------------------------------------------------------------------------------------- the threshold

INSIDE = observed((0.5, 1.0), (0.6, 1.0), (0.7, 4.0), (0.8, 4.0))
"""Rows on which much is gained, most of it on the most familiar ones."""


@pytest.mark.parametrize(
    ("caution", "wanted"),
    [(0.0, 0.5), (0.24, 0.5), (0.25, 0.6), (0.5, 0.7), (0.6, 0.7), (0.99, 0.8), (1.0, math.inf)],
)
def test_where_nothing_outside_is_known_caution_is_the_share_of_the_rows_that_is_left(caution, wanted):
    assert Calibration(INSIDE, NOTHING).limits(caution).familiarity == pytest.approx(wanted)
    ten = observed(*((place / 10, 1.0) for place in range(10)))
    assert Calibration(ten, NOTHING).limits(caution).familiarity == pytest.approx(
        math.inf if caution == 1 else int(10 * caution) / 10
    )


def test_harm_outside_moves_the_threshold_above_it_as_far_as_the_rows_inside_allow():
    """The rows outside lie at 0.1 and 0.65: the second can be refused for two of the four rows, not for one."""
    outside = observed((0.1, -1.0), (0.65, -1.0))
    found = {caution: Calibration(INSIDE, outside).limits(caution).familiarity for caution in (0.25, 0.5)}
    assert found == pytest.approx({0.25: 0.6, 0.5: (0.65 + 0.7) / 2})


def test_the_threshold_lies_in_the_middle_of_the_gap_between_what_helps_and_what_harms():
    assert Calibration(INSIDE, observed((0.1, -1.0), (0.3, -2.0))).limits(0.0).familiarity == pytest.approx(0.4)


def test_where_the_mixture_harms_nothing_outside_what_is_stranger_than_all_that_was_seen_is_still_refused():
    assert Calibration(INSIDE, observed((0.1, 1.0), (0.3, 0.0))).limits(0.1).familiarity == pytest.approx(0.1)
    assert Calibration(INSIDE, observed((0.9, 1.0))).limits(0.1).familiarity == pytest.approx(0.5)


def test_what_helps_outside_by_chance_does_not_lower_the_threshold():
    """The most familiar row outside is harmed a little, those below are helped a lot: all of them are refused."""
    outside = observed((0.1, 5.0), (0.2, 5.0), (0.3, -0.1))
    assert Calibration(INSIDE, outside).limits(0.0).familiarity == pytest.approx((0.3 + 0.5) / 2)


def test_a_mixture_that_gains_nothing_inside_never_answers():
    assert Calibration(observed((0.5, -1.0), (0.9, 0.5)), NOTHING).limits(0.0).familiarity == math.inf


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
    threshold = calibration.limits(caution).familiarity
    kept = float((familiarity(rows(6)) >= threshold).float().mean())
    assert kept >= 0.9 * (1 - caution)
    assert not (familiarity(strangers[1]) >= threshold).any()


def test_one_row_with_much_of_the_gain_does_not_open_the_door_to_all_strangers():
    """A gain of 20 nats, of which 3 are on the least familiar row."""
    inside = observed((0.0, 3.0), *((1 + place / 100, 17 / 19) for place in range(19)))
    found = {caution: Calibration(inside, NOTHING).limits(caution).familiarity for caution in (0.0, 0.05, 0.1)}
    assert found == pytest.approx({0.0: 0.0, 0.05: 1.0, 0.1: 1.01})


# ------------------------------------------------------------------------------------------------------------ support

ALL = torch.ones(1, 3, dtype=torch.bool)


def losses(*rows: tuple[float, float, float], tokens: float = 1.0) -> CrossFitLosses:
    """Losses of the base adapter and of experts `a` and `b`, in whose mixtures nothing is gained beside the mean."""
    nll = torch.tensor(rows)
    return CrossFitLosses(("base", "a", "b"), nll, pairs_that_gain_nothing(nll), torch.full((len(rows),), tokens))


NEAR = losses((2.0, 1.0, 2.5), (2.0, 1.5, 2.0), (2.0, 1.9, 4.0))


def test_support_is_the_mean_gain_of_a_prompts_own_weights_on_its_nearest_rows_in_standard_errors():
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    found = support(NEAR, "base", weights, Nearest(torch.tensor([[2, 0, 1]] * 4), ALL.expand(4, 3)))
    gains = ([1.0, 0.5, 0.1], [0.5, 0.25, 0.05], [-0.5, 0.0, -2.0])
    wanted = [statistics.mean(own) / (statistics.stdev(own) / 3**0.5) for own in gains]
    torch.testing.assert_close(found, torch.tensor([*wanted, 0.0]))


def test_support_is_in_nats_of_whole_rows_and_of_rows_that_are_there():
    more = losses((2.0, 1.0, 2.0), (2.0, 1.5, 2.0), (2.0, 9.0, 2.0), tokens=7.0)
    there = Nearest(torch.tensor([[0, 1, 2]]), torch.tensor([[True, True, False]]))
    alone = Nearest(torch.tensor([[1, 0, 2]]), torch.tensor([[True, False, False]]))
    nobody = Nearest(torch.tensor([[0, 1, 2]]), torch.zeros(1, 3, dtype=torch.bool))
    found = [float(support(more, "base", torch.tensor([[0.0, 1.0, 0.0]]), own)) for own in (there, alone, nobody)]
    mean, error = 7 * 0.75, 7 * 0.25
    assert found == pytest.approx([mean / error, 7 * 0.5 / 1e-3, 0.0])


def test_a_prompt_has_to_be_as_familiar_as_is_asked_and_borne_out_by_more_than_a_standard_error():
    """Of mixtures of before nobody's support is known, so nobody is asked for it."""
    seen = Observed(torch.tensor([0.6, 0.6, 0.6, 0.5]), torch.ones(4), torch.tensor([1.01, 1.0, -2.0, 9.0]))
    limits = Calibration(seen, NOTHING).limits(0.25)
    assert limits == pytest.approx((0.6, 1.0))
    assert seen.answered(limits).tolist() == [True, False, False, False]
    assert seen._replace(support=None).answered(limits).tolist() == [True, True, True, False]


def test_support_is_asked_where_familiarity_alone_does_not_tell_unlike_rows():
    """Of four rows outside that are harmed one is as familiar as most inside, or two are."""
    few = observed((0.1, -1.0), (0.2, -1.0), (0.3, -1.0), (0.9, -1.0))
    many = observed((0.1, -1.0), (0.2, -1.0), (0.9, -1.0), (0.9, -1.0))
    helped = observed((0.1, 1.0), (0.2, 1.0))
    asked = [Calibration(INSIDE, outside).limits(0.25).support for outside in (few, many, helped, NOTHING)]
    assert asked == [-math.inf, 1.0, 1.0, 1.0]
    known = INSIDE._replace(support=torch.zeros(4))
    answered = [known.answered(Calibration(known, outside).limits(0.25)).tolist() for outside in (few, many)]
    assert answered == [[False, True, True, True], [False] * 4]


def test_what_nothing_bears_out_does_not_lower_the_familiarity_that_is_asked():
    """Nothing outside is harmed any more; other strangers may be borne out by chance."""
    outside = Observed(*torch.tensor([[0.2, 0.9], [-1.0, -1.0], [0.5, 0.5]]))
    inside = INSIDE._replace(support=torch.full((4,), 2.0))
    assert Calibration(inside, outside).limits(0.25) == pytest.approx((0.6, 1.0))


def test_a_prompt_among_rows_on_which_its_weights_lose_goes_to_the_fallback(monkeypatch):
    """Expert `a` gains along the first axis and loses along the second, where prompts are as familiar."""
    rows = torch.eye(4)[[0, 0, 1, 1]] + 0.1 * torch.eye(4)
    nll = losses((2.0, 1.0, 2.0), (2.0, 1.2, 2.0), (2.0, 2.5, 1.0), (2.0, 2.6, 1.0))
    features = torch.tensor([[1.0, 0.0, 0.05, 0.05], [0.0, 1.0, 0.05, 0.05]])
    familiarity = Familiarity.of(rows)
    inside, outside = torch.tensor([[-9.0], [1.0], [2.0]]), torch.tensor([[-8.0], [-1.0], [0.5]])
    calibration = Calibration(Observed(*inside), Observed(*outside))

    def route(expert: str, own: CrossFitLosses | None) -> list[str]:
        extractor = described(features)
        router = RefusalRouter(
            FixedRouter({expert: 1.0}), familiarity, calibration, "base", extractor=extractor, losses=own
        )
        found = router.route([PROMPT, PROMPT])
        return [found.experts[place] for place in found.weights.argmax(dim=1).tolist()]

    monkeypatch.setattr("coterie.routers.familiarity.NEIGHBOURS", 2)
    assert route("a", nll) == ["a", "base"]
    assert route("b", nll) == ["base", "b"]
    assert route("a", None) == ["a", "a"]


# -------------------------------------------------------------------------------------------------------- familiarity


def distances(row: torch.Tensor, others: torch.Tensor) -> list[float]:
    """The ten smallest distances, 1 - cosine, to other rows."""
    return sorted(1 - float(torch.cosine_similarity(row.double(), own.double(), dim=0)) for own in others)[:10]


def test_familiarity_is_how_near_the_ten_nearest_rows_are_beside_how_near_these_are_to_theirs():
    rows, prompts = 1 + normal(40, 16, seed=1), 1 + normal(3, 16, seed=2)
    others = [torch.cat([rows[:number], rows[number + 1 :]]) for number in range(40)]
    spread = [sum(distances(row, own)) / 10 for row, own in zip(rows, others, strict=True)]
    for prompt, found in zip(prompts, Familiarity.of(rows)(prompts).tolist(), strict=True):
        order = sorted(range(40), key=lambda number: -float(torch.cosine_similarity(prompt, rows[number], dim=0)))
        own, theirs = sum(distances(prompt, rows)), sum(spread[number] for number in order[:10])
        assert found == pytest.approx(math.log(theirs / own), abs=1e-5)


def test_rows_of_one_kind_know_a_stranger_that_around_their_mean_looks_like_them():
    """One direction and noise: the noise alone is as near to a stranger's direction as to other noise."""
    rows, new = torch.eye(64)[0] + 0.02 * normal(30, 64, seed=1), torch.eye(64)[0] + 0.02 * normal(30, 64, seed=2)
    strangers = torch.eye(64)[1:31] + 0.02 * normal(30, 64, seed=3)
    centred = torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=-1)
    before, now = Familiarity(centred, None, rows.mean(dim=0)), Familiarity.of(rows)
    assert float((before(strangers) >= before(rows).quantile(0.1)).float().mean()) > 0.7
    assert float(now(strangers).max()) < float(now(new).min()) - 3


def test_rows_of_a_loose_kind_and_a_tight_one_are_equally_familiar():
    rows, new = (torch.cat([torch.eye(64)[0] + 0.01 * own, torch.eye(64)[1] + 0.1 * own]) for own in drawn(40))
    found = Familiarity.of(rows)(new).split(40)
    assert abs(float(found[0].mean() - found[1].mean())) < 0.2
    loose = torch.eye(64)[0] + 0.1 * normal(5, 64, seed=9)  # is no stranger to the loose kind's distances, but here
    assert float(Familiarity.of(rows)(loose).max()) < float(found[0].min())


def drawn(count: int) -> list[torch.Tensor]:
    return [normal(count, 64, seed=seed) for seed in (1, 2)]


def test_training_rows_are_not_compared_with_themselves():
    rows = normal(20, 16, seed=1)
    whole = Familiarity.of(rows)
    assert whole.spread is not None
    for number, own in enumerate(whole(rows)):
        kept = [place for place in range(20) if place != number]
        others = Familiarity(whole.rows[kept], whole.spread[kept])
        assert float(own) == pytest.approx(float(others(rows[number : number + 1])[0]), abs=1e-5)


def test_new_rows_of_a_kind_are_as_familiar_as_the_training_rows():
    kinds = torch.eye(32)[[0, 1, 2]].repeat_interleave(100, dim=0)
    rows, new = (kinds + 0.2 * normal(300, 32, seed=seed) for seed in (1, 2))
    whole = Familiarity.of(rows)
    low = whole(rows).quantile(0.1)
    assert float((whole(new) >= low).float().mean()) == pytest.approx(0.9, abs=0.05)


def test_what_is_nearer_to_a_stranger_than_to_any_row_is_three_times_less_familiar_for_it():
    """Written out: by the nearest row and the nearest stranger, of which none is the prompt itself."""
    rows, strangers, others = normal(30, 8, seed=1), normal(20, 8, seed=2), normal(40, 8, seed=3)
    prompts = torch.cat([others, rows[:2], strangers[:2]])
    plain, told = Familiarity.of(rows), Familiarity.of(rows, strangers=strangers)
    counted = 0
    for prompt, before, found in zip(prompts, plain(prompts).tolist(), told(prompts).tolist(), strict=True):
        own, strange = (min(d for d in distances(prompt, known) if d > 1e-6) for known in (rows, strangers))
        assert found == pytest.approx(before - 3 * max(0.0, math.log(own / strange)), abs=1e-4)
        counted += own > strange
    assert 10 < counted < 34


def test_strangers_that_hide_among_the_rows_of_a_loose_kind_are_told_once_some_of_them_are_known():
    """Rows of one loose kind; strangers of a tight one around what is most like a row, until some of them are given."""
    rows, own = normal(200, 16, seed=1), normal(200, 16, seed=4)
    plain = Familiarity.of(rows)
    given, new = (own[plain(own).argmax()] + 0.1 * normal(60, 16, seed=3)).split(30)
    for familiarity, wanted in ((plain, 1.0), (Familiarity.of(rows, strangers=given), 0.0)):
        low = familiarity(rows).quantile(0.1)
        assert float((familiarity(new) >= low).float().mean()) == wanted
        assert float((familiarity(own) >= low).float().mean()) == pytest.approx(0.9, abs=0.05)


def test_a_row_is_not_compared_with_strangers_that_are_made_of_it():
    rows, strangers = normal(12, 8, seed=1), normal(6, 8, seed=2)
    made_of = torch.zeros(12, 6, dtype=torch.bool)
    made_of[:5, :2] = True
    found = Familiarity.of(rows, strangers=strangers).compare(rows, made_of)[0]
    for known, own in ((strangers[2:], slice(0, 5)), (strangers, slice(5, 12))):
        torch.testing.assert_close(found[own], Familiarity.of(rows, strangers=known)(rows)[own])
    assert not torch.equal(found, Familiarity.of(rows, strangers=strangers)(rows))


def test_the_scale_of_features_does_not_matter():
    rows, prompts = normal(20, 16, seed=1), normal(3, 16, seed=2)
    torch.testing.assert_close(Familiarity.of(7 * rows)(7 * prompts), Familiarity.of(rows)(prompts))


def test_mixtures_of_before_compare_gradients_in_the_fewer_dimensions_that_they_keep():
    rows, prompts = normal(30, 64, seed=1), normal(5, 64, seed=2)
    short = Familiarity.of(fold(rows, 16))
    torch.testing.assert_close(short(prompts), short(fold(prompts, 16)))


def test_one_row_alone_is_familiar_with_nothing():
    rows = normal(1, 8)
    assert Familiarity.of(rows)(rows).tolist() == [0.0]


def test_mixtures_of_before_compare_rows_around_their_mean():
    rows, prompts = 3 + normal(40, 16, seed=1), 3 + normal(3, 16, seed=2)
    centre = rows.mean(dim=0)
    found = Familiarity.read({"rows": torch.nn.functional.normalize(rows - centre, dim=-1), "centre": centre})(prompts)
    for prompt, own in zip(prompts, found.tolist(), strict=True):
        near = sorted((float(torch.cosine_similarity(prompt - centre, r - centre, dim=0)) for r in rows), reverse=True)
        assert own == pytest.approx(sum(near[:5]) / 5, abs=1e-5)
    for broken in ({}, {"spread": torch.ones(39)}, {"centre": torch.ones(15)}):
        with pytest.raises(ValueError, match="a spread for each of them, or a centre"):
            Familiarity.read({"rows": rows, **broken})
    for shape in ((0, 16), (3, 15)):
        with pytest.raises(ValueError, match="cannot be compared with rows"):
            Familiarity.read({"rows": rows, "spread": torch.ones(40), "strangers": torch.ones(shape)})


# --------------------------------------------------------------------------------------------------------- the router


def described(features: torch.Tensor) -> FeatureExtractor:
    return FeatureExtractor("gradient", lambda rows: features[: len(rows)], {})


@pytest.fixture
def wrapped() -> RefusalRouter:
    """Knows rows along the first two axes, and refuses what is no nearer to them than they are to each other."""
    centroids = torch.eye(3)[:2]
    router = CentroidRouter.by_cluster(described(torch.eye(3)), centroids, ["a", "b"])
    calibration = Calibration(observed((0.6, 1.0)), observed((0.4, -1.0)))
    return RefusalRouter(router, Familiarity(torch.eye(3)[:2], torch.ones(2)), calibration, "base")


def test_familiar_prompts_are_weighed_as_before_and_others_go_to_the_fallback(wrapped):
    """Both rows are at 1 - sqrt(1/2) of the first prompt, at 1 of the second, and of each other."""
    features = torch.tensor([[9.0, 9.0, 0.0], [0.0, 0.0, 1.0]])
    found = wrapped.weigh(features)
    assert wrapped.limits.familiarity == pytest.approx(0.5)
    torch.testing.assert_close(found.weights[0], wrapped.router.weigh(features).normalized().weights[0])
    assert found.row(1) == {"base": 1.0, "a": 0.0, "b": 0.0}
    assert list(found.similarities) == ["a", "b"]


def test_a_fallback_that_the_router_does_not_know_joins_its_experts():
    router = RefusalRouter(
        FixedRouter({"a": 1.0, "b": 3.0}),
        Familiarity(torch.eye(2), torch.ones(2)),
        Calibration(INSIDE, NOTHING),
        "backbone",
        extractor=described(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])),
    )
    found = router.route([PROMPT, PROMPT])
    assert found.row(0) == {"a": 0.25, "b": 0.75, "backbone": 0.0}
    assert found.row(1) == {"a": 0.0, "b": 0.0, "backbone": 1.0}


def test_without_its_refusal_a_router_weighs_every_prompt_as_its_refusal_does_a_familiar_one():
    """Weights that do not sum to 1 would be another mixture where experts meet in the layers."""
    router = keep_top(FixedRouter({"a": 0.5, "b": 0.3, "base": 0.2}), 2)
    familiarity, read = Familiarity(torch.eye(2), torch.ones(2)), described(torch.tensor([[1.0, 1.0]]))
    refusing = RefusalRouter(router, familiarity, Calibration(INSIDE, NOTHING), "base", extractor=read)
    for found in (refusing.route([PROMPT]), refusing.with_caution(None).route([PROMPT])):
        assert found.row(0) == {"a": pytest.approx(0.625), "b": pytest.approx(0.375), "base": 0.0}


def test_caution_can_be_changed_afterwards(wrapped):
    assert wrapped.with_caution(1.0).limits.familiarity == math.inf
    with pytest.raises(CoterieError, match="caution is the share .* from 0 to 1; got 1.5"):
        wrapped.with_caution(1.5)
    plain = FixedRouter({"a": 1.0})
    assert plain.with_caution(None) is plain
    with pytest.raises(CoterieError, match="router 'fixed' was never calibrated"):
        FixedRouter({"a": 1.0}).with_caution(0.1)


def test_it_wraps_a_router_that_follows_the_text_too(wrapped):
    features = torch.tensor([[0.0, 0.0, 1.0]])
    assert TokenLevel(wrapped, every=1).weigh(features).row(0)["base"] == 1.0
    assert list(wrapped.readings) == list(wrapped.router.readings)


def test_gates_inside_layers_are_not_wrapped(wrapped):
    class InLayers(Router):
        kind, grain = "gate", "layer"

        def weigh(self, read: object) -> Routing:
            raise AssertionError

    with pytest.raises(CoterieError, match="'gate' weighs experts inside the layers"):
        RefusalRouter(InLayers(), wrapped.familiarity, wrapped.calibration, "base")


@pytest.mark.parametrize("told", [[], ["What is the capital of Peru?", "Who was Nero?"]])
def test_a_refusal_around_a_router_that_reads_something_else_is_saved_with_its_own_features(mixture, tmp_path, told):
    features = mixture.router.features
    strangers, names = features(mixture.tokens(told)) if told else None, mixture.bank.names
    count = len(names)
    known = CrossFitLosses(names, torch.rand(2, count), torch.rand(2, count, count), torch.ones(2))
    inside = Observed(torch.tensor([-9.0]), torch.ones(1), torch.ones(1)) if told else observed((0.5, 1.0))
    router = RefusalRouter(
        FixedRouter(dict.fromkeys(names, 0.25)),
        Familiarity.of(features(mixture.tokens(["add 3 4", "SPELL CAT NOW"])), strangers=strangers),
        Calibration(inside, observed((0.2, -1.0))),
        "base",
        extractor=features,
        losses=known if told else None,
    )
    entry = router.save(tmp_path)
    again = load_router(entry, RouterParts(tmp_path, mixture.folder, mixture.backbone, mixture.bank))
    prompts = mixture.tokens(["add 5 6", "What is the capital of Kenya?"])
    assert torch.equal(again.route(prompts).weights, router.route(prompts).weights)
    seen = features(prompts)
    assert torch.equal(again.familiarity(seen), router.familiarity(seen))
    assert (again.familiarity.strangers is None) == (again.losses is None) == (not told)
    assert again.limits == router.limits
    written = load_file(tmp_path / "refusal.safetensors")
    broken = [({"rows": seen[:, 1:]}, "cannot be compared with")]
    if told:
        broken += [
            ({"tokens": torch.ones(3)}, "do not fit 'base' and the rows"),
            ({"inside_support": torch.ones(2)}, "support of 2 rows does not fit 1"),
            ({"pairs": torch.ones(2, 2, 2)}, "tensor 'pairs' is"),
        ]
    for tensors, message in broken:
        write_tensors(tmp_path / "refusal.safetensors", {**written, **tensors})
        with pytest.raises(CoterieError, match=message):
            load_router(entry, RouterParts(tmp_path, mixture.folder, mixture.backbone, mixture.bank))


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
    familiarity = Familiarity.of(rows)
    own, other = familiarity.compare(rows), familiarity.compare(torch.tensor([[-1.0, 0.5]]))
    seen = Seen(described(rows), familiarity, own, other)
    found = calibrated(FixedRouter({"base": 0.0, "a": 1.0}), seen, (alone.expand(3, -1), inside), (alone, outside))
    assert found.extractor is seen.extractor and found.familiarity is familiarity
    assert torch.equal(found.calibration.inside.familiarity, own[0])
    assert torch.equal(found.calibration.outside.familiarity, other[0])
    deviation = statistics.stdev([2.0, 3.0]) / 2**0.5
    assert found.calibration.inside.support.tolist()[0] == pytest.approx(2.5 / deviation)
    assert found.calibration.outside.support.tolist() == pytest.approx([2 / (1 / 3**0.5)])
    assert found.calibration.inside.gain.tolist() == pytest.approx([1.0, 2.0, 3.0])
    assert found.calibration.outside.gain.tolist() == pytest.approx([-3.0])


def test_what_is_refused_is_told_as_the_shares_of_the_rows_that_it_was_calibrated_on(wrapped):
    inside = observed(*((place / 10, 1.0) for place in range(10)))
    router = RefusalRouter(
        wrapped.router, wrapped.familiarity, Calibration(inside, observed((0.25, -1.0), (0.85, 1.0))), "base", 0.3
    )
    assert router.limits.familiarity == pytest.approx(0.275)
    assert router.refused == {"inside": pytest.approx(0.3), "outside": 0.5}


def test_fitted_routers_refuse_by_default_and_eval_can_turn_it_off(grid):
    for method in ("elrea-refusing", "loss-routing", "prefill"):
        refusing = grid.cell(method).router
        assert isinstance(refusing, RefusalRouter) and refusing.fallback == "base"
        off = grid.cell(f"{method}:caution=off").router
        assert isinstance(off, DerivedRouter) and off.normalised and off.router is refusing.router
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
