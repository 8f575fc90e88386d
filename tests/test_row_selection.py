"""Rows chosen from embeddings are those of a slow and obvious choice, in any order of the pool and any blocks."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.nn.functional import normalize

from coterie.data import row_selection
from coterie.data.row_selection import keep_as_published, keep_greedily, select_rows
from coterie.data.row_similarity import density_similarity, hull_similarity, similarity_by
from coterie.settings.groups import GatherRowsSettings
from helpers import unit

RULES = ("max-cosine", "convex-hull", "kde")


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def names(count: int) -> np.ndarray:
    return np.array([f"{number:04}" for number in range(count)], dtype="S4")


def test_a_chain_of_near_rows_keeps_both_ends_greedily_and_one_end_as_published():
    """0 and 20 degrees are near, 20 and 40 are, 0 and 40 are not: only a row that was kept pushes others out."""
    pool, tau, order = at(0, 20, 40), math.cos(math.radians(25)), np.arange(3)
    kept, refused = keep_greedily(pool, order, 3, tau)
    assert (kept.tolist(), refused.tolist()) == ([0, 2], [1])
    kept, refused = keep_as_published(pool, order, 3, tau)
    assert (kept.tolist(), refused.tolist()) == ([0], [1, 2])


def test_the_budget_fills_up_beyond_near_rows_greedily_but_not_as_published():
    pool, shots = at(10, 11, 12, 60, 80), at(0)
    common = {"tau": 0.99, "exclude_tau": 1.0}
    greedy = select_rows(pool, shots, names(5), GatherRowsSettings(budget=2, **common))
    published = select_rows(pool, shots, names(5), GatherRowsSettings(budget=2, dedup="published", **common))
    assert greedy.rows.tolist() == [0, 3] and published.rows.tolist() == [0]
    C, L, N = row_selection.CHOSEN, row_selection.LEFT, row_selection.LIKE_CHOSEN
    assert greedy.outcomes.tolist() == [C, N, N, C, L]
    assert published.outcomes.tolist() == [C, N, L, L, L]


@pytest.mark.parametrize("tile", [1, 1024])
def test_rows_at_the_threshold_stay(tile, monkeypatch):
    """The cosine of 60 degrees is 0.5; that of a row with itself is 1, whatever float32 makes of it."""
    monkeypatch.setattr(row_selection, "TILE", tile)
    assert keep_greedily(at(0, 60), np.arange(2), 2, 0.5).rows.tolist() == [0, 1]
    assert keep_greedily(at(0, 59.9), np.arange(2), 2, 0.5).rows.tolist() == [0]
    same = unit(1, 384, seed=0).repeat(5, 1)
    for keep in (keep_greedily, keep_as_published):
        assert len(keep(same, np.arange(5), 5, 1.0).rows) == 5


def test_equal_rows_go_by_their_keys():
    chosen = [
        select_rows(at(30, 30), at(0), np.array(keys, dtype="S1"), GatherRowsSettings(budget=1)).rows.tolist()
        for keys in (["a", "b"], ["b", "a"])
    ]
    assert chosen == [[0], [1]]


def brute_force(pool, shots, excluded, keys, options: GatherRowsSettings) -> list[int]:
    """One full matrix of everything with everything, and loops over pairs."""
    whole = torch.cat([pool, shots, excluded]).double()
    cosines = (whole @ whole.T).numpy().round(6)
    rows, to_shots = range(len(pool)), cosines[: len(pool), len(pool) : len(pool) + len(shots)]
    forbidden = cosines[: len(pool), len(pool) :].max(axis=1) > options.exclude_tau
    order = sorted((-to_shots[row].max(), keys[row], row) for row in rows if not forbidden[row])
    order = [row for *_, row in order]
    if options.dedup == "published":
        order = order[: options.budget]
        return [row for place, row in enumerate(order) if all(cosines[row, b] <= options.tau for b in order[:place])]
    kept: list[int] = []
    for row in order:
        if len(kept) < options.budget and all(cosines[row, other] <= options.tau for other in kept):
            kept.append(row)
    return kept


@st.composite
def problems(draw):
    """A pool with copies, near copies, rows near to shots and excluded rows, and many ties."""
    seed, width = draw(st.integers(0, 10**6)), draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(seed)
    rows = draw(st.integers(1, 40))
    grid = torch.randint(-2, 3, (rows + 5, width), generator=generator).float()
    grid[grid.abs().sum(dim=1) == 0, 0] = 1
    points = normalize(grid, dim=1)
    points = normalize(points + 0.01 * torch.randint(0, 2, points.shape, generator=generator), dim=1)
    options = GatherRowsSettings(
        budget=draw(st.integers(1, 45)),
        dedup=draw(st.sampled_from(["greedy", "published"])),
        tau=draw(st.sampled_from([0.5, 0.9, 0.99, 1.0])),
        exclude_tau=draw(st.sampled_from([0.9, 0.9999, 1.0])),
        block_rows=draw(st.integers(1, 50)),
    )
    return points[:rows], points[rows : rows + 3], points[rows + 3 :], options


@given(problem=problems(), tile=st.integers(1, 50), order=st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_the_choice_is_that_of_a_full_matrix_in_any_blocks_and_any_order(problem, tile, order: random.Random):
    pool, shots, excluded, options = problem
    keys = names(len(pool))
    wanted = brute_force(pool, shots, excluded, keys, options)
    shuffled = list(range(len(pool)))
    order.shuffle(shuffled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_selection, "TILE", tile)
        plain = select_rows(pool, shots, keys, options, excluded)
        mixed = select_rows(pool[shuffled], shots, keys[shuffled], options, excluded)
    assert plain.rows.tolist() == wanted
    assert [shuffled[row] for row in mixed.rows] == wanted
    assert mixed.outcomes.tolist() == plain.outcomes[shuffled].tolist()
    assert len(wanted) <= options.budget
    assert np.flatnonzero(plain.outcomes == row_selection.CHOSEN).tolist() == sorted(wanted)


def test_every_planted_leak_is_found_among_thousands_of_rows():
    """Copies of 7 shots and 30 excluded rows, with a cosine of about 0.97, stand among 5,000 unrelated rows."""
    pool, shots, excluded = unit(5000, 64, 0), unit(7, 64, 1), unit(30, 64, 2)
    planted = normalize(torch.cat([shots, excluded]) + 0.25 * unit(37, 64, 3), dim=1)
    places = torch.randperm(5000, generator=torch.Generator().manual_seed(4))[:37]
    pool[places] = planted
    found = select_rows(pool, shots, names(5000), GatherRowsSettings(budget=5000, block_rows=300), excluded)
    assert sorted(np.flatnonzero(found.outcomes == row_selection.LIKE_SHOT)) == sorted(places[:7].tolist())
    assert sorted(np.flatnonzero(found.outcomes == row_selection.LIKE_EXCLUDED)) == sorted(places[7:].tolist())
    assert set(found.rows) & set(places.tolist()) == set()
    none = select_rows(pool, shots, names(5000), GatherRowsSettings(budget=5000))
    assert (none.outcomes == row_selection.LIKE_EXCLUDED).sum() == 0 and (none.measured.excluded == -1).all()


class CountedRows:
    """A pool that remembers the most rows that were read at once, and how many in all."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.most, self.total = rows, 0, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which):
        found = self.rows[which]
        self.most, self.total = max(self.most, len(found)), self.total + len(found)
        return found


def test_no_more_than_a_block_is_read_at_once_and_rows_beyond_the_budget_are_read_once():
    pool = CountedRows(unit(3000, 16, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_selection, "TILE", 40)
        select_rows(pool, unit(5, 16, 1), names(3000), GatherRowsSettings(budget=30, tau=1.0, block_rows=100))
    assert pool.most == 100 and pool.total == 3000 + 40


# The rules of similarity.


def hull_by_scipy(point: np.ndarray, corners: np.ndarray) -> float:
    """1 - d^2 / 2 by a general solver."""
    count = len(corners)
    result = minimize(
        lambda weights: ((weights @ corners - point) ** 2).sum(),
        np.full(count, 1 / count),
        jac=lambda weights: 2 * corners @ (weights @ corners - point),
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert result.success
    return 1 - result.fun / 2


@pytest.mark.parametrize(("count", "width"), [(1, 3), (3, 2), (5, 8), (20, 6), (12, 40)])
def test_the_hull_is_as_near_as_a_general_solver_says(count, width):
    shots, rows = unit(count, width, 1).double(), unit(25, width, 2).double()
    rows = normalize(torch.cat([rows, shots[:1], shots.mean(dim=0, keepdim=True)]), dim=1)
    found = hull_similarity(rows @ shots.T, shots @ shots.T)
    wanted = [hull_by_scipy(row.numpy(), shots.numpy()) for row in rows]
    assert found.numpy() == pytest.approx(np.array(wanted), abs=1e-6)


def test_the_hull_of_two_shots_is_a_chord_and_equal_shots_do_no_harm():
    """The chord from 0 to 90 degrees passes the row at 45 degrees at a distance of 1 - sqrt(1/2)."""
    shots = at(0, 0, 90, 90).double()
    found = hull_similarity(at(45, 0, 180).double() @ shots.T, shots @ shots.T)
    wanted = [1 - (1 - math.sqrt(0.5)) ** 2 / 2, 1, 0]
    assert found.numpy() == pytest.approx(np.array(wanted), abs=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 10.0])
def test_the_density_is_the_mean_of_gaussians(gamma):
    shots, rows = (normalize(unit(count, 5, 1).double(), dim=1) for count in (6, 30))
    squares = ((rows[:, None] - shots[None]) ** 2).sum(dim=2)
    wanted = np.exp(-gamma * squares.numpy()).mean(axis=1)
    found = density_similarity(rows @ shots.T, gamma).numpy()
    assert np.exp(2 * gamma * (found - 1)) == pytest.approx(wanted, rel=1e-12)


def test_a_sharp_density_is_the_largest_cosine():
    cosines = unit(30, 5, 2).double() @ unit(6, 5, 1).double().T
    assert density_similarity(cosines, 1e6).numpy() == pytest.approx(cosines.amax(dim=1).numpy(), abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_cosine_where_there_is_one_shot(rule):
    shot, rows = unit(1, 7, 1), unit(20, 7, 2).double()
    cosines = rows @ shot.double().T
    assert similarity_by(rule, shot, 2.0)(cosines).numpy() == pytest.approx(cosines[:, 0].numpy(), abs=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_that_is_asked_for_orders_the_rows(rule):
    pool, shots = unit(200, 4, 1), unit(6, 4, 2)
    options = GatherRowsSettings(budget=200, tau=1.0, exclude_tau=1.0, rule=rule, gamma=3.0)
    found = select_rows(pool, shots, names(200), options)
    cosines = pool.double() @ shots.double().T
    squares = 2 - 2 * cosines.numpy()
    values = {
        "max-cosine": cosines.amax(dim=1).numpy(),
        "kde": np.exp(-3 * squares).mean(axis=1),
        "convex-hull": np.array([hull_by_scipy(row, shots.double().numpy()) for row in pool.double().numpy()]),
    }[rule]
    assert (np.diff(values[found.rows]) <= 1e-5).all()
    orders = {
        name: select_rows(pool, shots, names(200), options.model_copy(update={"rule": name})).rows for name in RULES
    }
    assert sum((orders[name] != found.rows).any() for name in RULES) == 2
