"""Cosines that are judged by what is usual for each expert know no hub, and no leader where nothing is similar."""

import pytest
import torch

from coterie.errors import CoterieError
from coterie.features.growing_text import FeatureExtractor
from coterie.routers.centroid import CentroidRouter, centroids_of, cosines
from coterie.routers.membership import MembershipRouter, Scale, leave_one_out_scale, published_sharpness
from helpers import normal

NAMES = ["loose", "tight", "other"]


def described(features: torch.Tensor) -> FeatureExtractor:
    return FeatureExtractor("gradient", lambda rows: features[: len(rows)], {})


def with_a_hub(seed: int) -> tuple[torch.Tensor, list[int]]:
    """Gradients that share a direction; it is the first cluster's centroid's most, as that one's rows differ most."""
    labels = [0] * 40 + [1] * 40 + [2] * 40
    spread = torch.tensor([1.0, 0.3, 0.3])[labels][:, None]
    return torch.eye(64)[63] + torch.eye(64)[labels] + 0.2 * spread * normal(120, 64, seed=seed), labels


def strangers(seed: int) -> torch.Tensor:
    return torch.eye(64)[63] + 0.2 * normal(50, 64, seed=seed)


def routers() -> tuple[CentroidRouter, MembershipRouter]:
    features, labels = with_a_hub(1)
    centroids, scale = centroids_of(features, labels, 3), leave_one_out_scale(features, labels, 3)
    published = CentroidRouter.by_cluster(described(features), centroids, NAMES)
    return published, MembershipRouter(described(features), centroids, scale, NAMES)


def test_equation_9_makes_a_leader_out_of_nothing_and_memberships_do_not():
    published, mended = routers()
    old, new = (router.weigh(strangers(5)).normalized().weights for router in (published, mended))
    assert float(old[:, 1:].amax(dim=1).mean()) > 0.35  # the published form's share for its leader
    assert float(new[:, 0].mean()) > 0.8  # the mended one leaves it to the base


def test_prompts_like_the_training_rows_go_where_they_went():
    published, mended = routers()
    features, labels = with_a_hub(9)
    for router in (published, mended):
        led = router.weigh(features).weights[:, 1:].argmax(dim=1)
        assert float((led == torch.tensor(labels)).float().mean()) > 0.97


def test_a_row_that_is_as_alike_as_the_experts_own_is_weighed_as_by_equation_9():
    """Cosines at own, others, others: memberships 1, 0, 0, whose softmax is that of standardised (1, 0, 0)."""
    scale = Scale(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([0.2, 0.3, 0.1]))
    found = torch.tensor([[0.9, 0.3, 0.1], [0.2, 0.6, 0.1]])
    memberships = scale.memberships(found)
    torch.testing.assert_close(memberships, torch.eye(3)[:2])
    standard = CentroidRouter.by_cluster(described(torch.eye(3)), torch.eye(3), NAMES)
    wanted = standard.weighting(torch.eye(3)[:2])
    torch.testing.assert_close((memberships * published_sharpness(3)).softmax(dim=-1), wanted)


def test_weights_sum_to_one_and_the_base_gets_what_belongs_to_nobody():
    router = MembershipRouter(described(torch.eye(2)), torch.eye(2), Scale(torch.ones(2), torch.zeros(2)), ["a", "b"])
    found = router.weigh(torch.tensor([[3.0, 4.0], [-1.0, -1.0], [2.0, 0.0]]))
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(3))
    assert found.weights[:, 0].tolist() == pytest.approx([0.2, 1.0, 0.0])
    assert float(found.similarities["b"][0]) == pytest.approx(0.8)


def test_the_scale_leaves_every_row_out_of_its_own_centroid():
    features, labels = normal(12, 8, seed=3), [0, 1, 2] * 4
    scale = leave_one_out_scale(features, labels, 3)
    own = {0: [], 1: [], 2: []}
    others = {0: [], 1: [], 2: []}
    for row in range(12):
        for cluster in range(3):
            members = [i for i in range(12) if labels[i] == cluster and i != row]
            cosine = float(cosines(features[row : row + 1], features[members].mean(dim=0, keepdim=True)))
            (own if labels[row] == cluster else others)[cluster].append(cosine)
    assert scale.own.tolist() == pytest.approx([sum(x) / len(x) for x in own.values()], abs=1e-6)
    assert scale.others.tolist() == pytest.approx([sum(x) / len(x) for x in others.values()], abs=1e-6)


def test_a_cluster_of_one_row_has_the_mean_of_the_others_scale():
    scale = leave_one_out_scale(normal(7, 8), [0, 0, 0, 1, 1, 1, 2], 3)
    assert float(scale.own[2]) == pytest.approx(float(scale.own[:2].mean()))
    assert bool(torch.isfinite(scale.others).all())


def test_an_expert_that_is_no_nearer_to_its_own_rows_has_no_members():
    found = Scale(torch.tensor([0.2, 0.9]), torch.tensor([0.3, 0.1])).memberships(torch.tensor([[0.9, 0.5]]))
    assert found.tolist() == [[0.0, pytest.approx(0.5)]]


def test_names_centroids_and_scale_must_match():
    with pytest.raises(CoterieError, match="2 centroids do not fit the 1 experts a"):
        MembershipRouter(described(torch.eye(2)), torch.eye(2), Scale(torch.ones(2), torch.zeros(2)), ["a"])
