"""LoraHub: weights found without gradients, and one adapter made of the weighted ones."""

import logging
import math

import numpy as np
import pytest
import torch

from coterie.errors import CoterieError
from coterie.experts.lorahub import SearchPlan, compose, search_weights
from coterie.lora import LoraPair
from tiny import delta

GOAL = (0.9, -0.4, 0.3)


class Bowl:
    """A convex quadratic with its minimum at a goal; it remembers what it was asked."""

    def __init__(self, goal=GOAL):
        self.goal = goal
        self.asked = []

    def __call__(self, weights):
        self.asked.append(list(weights))
        return sum(
            (1 + place) * (w - goal) ** 2 for place, (w, goal) in enumerate(zip(weights, self.goal, strict=True))
        )


@pytest.mark.parametrize("goal", [GOAL, (0.6,), (0.1, -0.2)])
def test_the_minimum_of_a_bowl_is_found_whatever_the_number_of_weights(goal):
    found = search_weights(Bowl(goal), len(goal), SearchPlan(steps=600, penalty=0.0))
    assert found == pytest.approx(goal, abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_the_loss_is_called_at_most_as_often_as_planned_first_at_zeros_and_always_within_bounds(steps, count):
    bowl = Bowl((9.0,) * count)
    found = search_weights(bowl, count, SearchPlan(steps=steps, bound=0.5))
    assert len(bowl.asked) == steps and bowl.asked[0] == [0.0] * count
    assert all(len(weights) == count and max(map(abs, weights)) <= 0.5 for weights in bowl.asked)
    assert found in bowl.asked


def test_a_minimum_beyond_the_bound_is_approached_at_the_bound():
    assert search_weights(Bowl((9.0, -9.0)), 2, SearchPlan(steps=400)) == pytest.approx([1.5, -1.5], abs=0.01)


def test_the_best_weights_that_were_tried_are_returned_and_zeros_where_nothing_is_better():
    bowl = Bowl()
    found = search_weights(bowl, 3, SearchPlan(penalty=0.2))
    assert found == min(bowl.asked, key=lambda w: Bowl()(w) + 0.2 * sum(map(abs, w)) / 3)
    assert search_weights(Bowl((0.0, 0.0)), 2, SearchPlan()) == [0.0, 0.0]


def test_a_converged_search_stops_before_its_steps_are_used_up():
    bowl = Bowl()
    search_weights(bowl, 3, SearchPlan(steps=100_000, penalty=0.0))
    assert 100 < len(bowl.asked) < 2000


def test_the_penalty_is_the_mean_absolute_weight_times_its_strength():
    # (w - 1)^2 + p |w| is least at 1 - p / 2 for one weight; for two, each has half the penalty
    assert search_weights(Bowl((1.0,)), 1, SearchPlan(steps=400, penalty=0.8)) == pytest.approx([0.6], abs=1e-3)
    both = search_weights(lambda w: (w[0] - 1) ** 2 + (w[1] - 1) ** 2, 2, SearchPlan(steps=600, penalty=0.8))
    assert both == pytest.approx([0.8, 0.8], abs=1e-3)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_random_state_alone():
    np.random.seed(1)
    state = np.random.get_state()[1].tobytes()
    found = [search_weights(Bowl(), 3, SearchPlan(seed=seed)) for seed in (0, 0, 7)]
    assert found[0] == found[1] != found[2]
    assert np.random.get_state()[1].tobytes() == state


def test_options_lying_in_the_working_directory_are_not_obeyed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = search_weights(Bowl(), 3, SearchPlan(steps=200))
    (tmp_path / "cma_signals.in").write_text('{"timeout": 0}')
    assert search_weights(Bowl(), 3, SearchPlan(steps=200)) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["cma_signals.in"]


def test_weights_whose_loss_is_no_number_are_passed_over():
    found = search_weights(lambda w: math.nan if w[0] > 0.5 else -w[0], 2, SearchPlan(steps=200, penalty=0.0))
    assert found[0] == pytest.approx(0.5, abs=0.05)
    for broken in (math.nan, math.inf, -math.inf):
        with pytest.raises(CoterieError, match="no weights had a finite loss"):
            search_weights(lambda w, value=broken: value, 2, SearchPlan())


@pytest.mark.parametrize(("count", "steps"), [(0, 40), (2, 0)])
def test_nothing_to_search_is_told(count, steps):
    with pytest.raises(CoterieError, match=f"{count} adapters and {steps} steps leave nothing to search"):
        search_weights(Bowl(), count, SearchPlan(steps=steps))


def pair(seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, 4, generator=generator), torch.randn(rank, 3, generator=generator), 2.0)


def adapters(*ranks):
    return [{"q": pair(n, rank), f"only-{n}": pair(10 + n, rank)} for n, rank in enumerate(ranks)]


def test_one_weight_of_1_gives_exactly_that_adapter():
    bank = adapters(2, 2, 2)
    found = compose(bank, [0.0, 1.0, 0.0], "exact")
    assert torch.allclose(delta(found["q"]), delta(bank[1]["q"]), atol=1e-6)
    assert torch.equal(delta(found["only-1"]), delta(bank[1]["only-1"])) and not delta(found["only-0"]).any()


def test_factors_are_summed_by_weight_on_both_sides_negative_ones_too():
    bank = adapters(2, 2)
    weights = (0.5, -1.25)
    found = compose(bank, weights)
    up = sum(w * adapter["q"].up for w, adapter in zip(weights, bank, strict=True))
    down = sum(w * adapter["q"].down for w, adapter in zip(weights, bank, strict=True))
    assert torch.allclose(delta(found["q"]), up.T @ down, atol=1e-6) and len(found["q"].down) == 2
    assert torch.allclose(delta(found["only-1"]), 1.25**2 * delta(bank[1]["only-1"]), atol=1e-6)
    assert list(found) == ["only-0", "only-1", "q"]


def test_layers_of_different_ranks_are_stacked_exactly_and_told(caplog):
    bank = adapters(2, 3)
    with caplog.at_level(logging.WARNING):
        found = compose(bank, (0.5, -1.25))
    wanted = 0.5 * delta(bank[0]["q"]) - 1.25 * delta(bank[1]["q"])
    assert torch.allclose(delta(found["q"]), wanted, atol=1e-6) and len(found["q"].down) == 5
    assert caplog.messages == ["1 of 3 layers have different ranks and are stacked exactly"]


def test_other_ways_to_merge_are_those_of_the_library():
    assert len(compose(adapters(2, 3), (1.0, 1.0), "svd")["q"].down) == 3
    with pytest.raises(CoterieError, match="needs one rank, got 2, 3; use exact or svd"):
        compose(adapters(2, 3), (1.0, 1.0), "peft-linear")
    with pytest.raises(CoterieError, match="no way to merge is called 'sum'"):
        compose(adapters(2, 2), (1.0, 1.0), "sum")
