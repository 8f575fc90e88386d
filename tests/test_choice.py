"""The cheapest that is about as good as the best is chosen: the planted best, or the base among noise."""

import pytest
import torch

from coterie.evaluation.choice import Candidate, chance, choose
from coterie.records.evaluation import LEVEL
from helpers import normal

ROWS = 200
TOKENS = torch.full((ROWS,), 10.0)


def noisy(mean: float, seed: int, spread: float = 0.1) -> torch.Tensor:
    """Losses around a common row difficulty."""
    return 2.0 + normal(ROWS, seed=99).abs() + mean + spread * normal(ROWS, seed=seed)


def test_the_planted_best_is_chosen():
    candidates = [
        Candidate("base", 1.0, noisy(0.0, 1)),
        Candidate("uniform", 2.0, noisy(-0.05, 2)),
        Candidate("planted", 5.0, noisy(-0.2, 3)),
        Candidate("worse", 3.0, noisy(0.1, 4)),
    ]
    found = choose(candidates, TOKENS)
    assert found.chosen == "planted"
    assert [one.candidate.name for one in found.compared] == ["base", "uniform", "worse", "planted"]
    gap = next(one.gap for one in found.compared if one.candidate.name == "planted")
    assert gap.low < -0.2 < gap.high and gap.value == pytest.approx(-0.2, abs=0.03)


@pytest.mark.parametrize("seed", range(10))
def test_among_candidates_that_are_noise_the_base_is_chosen(seed):
    candidates = [Candidate(f"{n}", 1.0 + n, noisy(0.0, 100 * seed + n)) for n in range(8)]
    assert choose(candidates, TOKENS).chosen == "0"


def test_of_two_that_are_as_good_the_cheaper_one_is_chosen_although_it_is_not_the_best():
    cheap = noisy(-0.2, 2)
    candidates = [
        Candidate("base", 1.0, noisy(0.0, 1)),
        Candidate("dear", 5.0, cheap - 0.001 + 0.05 * normal(ROWS, seed=7)),
        Candidate("cheap", 2.0, cheap),
    ]
    means = {one.name: float(one.nll.mean()) for one in candidates}
    found = choose(candidates, TOKENS)
    assert means["cheap"] > min(means.values())
    assert found.chosen == "cheap"


@pytest.mark.parametrize(("share", "chosen"), [(0.85, "dear"), (0.95, "cheap")])
def test_a_cheaper_one_that_is_not_told_apart_has_to_keep_nine_tenths_of_the_gain(share, chosen):
    base = noisy(0.0, 1)
    luck = 0.5 * normal(ROWS, seed=2)
    luck -= luck.mean()
    candidates = [
        Candidate("base", 1.0, base),
        Candidate("cheap", 1.0, base - share * 0.2 + luck),
        Candidate("dear", 5.0, base - 0.2),
    ]
    found = choose(candidates, TOKENS)
    assert {one.candidate.name: one.p for one in found.compared}["cheap"] > 0.3
    assert found.chosen == chosen


def test_rows_weigh_by_their_tokens():
    """`long` is worse on most rows but better on the ones that have nearly all tokens."""
    tokens = torch.where(torch.arange(ROWS) < 60, 100.0, 1.0)
    base = noisy(0.0, 1)
    longer = base + torch.where(torch.arange(ROWS) < 60, -0.2, 0.2) + 0.01 * normal(ROWS, seed=5)
    candidates = [Candidate("base", 1.0, base), Candidate("long", 2.0, longer)]
    assert choose(candidates, tokens).chosen == "long"
    assert choose(candidates, TOKENS).chosen == "base"


def test_the_first_candidate_is_chosen_where_it_is_the_best_whatever_others_cost():
    candidates = [Candidate("base", 1.0, noisy(-0.2, 1)), Candidate("free", 0.5, noisy(0.0, 2))]
    assert choose(candidates, TOKENS).chosen == "base"


def test_many_that_are_nearly_the_best_do_not_hide_that_it_is_better_than_the_base():
    """Twenty sharper and flatter forms of one router are not twenty independent tries."""
    base, best = noisy(0.0, 1, 0.5), noisy(-0.15, 2, 0.5)
    p = chance(best, base, TOKENS)
    assert p < LEVEL < 20 * p  # which Holm's correction would not let pass
    forms = [Candidate(f"form-{n}", 1.5, best + 0.003 + 0.002 * normal(ROWS, seed=50 + n)) for n in range(20)]
    found = choose([Candidate("base", 1.0, base), *forms, Candidate("best", 1.5, best)], TOKENS)
    assert found.chosen == "best"
