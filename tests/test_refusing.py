"""Requests that cross a run's clusters are made of its rows, and told from them."""

import pytest
import torch

from coterie.data.examples import Example, from_prompt
from coterie.data.forms import Message
from coterie.data.unlike import CROSSING, cross, join
from coterie.features.growing_text import FeatureExtractor
from coterie.methods.elrea.refusing import Seen, UnlikeRows
from coterie.routers.familiarity import Familiarity
from coterie.routers.loss import CrossFitLosses
from helpers import normal

LOSSES = CrossFitLosses(("base",), torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.ones(1))


@pytest.mark.parametrize(
    ("labels", "count"), [([0, 1] * 40, CROSSING), ([0] * 9 + [1], 10), ([0, 1], 2), ([3] * 50, 0)]
)
def test_pairs_are_of_two_clusters_and_all_different(labels, count):
    pairs = cross(labels, 0)
    assert len(pairs) == len(set(pairs)) == count
    assert all(labels[one] != labels[other] for one, other in pairs)
    assert cross(labels, 0) == pairs
    assert count < CROSSING or cross(labels, 1) != pairs


def test_joined_rows_ask_for_both_and_answer_neither():
    asked = (Message("system", "Be kind."), Message("user", "Hi."), Message("assistant", "Hello."))
    first = Example("a", (*asked, Message("user", "2 + 3?"), Message("assistant", "5")), "sums")
    second = Example("b", (Message("system", "Be short."), Message("user", "Who was Nero?"), Message("assistant", "-")))
    both = Message("user", "2 + 3?\n\nWho was Nero?")
    assert join(first, second) == Example("a+b", (*asked, both), "sums")
    assert join(from_prompt("x"), second).instruction == "x\n\nWho was Nero?"


def crossed(kinds: torch.Tensor, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Kinds of joined requests: half of one row and half of the other, and a little of what joined ones share."""
    shared = torch.zeros(kinds.shape[1])
    shared[-1] = 1.0
    return torch.stack([kinds[a] / 2 + kinds[b] / 2 + shared for a, b in pairs])


@pytest.mark.parametrize("known", [True, False])
def test_new_requests_that_cross_clusters_are_told_from_rows_once_some_are_made_of_the_training_rows(known):
    """Two clusters around centres of their own; requests are made of rows of both, the new ones of new rows."""
    labels = [0, 1] * 60
    centres = 6 * torch.eye(2, 32)[torch.tensor(labels)]
    rows, new = (centres + normal(120, 32, seed=seed) for seed in (1, 2))
    pairs = cross(labels, 0) if known else []
    kinds = crossed(rows, pairs) if known else torch.zeros(0, 32)
    numbers = torch.tensor(pairs).float() if known else torch.zeros(0, 2)
    states = torch.zeros(1, 1, 2, 1)
    unlike = UnlikeRows(LOSSES, False, torch.zeros(1, 1), states, normal(1, 32, seed=3), rows, kinds, numbers)
    seen = Seen.of(FeatureExtractor("gradient", lambda prompts: rows, {}), unlike)
    for row in range(8):  # as if it were a new one: no stranger is made of it
        others = [kind for kind, pair in zip(kinds, pairs, strict=True) if row not in pair]
        alone = Familiarity.of(rows, strangers=torch.stack(others) if others else None)
        torch.testing.assert_close(seen.inside[0][row], alone(rows)[row])
    low = seen.inside[0].quantile(0.1)
    answered = [float((seen.familiarity(own) >= low).float().mean()) for own in (new, crossed(new, cross(labels, 1)))]
    assert answered[0] == pytest.approx(0.9, abs=0.06)
    assert answered[1] < 0.05 if known else answered[1] > 0.25
