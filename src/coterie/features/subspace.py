"""The few directions that most of many gradients lie in."""

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST = 1e-4  # of the largest singular value: below it a direction is rounding


def strongest_directions(rows: Float[Tensor, "row dimension"], rank: int) -> Float[Tensor, "direction dimension"]:
    """Return the right singular vectors of the largest singular values, at most `rank`, as orthonormal rows.

    Those of the Gram matrix of rows or of dimensions, whichever are fewer; directions without any length are left out.
    """
    rows = rows.double()
    if len(rows) > rows.shape[1]:
        squares, vectors = torch.linalg.eigh(rows.T @ rows)
        kept = _large(squares, rank)
        return vectors[:, kept].T.float()
    squares, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = _large(squares, rank)
    return ((vectors[:, kept] / squares[kept].sqrt()).T @ rows).float()


def _large(squares: Float[Tensor, " value"], rank: int) -> Tensor:
    """Return the places of the largest squared singular values, the largest first."""
    order = squares.argsort(descending=True)[:rank]
    return order[squares[order] > SMALLEST**2 * squares[order[0]]]
