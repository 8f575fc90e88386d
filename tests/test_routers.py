"""Routers give the published weights, and `Routing` holds to its rules."""

import math
import re
import shutil
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from coterie.artifacts import read_tensors, write_tensors
from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.routers.base import Router, RouterParts, Routing
from coterie.routers.centroid import CentroidRouter, base_weight, centroids_of, cosines, standardised
from coterie.routers.fixed import FixedRouter, one_hot, uniform
from coterie.routers.table import load_router

few = settings(deadline=None, max_examples=40)
PROMPT = TokenRow((1,), 1, (False,), (True,))
weight = st.floats(0, 1e6, width=32)


normal = partial(helpers.normal, dtype=torch.float64)


def routing(weights, experts=("a", "b", "c")) -> Routing:
    return Routing(tuple(experts), torch.as_tensor(weights, dtype=torch.float32))


# --------------------------------------------------------------------------------------------- similarity to centroids


class ClusterWeights(NamedTuple):
    clusters: torch.Tensor
    base: torch.Tensor
    cosines: torch.Tensor


def centroid_weights(features, centroids, ddof: int = 0) -> ClusterWeights:
    """ELREA's eq. 9 from its parts, in the precision of the features."""
    found = cosines(features, centroids)
    return ClusterWeights(standardised(found, ddof=ddof).softmax(dim=-1), base_weight(found).squeeze(-1), found)


def test_the_weights_of_worked_numbers_with_two_clusters():
    """Cosines .6 and .8: mean .7, deviation .1, standardised -1 and 1, softmax 1/(1+e^2) and its rest; base 1 - .8."""
    found = centroid_weights(torch.tensor([[3.0, 4.0]]), torch.eye(2))
    torch.testing.assert_close(found.cosines, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(found.clusters, torch.tensor([[0.11920292, 0.88079708]]))
    torch.testing.assert_close(found.base, torch.tensor([0.2]))


def test_the_weights_of_worked_numbers_with_three_clusters():
    """Cosines .6, .8, 0: mean 7/15, deviation sqrt(.346667 / 3) = .339935, standardised .392232, .980581, -1.372813."""
    found = centroid_weights(torch.tensor([[0.6, 0.8, 0.0]]), torch.eye(3))
    torch.testing.assert_close(found.clusters, torch.tensor([[0.336452, 0.605954, 0.057594]]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.base, torch.tensor([0.2]))


def test_the_sample_deviation_gives_softer_weights():
    """With ddof 1 the deviation of .6 and .8 is .1 sqrt(2), so the standardised cosines are +-1/sqrt(2)."""
    found = centroid_weights(torch.tensor([[3.0, 4.0]]), torch.eye(2), ddof=1)
    low = 1 / (1 + math.exp(math.sqrt(2)))
    torch.testing.assert_close(found.clusters, torch.tensor([[low, 1 - low]]))


def test_a_centroid_is_the_normalised_mean_of_features_that_are_not():
    """Rows (3, 0) and (0, 1): the mean (1.5, .5) leans to the larger gradient; of unit rows it would not lean."""
    centroids = centroids_of(torch.tensor([[3.0, 0.0], [5.0, 12.0], [0.0, 1.0]]), [0, 1, 0], 2)
    expected = torch.tensor([[3 / math.sqrt(10), 1 / math.sqrt(10)], [5 / 13, 12 / 13]])
    torch.testing.assert_close(centroids, expected)


def test_an_empty_cluster_has_no_centroid():
    with pytest.raises(CoterieError, match="cluster 1 has no rows"):
        centroids_of(torch.eye(3), [0, 2, 0], 3)


@few
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), ddof=st.sampled_from([0, 1]))
def test_cluster_weights_sum_to_one_and_the_base_gets_one_minus_the_largest_cosine(seed, count, ddof):
    features, centroids = normal(5, 4, seed=seed), normal(count, 4, seed=seed + 1)
    found = centroid_weights(features, centroids, ddof=ddof)
    assert found.clusters.min() >= 0
    torch.testing.assert_close(found.clusters.sum(dim=1), torch.ones(5, dtype=torch.float64))
    cosines = torch.nn.functional.cosine_similarity(features[:, None], centroids[None], dim=-1)
    torch.testing.assert_close(found.base, 1 - cosines.max(dim=1).values)
    torch.testing.assert_close(found.cosines, cosines)


@few
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6))
def test_the_feature_of_a_centroid_gets_its_largest_weight_there_and_none_at_the_base(seed, count):
    centroids = normal(count, 5, seed=seed)
    found = centroid_weights(centroids * 7, centroids)
    assert found.clusters.argmax(dim=1).tolist() == list(range(count))
    torch.testing.assert_close(found.base, torch.zeros(count, dtype=torch.float64))
    assert found.base.min() >= 0


@few
@given(seed=st.integers(0, 10**6), order=st.permutations(range(5)))
def test_permuting_clusters_permutes_their_weights(seed, order):
    features, centroids = normal(4, 6, seed=seed), normal(5, 6, seed=seed + 1)
    found, permuted = (centroid_weights(features, part) for part in (centroids, centroids[list(order)]))
    torch.testing.assert_close(permuted.clusters, found.clusters[:, list(order)])
    torch.testing.assert_close(permuted.base, found.base)


@few
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e6))
def test_the_length_of_features_and_centroids_changes_nothing(seed, scale):
    features, centroids = normal(4, 6, seed=seed), normal(3, 6, seed=seed + 1)
    found = centroid_weights(features, centroids)
    for other in (centroid_weights(features * scale, centroids), centroid_weights(features, centroids * scale)):
        torch.testing.assert_close(other.clusters, found.clusters)
        torch.testing.assert_close(other.base, found.base)


@pytest.mark.parametrize("ddof", [0, 1])
def test_one_cluster_gets_everything(ddof):
    found = centroid_weights(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), ddof=ddof)
    assert found.clusters.tolist() == [[1.0], [1.0]]
    torch.testing.assert_close(found.base, torch.tensor([1 - 1 / math.sqrt(5), 2.0]))


@pytest.mark.parametrize(
    ("features", "centroids"),
    [
        (torch.tensor([[0.3, 0.4]]), torch.tensor([[1.0, 2.0]]).expand(3, -1)),
        (torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])),
        (torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64), 1 + 1e-9 * torch.eye(3, dtype=torch.float64)),
    ],
    ids=["equal centroids", "a feature of zeros", "cosines that differ by rounding only"],
)
def test_equal_cosines_share_evenly(features, centroids):
    found = centroid_weights(features, centroids)
    assert found.clusters.tolist() == [pytest.approx([1 / 3] * 3, rel=1e-6)]


def test_a_prompt_unlike_every_cluster_goes_to_the_base():
    found = centroid_weights(torch.tensor([[0.0, 0.0, 5.0]]), torch.eye(3)[:2])
    assert found.base.tolist() == [1.0]


# ------------------------------------------------------------------------------------------------ the gradient router


def described(features: torch.Tensor, **record) -> FeatureExtractor:
    return FeatureExtractor("gradient", lambda rows: features[: len(rows)], record)


def gradient_router(features: torch.Tensor, **options) -> CentroidRouter:
    return CentroidRouter.by_cluster(described(features, seed=3), torch.eye(2), ["law", "maths"], **options)


def parts(run, mixture, folder="router") -> RouterParts:
    return RouterParts(run / folder, run, mixture.backbone, mixture.bank)


def test_a_saved_router_keeps_the_deviation_that_it_standardises_by(mixture, run_folder, tmp_path):
    router = mixture.router.with_ddof(1)
    entry = router.save(tmp_path / "router")
    again = load_router(entry, RouterParts(tmp_path / "router", run_folder, mixture.backbone, mixture.bank))
    prompts = mixture.tokens(["add 3 4"])
    assert torch.equal(again.route(prompts).weights, router.route(prompts).weights)
    assert not torch.allclose(again.route(prompts).weights, mixture.route(["add 3 4"]).weights)
    assert "ddof" not in mixture.router.save(tmp_path / "plain")


def test_the_router_puts_the_base_first_and_keeps_cosines_by_expert():
    found = gradient_router(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), base="everyone").route([PROMPT, PROMPT])
    assert found.experts == ("everyone", "law", "maths")
    assert found.row(0) == pytest.approx({"everyone": 0.2, "law": 0.119203, "maths": 0.880797}, abs=1e-6)
    assert found.row(1)["everyone"] == 0.0
    assert found.similarities["law"].tolist() == pytest.approx([0.6, 1.0])
    assert found.similarities["maths"].tolist() == pytest.approx([0.8, 0.0])


def test_the_centre_is_taken_off_every_feature():
    centre = torch.tensor([10.0, -5.0])
    plain = gradient_router(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    centred = gradient_router(torch.tensor([[13.0, -1.0], [10.0, -3.0]]), centre=centre)
    rows = [PROMPT, PROMPT]
    torch.testing.assert_close(centred.route(rows).weights, plain.route(rows).weights)


def test_features_that_are_not_finite_are_told():
    with pytest.raises(CoterieError, match="must be finite and not negative; check the router's features"):
        gradient_router(torch.tensor([[math.nan, 1.0]])).route([PROMPT])


def test_names_and_centroids_must_match():
    with pytest.raises(CoterieError, match="2 centroids do not fit the 1 experts law"):
        CentroidRouter.by_cluster(described(torch.zeros(0)), torch.eye(2), ["law"])


def test_an_expert_cannot_be_the_base_too():
    with pytest.raises(CoterieError, match="every expert is routed once, but the routing names law, law, maths"):
        gradient_router(torch.tensor([[3.0, 4.0]]), base="law").route([PROMPT])


@pytest.mark.parametrize("centre", [None, torch.tensor([0.5, 0.25])], ids=["plain", "centred"])
def test_centroids_are_saved_by_name(centre, tmp_path):
    router = gradient_router(torch.zeros(1, 2), centre=centre)
    assert router.save(tmp_path) == {
        "kind": "gradient-centroids",
        "description": "gradient",
        "experts": ["law", "maths"],
        "base": "base",
        "seed": 3,
    }
    tensors = read_tensors(tmp_path / "centroids.safetensors")
    assert torch.equal(tensors["centroid.law"], torch.eye(2)[0])
    assert torch.equal(tensors["centroid.maths"], torch.eye(2)[1])
    found = tensors.get("centre")
    assert found is centre is None or torch.equal(found, centre)


def test_a_missing_centroid_is_told_by_name(mixture, tmp_path):
    record = gradient_router(torch.zeros(1, 2)).save(tmp_path / "router")
    record["experts"].append("poetry")
    with pytest.raises(CoterieError, match="lacks the tensor 'centroid.poetry'"):
        load_router(record, parts(tmp_path, mixture))


@pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
def test_a_saved_gradient_router_routes_exactly_as_before(mixture, run_folder, tmp_path, centred):
    router = mixture.router
    if centred:
        centre = 0.01 * normal(router.centroids["cluster-0"].shape[1]).float()
        router = CentroidRouter.by_cluster(
            router.extractor, torch.cat(list(router.centroids.values())), router.experts, centre=centre
        )
    shutil.copytree(run_folder / "checkpoints", tmp_path / "checkpoints")
    record = router.save(tmp_path / "router")
    loaded = load_router(record, parts(tmp_path, mixture))
    rows = mixture.tokens(["add 3 4", "SPELL WORD NOW", "tell me more about it"])
    before, after = router.route(rows), loaded.route(rows)
    assert after.experts == before.experts == ("base", "cluster-0", "cluster-1", "cluster-2")
    assert torch.equal(after.weights, before.weights)
    assert all(torch.equal(after.similarities[name], before.similarities[name]) for name in loaded.experts)
    assert len({tuple(row) for row in after.weights.tolist()}) == 3  # it does look at the prompts
    assert not centred or not torch.allclose(after.weights, mixture.router.route(rows).weights)


# ------------------------------------------------------------------------------------------------------ fixed weights


def test_a_fixed_router_gives_every_prompt_the_same_weights():
    found = FixedRouter({"law": 0.5, "maths": 2.0}).route([PROMPT] * 3)
    assert found.experts == ("law", "maths")
    assert found.weights.tolist() == [[0.5, 2.0]] * 3


def test_uniform_and_one_hot_weights():
    assert uniform(["a", "b"]).route([PROMPT]).row(0) == {"a": 0.5, "b": 0.5}
    assert one_hot("b", ["a", "b", "c"]).route([PROMPT]).row(0) == {"a": 0.0, "b": 1.0, "c": 0.0}


def test_an_unknown_expert_is_told_with_the_nearest_name():
    with pytest.raises(CoterieError, match="no expert is called 'mahts'. Did you mean 'maths'. There are: law, maths"):
        one_hot("mahts", ["maths", "law"])


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_fixed_weights_that_break_the_rules_are_refused_at_once(value):
    with pytest.raises(CoterieError, match="must be finite and not negative"):
        FixedRouter({"law": 1.0, "maths": value})


def test_a_fixed_router_needs_an_expert():
    with pytest.raises(CoterieError, match="at least one expert"):
        FixedRouter({})


def test_a_saved_fixed_router_routes_as_before(mixture, tmp_path):
    router = FixedRouter({"law": 0.25, "maths": 3.0})
    loaded = load_router(router.save(tmp_path), parts(tmp_path, mixture))
    assert torch.equal(loaded.route([PROMPT]).weights, router.route([PROMPT]).weights)
    assert loaded.route([PROMPT]).experts == ("law", "maths")


CENTROIDS = {"kind": "gradient-centroids", "experts": ["a"], "base": "base"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"kind": "fixd"},
            "no router is called 'fixd'. Did you mean 'fixed'[?] There are: ariadne, arrow, avengers, derived",
        ),
        ({}, "no router is called 'None'"),
        ({"kind": "fixed"}, r"router: the entry of the router 'fixed' is broken \('weights'\); fit again"),
        ({"kind": "fixed", "weights": {"a": "much"}}, "the entry of the router 'fixed' is broken .*'much'"),
        (CENTROIDS, r"the entry of the router 'gradient-centroids' is broken \('checkpoints'\)"),
        ({**CENTROIDS, "checkpoints": ["../x"], "features": {}, "seed": 0}, "'../x' cannot be an expert's name"),
    ],
    ids=["unknown", "none", "no weights", "a word as weight", "no checkpoints", "a path"],
)
def test_a_broken_entry_is_told(record, message, mixture, tmp_path):
    write_tensors(tmp_path / "router" / "centroids.safetensors", {"centroid.a": torch.ones(2)})
    with pytest.raises(CoterieError, match=message):
        load_router(record, parts(tmp_path, mixture))


def test_all_routers_are_routers():
    assert isinstance(uniform(["a"]), Router)
    assert isinstance(gradient_router(torch.zeros(1, 2)), Router)


# ------------------------------------------------------------------------------------------------------------ routing

BROKEN = {
    "too few dimensions": (torch.ones(2), r"\(request, expert\), so those of shape \(2,\) do not fit 2 experts"),
    "too many dimensions": (torch.ones(1, 1, 2), r"of shape \(1, 1, 2\) do not fit 2 experts"),
    "too many experts": (torch.ones(1, 3), r"of shape \(1, 3\) do not fit 2 experts"),
    "negative": (torch.tensor([[1.0, -1e-9]]), "must be finite and not negative"),
    "NaN": (torch.tensor([[1.0, math.nan]]), "must be finite and not negative"),
    "infinite": (torch.tensor([[1.0, math.inf]]), "must be finite and not negative"),
}


@pytest.mark.parametrize(("weights", "message"), BROKEN.values(), ids=BROKEN)
def test_a_routing_that_breaks_a_rule_is_refused(weights, message):
    with pytest.raises(CoterieError, match=message):
        Routing(("a", "b"), weights)


def test_an_expert_cannot_be_routed_twice():
    with pytest.raises(CoterieError, match="every expert is routed once, but the routing names a, a"):
        Routing(("a", "a"), torch.ones(1, 2))


@few
@given(st.lists(st.lists(weight, min_size=3, max_size=3).filter(any), min_size=1, max_size=4))
def test_normalised_weights_sum_to_one_in_the_same_proportion(rows):
    before = torch.tensor(rows)
    found = routing(rows).normalized().weights
    torch.testing.assert_close(found.sum(dim=1), torch.ones(len(rows)))
    total = before.sum(dim=1, keepdim=True)
    torch.testing.assert_close((found * total)[total[:, 0] > 0], before[total[:, 0] > 0], rtol=1e-5, atol=1e-30)


def test_the_smallest_weights_are_normalised_too():
    assert routing([[1e-36, 3e-36, 0.0]]).normalized().weights.tolist() == [pytest.approx([0.25, 0.75, 0.0])]


def test_a_request_that_is_routed_to_nobody_is_refused():
    with pytest.raises(CoterieError, match="request 2 is routed to nobody: all of its weights are 0; give an expert a"):
        routing([[0.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
    with pytest.raises(CoterieError, match="request 1 is routed to nobody"):
        FixedRouter({"a": 0.0, "b": 0.0})


def test_the_largest_weights_stay_and_ties_keep_the_earlier_expert():
    given_weights = [[0.2, 0.5, 0.4], [0.4, 0.4, 0.4], [0.1, 0.3, 0.3]]
    assert_rows(routing(given_weights).top(1), [[0, 0.5, 0], [0.4, 0, 0], [0, 0.3, 0]])
    assert_rows(routing(given_weights).top(2), [[0, 0.5, 0.4], [0.4, 0.4, 0], [0, 0.3, 0.3]])
    assert_rows(routing(given_weights).top(3), given_weights)


def test_shares_of_one_are_shared_out_among_the_experts_that_stay():
    given_weights = [[0.2, 0.5, 0.3], [0.2, 0.4, 0.4]]
    assert_rows(routing(given_weights).top(1), [[0, 1, 0], [0, 1, 0]])
    assert_rows(routing(given_weights).top(2), [[0, 0.625, 0.375], [0, 0.5, 0.5]])
    assert_rows(routing(given_weights).top(3), given_weights)


def assert_rows(found: Routing, expected) -> None:
    torch.testing.assert_close(found.weights, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("k", [0, 4, -1])
def test_more_experts_than_there_are_cannot_be_kept(k):
    with pytest.raises(CoterieError, match=re.escape(f"must be between 1 and 3 (the number of experts), got {k}")):
        routing([[1.0, 2.0, 3.0]]).top(k)


@pytest.mark.parametrize("change", [lambda r: r.top(1), lambda r: r.normalized()], ids=["top", "normalised"])
def test_changed_weights_keep_experts_and_similarities_and_leave_the_first_alone(change):
    similar = {"a": torch.ones(1)}
    first = Routing(("a", "b"), torch.tensor([[1.0, 3.0]]), similar)
    changed = change(first)
    assert (changed.experts, changed.similarities) == (first.experts, similar)
    assert first.weights.tolist() == [[1.0, 3.0]]


@few
@given(names=st.permutations(["a", "b", "c", "d", "e"]))
def test_weights_follow_the_names_and_experts_that_are_not_routed_get_none(names):
    found = routing([[1.0, 2.0, 3.0]]).aligned(names).weights
    assert dict(zip(names, found[0].tolist(), strict=True)) == {"a": 1, "b": 2, "c": 3, "d": 0, "e": 0}


def test_an_expert_that_the_bank_lacks_is_told():
    with pytest.raises(CoterieError, match="the router knows experts that the bank does not hold: a, c"):
        routing([[1.0, 2.0, 3.0]]).aligned(["b", "d"])


def test_a_row_is_one_requests_weights_by_name():
    assert routing([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).row(1) == {"a": 4.0, "b": 5.0, "c": 6.0}
