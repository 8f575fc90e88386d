"""A map of a gathered pool: the examples, the chosen rows and some of the others, laid out in the plane."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from coterie.data.row_selection import CHOSEN, EmbeddedRows

MOST_CHOSEN = 400
MOST_OTHERS = 600
DECIMALS = 4

Places = Sequence[tuple[float, float]]


def drawn_rows(fates: Int[np.ndarray, " row"], keys: Shaped[np.ndarray, " row"]) -> Int[np.ndarray, " drawn"]:
    """Sample the rows to draw: some of the chosen ones, then some of the others, each by the smallest keys.

    Keys are hashes of what the rows say, so the sample is even, and the order of the pool does not change it.

    Args:
        fates: what became of the rows.
        keys: of the rows.
    """
    chosen = fates == CHOSEN
    parts = ((chosen, MOST_CHOSEN), (~chosen, MOST_OTHERS))
    return np.concatenate([_smallest(np.flatnonzero(part), keys, most) for part, most in parts])


def _smallest(rows: Int[np.ndarray, " row"], keys: Shaped[np.ndarray, "..."], most: int) -> Int[np.ndarray, " drawn"]:
    return rows[np.argsort(keys[rows], kind="stable")[:most]]


def lay_out(
    shots: Float[Tensor, "shot dimension"], pool: EmbeddedRows, drawn: Int[np.ndarray, " drawn"]
) -> tuple[Places, Places]:
    """Return the places of the examples and of the drawn rows: their two principal components, each signed by rule.

    Args:
        shots: embeddings of the examples.
        pool: embeddings of the pool, of which the drawn rows alone are read.
        drawn: numbers of those rows.
    """
    from sklearn.decomposition import PCA

    features = torch.cat([shots, pool[drawn]]).double().numpy()
    with np.errstate(invalid="ignore"):  # texts that are all alike vary by 0, of which no share can be told
        layout = PCA(2, svd_solver="full").fit_transform(features)
    places = [(x, y) for x, y in (layout.round(DECIMALS) + 0.0).tolist()]  # adding 0 makes of -0 a plain 0
    return places[: len(shots)], places[len(shots) :]
