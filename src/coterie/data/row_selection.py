"""Choosing rows of a large pool that are similar to a few examples and diverse among themselves, on plain arrays.

This is the data step of "Leveraging Open Knowledge for Advancing Task Expertise" (arXiv 2408.15915, algorithm 2). The
pool is read in blocks, and beyond them only a few numbers a row are held. Embeddings have length 1. Their cosines are
float64 and count to six decimals, so neither the order of the pool nor the size of a block changes the result.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from coterie.data.row_similarity import similarity_by
from coterie.settings.groups import GatherRowsSettings

DECIMALS = 6
TILE = 1024
"""Rows that are compared with each other at a time."""

LEFT, CHOSEN, LIKE_SHOT, LIKE_EXCLUDED, LIKE_CHOSEN = range(5)
"""What becomes of a pool row."""


@runtime_checkable
class EmbeddedRows(Protocol):
    """Embeddings by row number: a tensor, or a file that is read in parts."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, rows: slice | Int[np.ndarray, " row"], /) -> Float[Tensor, "row dimension"]:
        """Return the embeddings of some rows."""
        ...


class RowSimilarities(NamedTuple):
    """How pool rows lie to the examples and to the excluded rows."""

    similarity: Float[np.ndarray, " row"]
    """To the examples, by the rule asked for."""
    nearest: Int[np.ndarray, " row"]
    """Number of the example with the largest cosine."""
    cosine: Float[np.ndarray, " row"]
    """That cosine."""
    excluded: Float[np.ndarray, " row"]
    """Largest cosine to an excluded row; -1 where none is excluded."""


@dataclass(frozen=True)
class RowSelection:
    """The result of a selection.

    Attributes:
        rows: numbers of the chosen rows, most similar first.
        outcomes: what became of every row: `LEFT` (beyond the budget), `CHOSEN`, `LIKE_SHOT`, `LIKE_EXCLUDED` or
            `LIKE_CHOSEN` (too near to a chosen row).
        measured: similarities of all rows.
    """

    rows: Int[np.ndarray, " chosen"]
    outcomes: Int[np.ndarray, " row"]
    measured: RowSimilarities


class Deduplicated(NamedTuple):
    """Rows that were kept, in order, and those that were rejected on the way."""

    rows: Int[np.ndarray, " kept"]
    rejected: Int[np.ndarray, " rejected"]


def select_rows(
    pool: EmbeddedRows,
    shots: Float[Tensor, "shot dimension"],
    keys: Shaped[np.ndarray, " row"],
    settings: GatherRowsSettings,
    excluded: Float[Tensor, "excluded dimension"] | None = None,
) -> RowSelection:
    """Choose rows of the pool; time grows linearly with it.

    Rows too near to an example or to an excluded row go first. The others are taken from the most similar on, as
    `settings.dedup` says. Excluded rows are those that must not be found again, such as a test set's. Keys are anything
    that can be sorted and names a row wherever it stands, such as a hash of its content: of rows that are equally
    similar, the one with the smaller key goes first.
    """
    measured = measure_rows(pool, shots, settings, excluded)
    outcomes = np.full(len(pool), LEFT, dtype=np.int8)
    outcomes[measured.excluded > settings.exclude_tau] = LIKE_EXCLUDED
    outcomes[measured.cosine > settings.exclude_tau] = LIKE_SHOT
    candidates = np.flatnonzero(outcomes == LEFT)
    order = candidates[np.lexsort((keys[candidates], -measured.similarity[candidates]))]
    keep = keep_greedily if settings.dedup == "greedy" else keep_as_published
    kept = keep(pool, order, settings.budget, settings.tau)
    outcomes[kept.rows] = CHOSEN
    outcomes[kept.rejected] = LIKE_CHOSEN
    return RowSelection(kept.rows, outcomes, measured)


def measure_rows(
    pool: EmbeddedRows,
    shots: Float[Tensor, "shot dimension"],
    settings: GatherRowsSettings,
    excluded: Float[Tensor, "excluded dimension"] | None = None,
) -> RowSimilarities:
    """Compare every pool row with the examples and the excluded rows, to six decimals."""
    rule = similarity_by(settings.rule, shots, settings.gamma)
    directions = shots.double().T
    similarity, cosine, forbidden = (np.full(len(pool), -1.0) for _ in range(3))
    nearest = np.zeros(len(pool), dtype=np.int32)
    for start in range(0, len(pool), settings.block_rows):
        place = slice(start, start + settings.block_rows)
        block = pool[place].double()
        cosines = block @ directions
        largest, number = cosines.max(dim=1)
        similarity[place], cosine[place], nearest[place] = _rounded(rule(cosines)), _rounded(largest), number.numpy()
        if excluded is not None:
            forbidden[place] = _rounded(largest_cosine(block, excluded))
    return RowSimilarities(similarity, nearest, cosine, forbidden)


def keep_greedily(pool: EmbeddedRows, order: Int[np.ndarray, " row"], budget: int, tau: float) -> Deduplicated:
    """Go through rows in order and keep each whose cosine to all kept before is at most tau, until the budget is full.

    Only rows that can still enter are looked at: the work is (rows looked at) x (rows kept).
    """
    kept: list[np.ndarray] = []
    rejected: list[np.ndarray] = []
    chosen = torch.empty(0, pool[:0].shape[1])
    for start in range(0, len(order), TILE):
        rows = order[start : start + TILE]
        block = pool[rows]
        taken, left_out = _keep_within(block, largest_cosine(block, chosen) > tau + _HALF, tau, budget - len(chosen))
        kept.append(rows[taken])
        rejected.append(rows[left_out])
        chosen = torch.cat([chosen, block[torch.from_numpy(taken)]])
        if len(chosen) == budget:
            break
    return Deduplicated(np.concatenate([order[:0], *kept]), np.concatenate([order[:0], *rejected]))


def keep_as_published(pool: EmbeddedRows, order: Int[np.ndarray, " row"], budget: int, tau: float) -> Deduplicated:
    """Take the first rows up to the budget, and of every pair of them nearer than tau drop the later one.

    So a dropped row still drops others, and fewer rows than the budget remain (arXiv 2408.15915, algorithm 2).
    """
    top = order[:budget]
    dropped = np.zeros(len(top), dtype=bool)
    embeddings = pool[top]
    for start in range(0, len(top), TILE):
        block = embeddings[start : start + TILE]
        near = largest_cosine(block, embeddings[:start]) > tau + _HALF
        within = torch.tril(block.double() @ block.double().T > tau + _HALF, diagonal=-1).any(dim=1)
        dropped[start : start + TILE] = (near | within).numpy()
    return Deduplicated(top[~dropped], top[dropped])


def largest_cosine(
    block: Float[Tensor, "row dimension"], others: Float[Tensor, "other dimension"]
) -> Float[Tensor, " row"]:
    """Return every row's largest cosine to the others, of which a tile is held at a time; -1 where there are none."""
    block = block.double()
    largest = torch.full((len(block),), -1.0, dtype=torch.float64)
    for part in others.split(TILE):
        if len(part):
            largest = torch.maximum(largest, (block @ part.double().T).amax(dim=1))
    return largest


_HALF = 0.5 * 10**-DECIMALS
"""A cosine is above tau to six decimals when it is above tau by more than this."""


def _keep_within(
    block: Float[Tensor, "row dimension"], gone: Bool[Tensor, " row"], tau: float, budget: int
) -> tuple[Int[np.ndarray, " taken"], Int[np.ndarray, " rejected"]]:
    """Keep greedily within a block; `gone` are rows that are rejected already. Rows after a full budget are neither."""
    near = (block.double() @ block.double().T > tau + _HALF).numpy()
    alive = ~gone.numpy()
    taken = []
    seen = len(block)
    for row in range(len(block)):
        if len(taken) == budget:
            seen = row
            break
        if alive[row]:
            taken.append(row)
            alive &= ~near[row]
    numbers = np.array(taken, dtype=np.int64)
    return numbers, np.setdiff1d(np.arange(seen), numbers)


def _rounded(values: Float[Tensor, " row"]) -> Float[np.ndarray, " row"]:
    return values.numpy().round(DECIMALS)
