"""Clusters are the groups that the data holds, as many as asked for, and their sizes are what they say."""

import logging
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.cluster import Birch

from coterie.errors import CoterieError
from coterie.experts import clustering
from coterie.experts.clustering import (
    Clustering,
    cluster,
    describe,
    leaf_radius,
    nearest_distances,
    odd_rows,
    spherical_centres,
)
from coterie.settings.groups import ClusterMethod, ClusterSettings

METHODS = get_args(ClusterMethod)
SIZES = (30, 20, 12, 9, 7)
every_method = pytest.mark.parametrize("method", METHODS)


def groups(
    sizes: tuple[int, ...], *, noise: float = 0.05, shared: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, list[int]]:
    """Rows around orthogonal unit vectors in mixed order, with a part of length `shared` that all rows have."""
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(draw.normal(size=(24, 24)))[0]
    labels = draw.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = basis[labels] + noise * draw.normal(size=(len(labels), 24)) / 24**0.5 + shared * basis[-1]
    return rows, labels.tolist()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def same_partition(one, other) -> bool:
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


def chosen(method: str = "birch", **changes) -> ClusterSettings:
    return ClusterSettings(cluster_method=method, **{"cluster_rounds": 1, **changes})


# ---------------------------------------------------------------------------------------------------------- groups


@every_method
@pytest.mark.parametrize("shared", [0.0, 1.0, 20.0], ids=["apart", "cosines near 1/2", "cosines above 0.99"])
@pytest.mark.parametrize("normalise", [True, False], ids=["unit length", "as they are"])
def test_separated_groups_are_found_exactly(method, shared, normalise):
    rows, labels = groups(SIZES, shared=shared)
    found = cluster(rows, chosen(method, normalise_features=normalise))
    assert same_partition(found.labels, labels)
    assert (found.count, found.sizes(), found.method) == (5, list(SIZES), method)


def test_a_coarse_radius_would_collapse_rows_that_share_a_large_part():
    """The default radius of scikit-learn merges rows whose cosine is above 1/2 or so into one leaf."""
    rows, _ = groups(SIZES, shared=20.0)
    with pytest.raises(
        CoterieError, match="fall into 1 groups only, not the 5 asked .* or a smaller --cluster-threshold"
    ):
        cluster(rows, chosen(cluster_threshold=0.5))
    assert leaf_radius(nearest_distances(unit(rows))) < 0.01


@every_method
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6), shared=st.sampled_from([0.0, 3.0, 50.0]))
def test_rows_without_groups_still_give_as_many_clusters_as_asked(method, seed, count, shared):
    rows, _ = groups((40,), noise=1.0, shared=shared, seed=seed)
    found = cluster(rows, chosen(method, clusters=count), seed=seed)
    assert found.count == count == len(set(found.labels))


@every_method
def test_clusters_are_numbered_from_the_largest_to_the_smallest(method):
    rows, labels = groups((5, 9, 7))
    found = cluster(rows, chosen(method, clusters=3))
    assert found.sizes() == [9, 7, 5]
    assert [label == 0 for label in found.labels] == [label == 1 for label in labels]


def test_clusters_of_one_size_are_numbered_by_their_first_row():
    rows = np.eye(3)[[2, 0, 1, 1, 0, 2]]
    assert cluster(rows, chosen(clusters=3)).labels == (0, 1, 2, 2, 1, 0)


@every_method
def test_the_same_rows_and_seed_give_the_same_clusters(method):
    rows, _ = groups((40, 30), noise=1.0)
    once = cluster(rows, chosen(method, cluster_sample=30), seed=7)
    assert cluster(rows.copy(), chosen(method, cluster_sample=30), seed=7) == once


@every_method
def test_rows_outside_the_sample_are_labelled_too(method):
    rows, labels = groups((40, 30, 30))
    found = cluster(rows, chosen(method, clusters=3, cluster_sample=24))
    assert same_partition(found.labels, labels)
    assert sum(found.sizes()) == len(rows)


@every_method
def test_a_sample_is_never_smaller_than_the_clusters(method):
    assert cluster(np.eye(12), chosen(method, clusters=12, cluster_sample=10)).sizes() == [1] * 12


@every_method
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("normalise", [True, False], ids=["unit length", "as they are"])
def test_the_scale_of_all_features_changes_nothing(method, scale, normalise):
    rows, _ = groups((20, 15, 10), noise=0.3)
    settings = chosen(method, clusters=3, normalise_features=normalise)
    assert cluster(rows * scale, settings) == cluster(rows, settings)


@pytest.mark.parametrize("method", ["birch", "spherical-kmeans"])
def test_the_length_of_a_row_changes_nothing_where_lengths_are_taken_out(method):
    rows, labels = groups(SIZES)
    lengths = np.random.default_rng(1).uniform(0.01, 100, size=(len(rows), 1))
    assert cluster(rows * lengths, chosen(method)) == cluster(rows, chosen(method))


def test_lengths_count_where_they_are_left_in():
    rows = np.array([[1.0, 0.0], [1.1, 0.0], [10.0, 0.0], [10.1, 0.0], [1.0, 0.1], [10.0, 0.1]])
    settings = chosen(clusters=2, normalise_features=False)
    assert cluster(rows, settings).labels == (0, 0, 1, 1, 0, 1)
    assert cluster(rows, chosen("spherical-kmeans", clusters=2, normalise_features=False)).labels[4] == 1


# ------------------------------------------------------------------------------------------------------- few rows


@every_method
def test_fewer_rows_than_clusters_are_an_error(method):
    with pytest.raises(CoterieError, match="4 examples cannot make 5 clusters; give more data or fewer --clusters"):
        cluster(np.eye(4), chosen(method))


@every_method
@pytest.mark.parametrize("distinct", [1, 3])
def test_too_many_equal_rows_are_an_error_that_counts_the_groups(method, distinct):
    rows = np.eye(4)[np.arange(20) % distinct]
    with pytest.raises(
        CoterieError, match=f"into {distinct} groups only, not the 5 asked for .many are equal.; ask for"
    ):
        cluster(rows, chosen(method))


@every_method
@pytest.mark.parametrize("noise", [0.0, 1e-16, 1e-9, 1e-7, 1e-4])
def test_rows_that_are_all_but_equal_share_a_cluster(method, noise):
    """The same text in two batches gives features that differ in their last bits."""
    draw = np.random.default_rng(0)
    kinds = np.arange(40) % 8
    rows = np.eye(8)[kinds] + noise * draw.normal(size=(40, 8))
    assert same_partition(cluster(rows, chosen(method, clusters=8)).labels, kinds.tolist())


@every_method
def test_rows_of_zeros_are_taken_as_equal(method):
    rows = np.concatenate([np.zeros((3, 4)), np.eye(4)])
    assert cluster(rows, chosen(method, clusters=2)).count == 2


# ------------------------------------------------------------------------------------------------------- splitting


@every_method
def test_clusters_over_five_times_the_smallest_are_split_into_one_group_fewer(method):
    """Four groups asked for: two hold three each that lie near each other, which the second round tells apart."""
    sizes = [6, 8, 13, 13, 12, 12, 11, 11]
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(8), sizes))
    basis = np.eye(24)
    centres = np.concatenate([basis[:2], basis[2] + 0.3 * basis[4:7], basis[3] + 0.3 * basis[7:10]])
    rows = centres[labels] + 0.01 * np.random.default_rng(4).normal(size=(len(labels), 24))
    first = cluster(rows, chosen(method, clusters=4))
    assert same_partition(first.labels, np.array([0, 1, 2, 2, 2, 3, 3, 3])[labels].tolist())
    assert first.sizes() == [38, 34, 8, 6]
    second = cluster(rows, chosen(method, clusters=4, cluster_rounds=2))
    assert same_partition(second.labels, labels.tolist())
    assert second.sizes() == sorted(sizes, reverse=True)


@every_method
def test_a_large_cluster_with_fewer_rows_than_the_next_target_stays(method):
    rows = np.concatenate([np.eye(24)[:11], np.eye(24)[11] + 0.01 * np.eye(24)[12:19]])
    assert cluster(rows, chosen(method, clusters=12, cluster_rounds=3)).sizes() == [7] + [1] * 11


@pytest.mark.parametrize("method", ["birch", "birch-pca", "spherical-kmeans"])
def test_a_large_cluster_of_too_few_different_rows_stays_whole(method):
    """Two kinds of rows cannot be three groups."""
    kinds = np.eye(24)[3] + 0.05 * np.eye(24)[[4, 5]]
    rows = np.concatenate([np.eye(24)[:3], kinds[np.arange(40) % 2]])
    assert cluster(rows, chosen(method, clusters=4, cluster_rounds=2)).sizes() == [40, 1, 1, 1]


def test_a_cluster_of_five_times_the_smallest_is_left_alone():
    rows, labels = groups((30, 20, 6))
    assert cluster(rows, chosen(clusters=3, cluster_rounds=3)).sizes() == [30, 20, 6]


def test_three_rounds_can_make_ten_clusters_of_five_as_the_paper_has_it():
    """Round by round the targets are 5, 4 and 3: 5 + 3 = 8, and 8 + 2 = 10."""
    asked = []

    def halves(rows, numbers, target, settings, seed):
        """A stand-in for the method: all but the last row in equal parts, so that one large group is left."""
        asked.append((len(numbers), target))
        labels = np.zeros(len(numbers), dtype=int)
        labels[1:target] = np.arange(1, target)
        return labels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering, "_split", halves)
        found = cluster(np.eye(30), chosen(cluster_rounds=3))
    assert asked == [(30, 5), (26, 4), (23, 3)]
    assert found.count == 10
    assert found.sizes() == [21] + [1] * 9


@every_method
def test_a_large_cluster_of_all_but_equal_rows_stays_in_one_piece_or_is_split_whole(method):
    draw = np.random.default_rng(0)
    rows = np.concatenate([np.eye(8)[:1] + 1e-12 * draw.normal(size=(40, 8)), np.eye(8)[1:4]])
    found = cluster(rows, chosen(method, clusters=4, cluster_rounds=3))
    assert sum(found.sizes()) == 43 and min(found.sizes()) >= 1


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=6).map(tuple),
    rounds=st.integers(1, 3),
    method=st.sampled_from(METHODS),
    noise=st.sampled_from([0.05, 1.0]),
)
def test_sizes_never_lie(sizes, rounds, method, noise):
    rows, _ = groups(sizes, noise=noise)
    found = cluster(rows, chosen(method, clusters=3, cluster_rounds=rounds))
    assert len(found.labels) == len(rows) == sum(found.sizes())
    assert [found.labels.count(number) for number in range(found.count)] == found.sizes()
    assert found.sizes() == sorted(found.sizes(), reverse=True) and found.sizes()[-1] >= 1
    assert sorted(set(found.labels)) == list(range(found.count))
    assert found.count >= 3
    if rounds == 1:
        assert found.count == 3


# -------------------------------------------------------------------------------------------- odd rows, and how many


def with_an_odd_row(sizes: tuple[int, ...], noise: float, seed: int) -> np.ndarray:
    """Groups as above, of which the last row has a direction of its own."""
    rows, _ = groups(sizes, noise=noise, seed=seed)
    own = np.linalg.qr(np.random.default_rng(seed).normal(size=(24, 24)))[0][-1]
    return np.concatenate([rows, own[None]])


@pytest.mark.parametrize("method", ["birch", "spherical-kmeans"])
@settings(deadline=None, max_examples=15)
@given(
    sizes=st.lists(st.integers(30, 150), min_size=2, max_size=7).map(tuple),
    noise=st.sampled_from([0.05, 0.2, 0.4]),
    seed=st.integers(0, 10**6),
)
def test_one_outlier_row_changes_no_other_rows_cluster(method, sizes, noise, seed):
    rows = with_an_odd_row(sizes, noise, seed)
    nearest = nearest_distances(unit(rows))
    assume(odd_rows(nearest).tolist() == [False] * (len(rows) - 1) + [True] and not odd_rows(nearest[:-1]).any())
    usual = ClusterSettings(cluster_method=method)
    without, found = cluster(rows[:-1], usual, seed=seed), cluster(rows, usual, seed=seed)
    assert found.count == without.count
    assert same_partition(found.labels[:-1], without.labels)


@every_method
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_few_outlier_rows_among_600_do_not_explode_the_clusters(method, copies):
    """Four kinds of 150 rows; read literally, the paper's rule made 49 clusters of them with one such row."""
    rows = with_an_odd_row((150,) * 4, 0.2, seed=5)
    rows = np.concatenate([rows, rows[-1:].repeat(copies - 1, axis=0)])
    usual = ClusterSettings(cluster_method=method)
    assert abs(cluster(rows, usual).count - cluster(rows[:600], usual).count) <= 1


def test_clusters_of_less_than_a_twentieth_of_an_even_share_are_no_yardstick():
    """Two of 603 rows are a cluster; by its size the others would be split in every round."""
    rows, labels = groups((200, 200, 201, 2), noise=0.05)
    found = cluster(rows, ClusterSettings(clusters=4))
    assert same_partition(found.labels, labels)


@pytest.mark.parametrize(("most", "sizes"), [(10, 8), (8, 8), (7, 6), (6, 6), (5, 4), (2, 4)])
def test_splitting_ends_at_the_most_clusters_there_may_be_the_largest_first(most, sizes, caplog):
    """Two of four clusters are over five times the smallest, and each would make three parts."""
    halves = np.repeat(np.arange(6), [26, 26, 26, 22, 22, 22])
    basis = np.eye(24)
    centres = np.concatenate([basis[0] + 0.3 * basis[4:7], basis[1] + 0.3 * basis[7:10]])
    rows = np.concatenate([centres[halves], basis[2][None].repeat(8, 0), basis[3][None].repeat(6, 0)])
    rows = rows + 0.01 * np.random.default_rng(0).normal(size=rows.shape)
    with caplog.at_level(logging.INFO):
        found = cluster(rows, chosen(clusters=4, cluster_rounds=2, max_clusters=most))
    assert found.count == sizes
    told = [line for line in caplog.messages if f"more than --max-clusters {most}" in line]
    assert len(told) == (8 - sizes) // 2
    if sizes == 6:
        assert found.sizes() == [66, 26, 26, 26, 8, 6]


def test_a_cluster_of_a_handful_of_rows_is_told(caplog):
    rows, _ = groups((30, 20, 7, 3))
    cluster(rows, chosen(clusters=4))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "few rows to train an expert on: cluster-2 7, cluster-3 3; ask for fewer --clusters or --cluster-rounds, or "
        "give more data"
    ]


def test_odd_rows_lie_beyond_three_interquartile_ranges_and_are_a_twentieth_at_most():
    """Quartiles of 1 to 3 in even steps are 1.5 and 2.5, so far out begins at 5.5; equal rows do not count."""
    usual = np.concatenate([np.zeros(20), np.linspace(1, 3, 101)])
    assert odd_rows(np.append(usual, 5.4)).sum() == 0
    assert odd_rows(np.append(usual, [5.8, 7.0])).tolist() == [False] * 121 + [True] * 2
    assert odd_rows(np.append(usual, np.full(8, 50.0))).sum() == 0
    assert odd_rows(np.zeros(30)).sum() == 0


# --------------------------------------------------------------------------------------------------------- cosines


@pytest.mark.parametrize("seed", range(8))
def test_spherical_k_means_gives_every_row_the_centre_of_largest_cosine(seed):
    """One narrow bundle among rows of all directions: there, nearest by distance is not nearest by cosine."""
    draw = np.random.default_rng(seed)
    directions = unit(np.concatenate([np.eye(6)[0] + 0.15 * draw.normal(size=(40, 6)), draw.normal(size=(60, 6))]))
    found = cluster(directions, chosen("spherical-kmeans", clusters=4))
    centres = unit(np.stack([directions[np.array(found.labels) == number].sum(axis=0) for number in range(4)]))
    assert tuple(np.argmax(directions @ centres.T, axis=1).tolist()) == found.labels


def test_spherical_k_means_looks_at_directions_only_also_where_lengths_are_left_in():
    rows, _ = groups((40, 20), noise=2.0)
    lengths = np.random.default_rng(1).uniform(0.1, 10, size=(len(rows), 1))
    found = cluster(rows * lengths, chosen("spherical-kmeans", clusters=4, normalise_features=False))
    assert found == cluster(rows, chosen("spherical-kmeans", clusters=4))


def test_lloyds_steps_end_where_no_row_has_a_nearer_centre():
    """Two bundles of directions, and a start inside one of them: the steps must move a centre to the other."""
    angles = np.array([0.0, 0.1, 0.2, 1.4, 1.5, 1.6])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    centres = spherical_centres(rows, rows[:2] * [[3.0], [0.2]])  # lengths at the start must not count
    np.testing.assert_allclose(centres, [[np.cos(0.1), np.sin(0.1)], [np.cos(1.5), np.sin(1.5)]], atol=1e-12)


def test_a_centre_that_loses_its_rows_goes_to_the_farthest_row():
    rows = unit(np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]]))
    centres = spherical_centres(rows, np.array([[1.0, 0.1], [-1.0, 0.0]]))
    np.testing.assert_allclose(centres[1], rows[3], atol=1e-12)


# ------------------------------------------------------------------------------------------------------- agreement


def test_the_adjusted_rand_index_of_worked_labels():
    """Clusters of 3 and 3 against sources of 4 and 2: (4 - 2.8) / (6.5 - 2.8) for pairs 3+1, 6 and 7 of 15."""
    rows = np.eye(2)[[0, 0, 0, 1, 1, 1]] + np.arange(6)[:, None] * 1e-3
    found = cluster(rows, chosen(clusters=2), sources=["a", "a", "a", "a", "b", "b"])
    pairs, expected, most = 3 + 1, (3 + 3) * (6 + 1) / 15, ((3 + 3) + (6 + 1)) / 2
    assert found.adjusted_rand_index == pytest.approx((pairs - expected) / (most - expected))


@pytest.mark.parametrize("sources", [(), ["a"] * 6, [None] * 6], ids=["none given", "one", "unknown"])
def test_without_two_sources_there_is_no_agreement(sources):
    assert cluster(np.eye(6), chosen(clusters=2), sources=sources).adjusted_rand_index is None


def test_groups_that_are_the_sources_agree_fully_and_are_told(caplog):
    rows, labels = groups((20, 15, 10))
    with caplog.at_level(logging.INFO):
        found = cluster(rows, chosen(clusters=3), sources=[("maths", "law", None)[label] for label in labels])
    assert found.adjusted_rand_index == 1.0
    assert found.record() == {"method": "birch", "sizes": [20, 15, 10], "adjusted_rand_index": 1.0}
    for line in ("cluster-0: 20 rows (maths 20)", "cluster-2: 10 rows (- 10)", "clusters and sources: 1.00"):
        assert line in caplog.text


def test_the_description_names_sources_from_the_largest_share_and_none_where_none_are_known():
    found = Clustering((0, 0, 0, 1), 2)
    assert describe(found, ["b", "a", "b", "a"]) == ["cluster-0: 3 rows (b 2, a 1)", "cluster-1: 1 rows (a 1)"]
    assert describe(found) == ["cluster-0: 3 rows", "cluster-1: 1 rows"]


# ---------------------------------------------------------------------------------------------------------- radius


def test_the_leaf_radius_is_half_the_median_distance_to_the_nearest_row():
    """Nearest distances of 0, 1, 4, 10, 20 on a line: 1, 1, 3, 6, 10; equal rows do not count."""
    line = np.array([0.0, 1.0, 4.0, 10.0, 20.0])[:, None]
    for rows, factor in ((line, 1), (np.concatenate([line, np.full((9, 1), 200.0)]), 1), (line * 1e-9, 1e-9)):
        assert leaf_radius(nearest_distances(rows)) == pytest.approx(factor * 3 / 2)


def test_the_tree_is_built_with_that_radius_unless_one_is_given(monkeypatch):
    radii = []

    class Tree(Birch):
        def __init__(self, *, threshold: float, n_clusters: int) -> None:
            radii.append(threshold)
            super().__init__(threshold=threshold, n_clusters=n_clusters)

    monkeypatch.setattr("sklearn.cluster.Birch", Tree)
    rows, _ = groups((60,), noise=1.0)
    cluster(rows, chosen(clusters=2))
    cluster(rows, chosen(clusters=2, cluster_threshold=0.123))
    assert radii == [pytest.approx(leaf_radius(nearest_distances(unit(rows))), rel=1e-6), 0.123]


def test_nearest_distances_are_the_same_when_rows_are_compared_in_blocks():
    rows = np.random.default_rng(0).normal(size=(1301, 3))
    distances = np.linalg.norm(rows[:, None] - rows, axis=2)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_allclose(nearest_distances(rows), distances.min(axis=1), rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------------ many rows


class CountedRows:
    """Rows of a file: what is read at a time is counted."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.most = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, numbers):
        found = self.rows[numbers]
        self.most = max(self.most, len(found))
        return torch.from_numpy(found)


@every_method
def test_of_many_rows_a_sample_and_a_block_are_read_at_a_time_and_groups_are_the_same(method, monkeypatch):
    rows, labels = groups((400, 30, 20), noise=0.3)
    rows[0] = 40 * np.random.default_rng(1).normal(size=24)  # an odd one, where lengths count
    settings = chosen(method, clusters=3, cluster_rounds=3, cluster_sample=60, normalise_features=False)
    whole = cluster(rows, settings)
    monkeypatch.setattr(clustering, "BLOCK_ROWS", 17)
    counted = CountedRows(rows)
    assert cluster(counted, settings) == whole
    assert counted.most == 60
