"""Choosing adapters by their shots, on plain numbers: ranks, likeness, groups, halving."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.errors import CoterieError
from coterie.experts.adapter_selection import (
    Ranked,
    ShotScores,
    agreement,
    groups,
    halving_rounds,
    log_perplexities,
    ranked,
    similarities,
)
from coterie.lora import Adapter, LoraPair
from tiny import delta

NAN = math.nan


def scores_of(correct, nll, tokens=None) -> ShotScores:
    nll = torch.tensor(nll)
    return ShotScores(torch.tensor(correct), nll, torch.tensor(tokens or [1.0] * nll.shape[1]))


def test_accuracy_counts_only_the_shots_that_can_be_graded():
    found = ranked(["a", "b"], scores_of([[1.0, NAN, 0.0], [1.0, NAN, 1.0]], [[1.0] * 3] * 2))
    assert {one.name: one.accuracy for one in found} == {"a": 0.5, "b": 1.0}


def test_perplexity_is_the_mean_over_shots_of_the_exponential_and_the_sum_weighs_tokens():
    scores = scores_of([[1.0, 1.0]], [[0.0, math.log(3)]], tokens=[5.0, 2.0])
    assert log_perplexities(scores).exp().item() == pytest.approx((1 + 3) / 2)
    assert log_perplexities(scores, "sum").exp().item() == pytest.approx((1 + 9) / 2)


def test_a_summed_perplexity_beyond_what_floats_hold_still_ranks():
    scores = scores_of([[1.0], [1.0]], [[3.0], [2.0]], tokens=[500.0])
    assert log_perplexities(scores, "sum").tolist() == [1500.0, 1000.0]
    assert [one.name for one in ranked(["a", "b"], scores, perplexity_of="sum")] == ["b", "a"]


def test_ranks_by_hand_with_ties():
    """Accuracies 3/4, 1/2, 3/4, 0; perplexities e^.2, e^.1, e^.3, e^.1: equal values share the smaller rank."""
    correct = [[1.0, 1, 1, 0], [1.0, 1, 0, 0], [1.0, 1, 0, 1], [0.0] * 4]
    nll = [[0.2] * 4, [0.1] * 4, [0.3] * 4, [0.1] * 4]
    names = ["a", "b", "c", "d"]
    found = {
        one.name: (one.rank_accuracy, one.rank_perplexity, one.rank_sum)
        for one in ranked(names, scores_of(correct, nll))
    }
    assert found == {"a": (1, 3, 4), "b": (3, 1, 4), "c": (1, 4, 5), "d": (4, 1, 5)}
    assert [one.name for one in ranked(names, scores_of(correct, nll))] == ["b", "a", "d", "c"]  # less perplexed first
    assert [one.name for one in ranked(names, scores_of(correct, nll), by="accuracy")] == ["a", "c", "b", "d"]
    assert [one.name for one in ranked(names, scores_of(correct, nll), by="perplexity")] == ["b", "d", "a", "c"]


def test_where_no_shot_can_be_graded_accuracy_tells_nobody_apart():
    found = ranked(["a", "b"], scores_of([[NAN], [NAN]], [[0.2], [0.1]]))
    assert [(one.name, one.rank_accuracy, math.isnan(one.accuracy)) for one in found] == [
        ("b", 1, True),
        ("a", 1, True),
    ]


@given(st.permutations(range(5)), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=5, max_size=5))
@settings(deadline=None, max_examples=50)
def test_the_order_of_adapters_does_not_matter(order, values):
    names = [f"n{k}" for k in range(5)]
    correct = [[float(k < right) for k in range(2)] for right, _ in values]
    nll = [[float(loss)] * 2 for _, loss in values]
    shuffled = scores_of([correct[k] for k in order], [nll[k] for k in order])
    assert ranked([names[k] for k in order], shuffled) == ranked(names, scores_of(correct, nll))


# --------------------------------------------------------------------------------------------------------- likeness

SHAPES = {"q": (6, 5), "v": (6, 3)}


def random_adapter(seed: int, rank: int = 2, paths: tuple[str, ...] = ("q", "v")) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {path: LoraPair(draw(rank, SHAPES[path][0]), draw(rank, SHAPES[path][1]), 2.0) for path in paths}


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other)))


def test_likeness_of_updates_equals_the_dense_cosines_with_unequal_ranks_and_layers():
    adapters = [random_adapter(0), random_adapter(1, rank=3), random_adapter(2, rank=1, paths=("q",))]
    found = similarities(adapters, "updates").numpy()
    for one, other in itertools.product(range(3), repeat=2):
        paths = {*adapters[one], *adapters[other]}
        cosines = [
            cosine(delta(adapters[one][path]).numpy(), delta(adapters[other][path]).numpy())
            if path in adapters[one] and path in adapters[other]
            else 0.0
            for path in paths
        ]
        assert found[one, other] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert found.diagonal() == pytest.approx([1, 1, 1])


def test_likeness_of_updates_is_blind_to_a_rotation_of_the_factors_and_that_of_factors_is_not():
    first, second = random_adapter(0), random_adapter(1)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(9)))[0]
    turned = {path: LoraPair(turn @ pair.down, turn @ pair.up, pair.scaling) for path, pair in first.items()}
    plain, rotated = similarities([first, second]), similarities([turned, second])
    assert torch.allclose(plain, rotated, atol=1e-5)
    assert not torch.allclose(
        similarities([first, second], "factors"), similarities([turned, second], "factors"), atol=1e-2
    )


def test_likeness_of_factors_is_the_mean_absolute_cosine_of_a_and_b():
    first, second = random_adapter(0), random_adapter(1)
    sides = [
        abs(cosine(one.numpy(), other.numpy()))
        for path in SHAPES
        for one, other in zip(first[path][:2], second[path][:2], strict=True)
    ]
    assert similarities([first, second], "factors")[0, 1].item() == pytest.approx(sum(sides) / 4, abs=1e-5)


def test_an_adapter_that_changes_nothing_is_like_nobody():
    zeros = {path: LoraPair(torch.zeros(1, wide), torch.zeros(1, out)) for path, (wide, out) in SHAPES.items()}
    found = similarities([zeros, random_adapter(0)])
    assert found[0, 1] == 0 and bool(torch.isfinite(found).all())


def test_another_way_to_compare_is_refused():
    with pytest.raises(CoterieError, match="way to compare adapters"):
        similarities([random_adapter(0)], "angles")


# ----------------------------------------------------------------------------------------------------------- groups


def candidate(name: str, rank_sum: int) -> Ranked:
    return Ranked(name, 0.5, 0.1, rank_sum, 0, rank_sum)


LIKENESS = torch.tensor(
    [[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.3, 0.2], [0.1, 0.3, 1.0, 0.8], [0.2, 0.2, 0.8, 1.0]]
)  # a, b are twins, c, d nearly so


def test_groups_by_hand():
    """Pairs by likeness: ac .1, ad .2, bd .2, bc .3, cd .8, ab .9, ranked 1 2 2 4 5 6 and added to the sums."""
    found = groups([candidate(name, rank) for name, rank in zip("abcd", (2, 3, 7, 8), strict=True)], LIKENESS, 2)
    assert [("".join(group.names), group.rank_sum, group.rank_diversity, group.score) for group in found] == [
        ("ac", 9, 1, 10),
        ("ab", 5, 6, 11),
        ("ad", 10, 2, 12),
        ("bd", 11, 2, 13),
        ("bc", 10, 4, 14),
        ("cd", 15, 5, 20),
    ]
    assert found[0].similarity == pytest.approx(0.1)


def test_without_diversity_the_smallest_ranks_win():
    found = groups(
        [candidate(name, rank) for name, rank in zip("abcd", (2, 3, 7, 8), strict=True)], LIKENESS, 2, diverse=False
    )
    assert found[0].names == ("a", "b") and found[0].score == 5


def test_even_groups_fall_to_the_smaller_ranks_then_the_smaller_likeness_then_names():
    level = torch.full((3, 3), 0.5)
    found = groups([candidate(name, 4) for name in "cab"], level, 2)
    assert [group.names for group in found] == [("a", "b"), ("c", "a"), ("c", "b")]


def test_a_group_of_one_has_no_likeness():
    found = groups([candidate("a", 2), candidate("b", 1)], LIKENESS[:2, :2], 1)
    assert [(group.names, group.similarity, group.rank_diversity) for group in found] == [
        (("b",), 0, 1),
        (("a",), 0, 1),
    ]


def test_too_few_candidates_and_too_many_groups_are_told():
    with pytest.raises(CoterieError, match="lower --keep"):
        groups([candidate("a", 1)], LIKENESS[:1, :1], 2)
    with pytest.raises(CoterieError, match="lower --candidates"):
        groups([candidate(str(k), k) for k in range(40)], torch.eye(40), 10)


# ---------------------------------------------------------------------------------------------------------- halving


def test_halving_doubles_the_shots_and_halves_the_adapters():
    assert halving_rounds(40, 20, 5, 8) == [(5, 40), (10, 20), (20, 10)]
    assert halving_rounds(40, 20, 5, 15) == [(5, 40), (10, 20), (20, 15)]
    assert halving_rounds(40, 20, None, 8) == [(20, 40)]
    assert halving_rounds(8, 20, 5, 8) == [(20, 8)]  # nothing to gain
    assert halving_rounds(40, 4, 5, 8) == [(4, 40)]


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 64), st.integers(1, 20))
@settings(deadline=None, max_examples=100)
def test_halving_ends_with_all_shots_and_enough_adapters(adapters, shots, first, least):
    rounds = halving_rounds(adapters, shots, first, least)
    assert rounds[0][1] == adapters and rounds[-1][0] == shots
    assert rounds[-1][1] >= min(least, adapters)
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(rounds))
    before = [0, *(seen for seen, _ in rounds)]
    cost = sum((seen - last) * count for last, (seen, count) in zip(before, rounds, strict=False))
    assert cost <= adapters * shots


def test_agreement_of_rankings():
    assert agreement([1, 2, 3], [10, 20, 30]) == 1
    assert agreement([1, 2, 3], [3, 2, 1]) == -1
    assert agreement([1], [1]) is None
    assert agreement([1, 1], [1, 2]) is None
