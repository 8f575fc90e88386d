"""The strongest directions of rows are their right singular vectors."""

import pytest
import torch

from coterie.features.subspace import strongest_directions
from helpers import normal


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_they_are_the_right_singular_vectors_of_the_largest_singular_values(shape):
    rows = normal(*shape, seed=0)
    _, _, vectors = torch.linalg.svd(rows, full_matrices=False)
    found = strongest_directions(rows, 3)
    torch.testing.assert_close(found @ found.T, torch.eye(3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((found @ vectors[:3].T).abs(), torch.eye(3), rtol=1e-3, atol=1e-3)


def test_directions_without_any_length_are_left_out():
    rows = normal(6, 2, seed=1) @ normal(2, 9, seed=2)
    found = strongest_directions(rows, 5)
    assert found.shape == (2, 9)
    torch.testing.assert_close(rows @ found.T @ found, rows, rtol=1e-4, atol=1e-4)
