"""Tables of measured scores find who is good at a cluster or a task, and say nothing where nothing can be told."""

import pytest
import torch

from coterie.features.growing_text import FeatureExtractor
from coterie.routers.loss import CrossFitLosses
from coterie.routers.score_table import Pieces, ScoreTableRouter, fit_table
from helpers import normal, pairs_that_gain_nothing

EXPERTS = ("base", "law", "maths")


def judged(nll: torch.Tensor, tokens: torch.Tensor | None = None) -> CrossFitLosses:
    pairs = pairs_that_gain_nothing(nll)
    return CrossFitLosses(EXPERTS, nll, pairs, torch.ones(len(nll)) if tokens is None else tokens)


def two_tasks(seed: int, gap: float = 0.5) -> tuple[torch.Tensor, CrossFitLosses]:
    """Sixty rows around each of two directions; `law` is better by `gap` on the first, `maths` on the second."""
    features = torch.eye(8)[[0, 1]].repeat_interleave(60, dim=0) + 0.1 * normal(120, 8, seed=seed)
    nll = 2 + 0.1 * normal(120, 3, seed=seed + 1)
    nll[:60, 1] -= gap
    nll[60:, 2] -= gap
    return features, judged(nll)


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_each_task_goes_to_the_expert_that_is_good_at_it(temperature):
    features, losses = two_tasks(0)
    found = fit_table(features, losses, [Pieces(torch.eye(8)[:2], temperature)])
    assert found.table.argmax(dim=1).tolist() == [1, 2] and float(found.table.amax(dim=1).min()) > 0.9
    assert found.expected_nll == pytest.approx(1.5, abs=0.05)  # what the right expert has everywhere


def test_pieces_that_follow_the_tasks_are_chosen_before_others():
    features, losses = two_tasks(0)
    blind, seeing = Pieces(torch.eye(8)[4:6]), Pieces(torch.eye(8)[:2])
    assert fit_table(features, losses, [blind, seeing]).pieces is seeing


def test_where_experts_are_noise_weights_stay_nearly_even_and_nothing_is_expected():
    features, losses = two_tasks(0, gap=0.0)
    found = fit_table(features, losses, [Pieces(torch.eye(8)[:2])])
    assert found.expected_nll == pytest.approx(float(losses.nll.mean()), abs=0.03)


def test_a_row_is_judged_by_tables_without_it():
    """One row whose losses are all there is to tell of its piece: without it the table knows only the others' mean."""
    features = torch.cat([torch.eye(8)[:1].expand(9, -1), torch.eye(8)[1:2]])
    nll = torch.full((10, 3), 2.0)
    nll[9] = torch.tensor([2.0, 5.0, 0.0])
    found = fit_table(features, judged(nll), [Pieces(torch.eye(8)[:2])])
    torch.testing.assert_close(found.weights[9], torch.full((3,), 1 / 3))


def test_a_prompt_between_two_tasks_mixes_their_weights():
    extractor = FeatureExtractor("embedding", lambda rows: torch.zeros(0, 2), {})
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    soft, hard = (
        ScoreTableRouter("lorauter", extractor, Pieces(torch.eye(2), t), table, ["a", "b"]) for t in (1.0, 0.0)
    )
    features = torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    assert soft.weigh(features).weights[0].tolist() == pytest.approx([0.5, 0.5])
    assert soft.weigh(features).weights[1].tolist() == pytest.approx([0.7310586, 0.2689414])  # cosines 1 and 0
    assert hard.weigh(features).weights[1].tolist() == [1.0, 0.0]


def test_the_tables_of_a_run_know_its_clusters_and_its_sources(grid):
    assert len(grid.router("lorauter").table) == 3  # pick, spell, sum
    assert len(grid.router("avengers").table) in (4, 8, 16)
    for name in ("avengers", "lorauter"):
        torch.testing.assert_close(grid.router(name).table.sum(dim=1), torch.ones(len(grid.router(name).table)))
