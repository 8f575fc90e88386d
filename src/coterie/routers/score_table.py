"""Routing by a table: what each expert is worth on the rows of a cluster, or of a task.

`avengers` clusters embeddings and asks the nearest cluster (Avengers, arXiv 2505.19797, which scores whole models so);
`lorauter` knows tasks by the mean embedding of their rows and asks those that are similar (LORAUTER, arXiv 2601.21795).
Both take the losses of experts on rows that these were not trained on. `ariadne` measures nothing: the clusters of what
each expert was trained on are its own (ARIADNE, arXiv 2606.19079).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import read_floats
from coterie.features.growing_text import FeatureExtractor
from coterie.routers.base import RouterParts, Routing
from coterie.routers.centroid import cosines
from coterie.routers.feature import FeatureRouter, load_extractor
from coterie.routers.loss import SHARPNESSES, CrossFitLosses, folds_of, weigh

AVENGERS, LORAUTER, ARIADNE = "avengers", "lorauter", "ariadne"


class Pieces(NamedTuple):
    """Clusters or tasks: their centroids, and the temperature at which prompts belong to them; at 0 to the nearest."""

    centroids: Float[Tensor, "piece dimension"]
    temperature: float = 0.0

    def __call__(self, features: Float[Tensor, "row dimension"]) -> Float[Tensor, "row piece"]:
        """Return how far every prompt belongs to each piece; together 1."""
        found = cosines(features, self.centroids)
        if not self.temperature:
            return torch.nn.functional.one_hot(found.argmax(dim=-1), len(self.centroids)).float()
        return (found / self.temperature).softmax(dim=-1)


class ScoreTableRouter(FeatureRouter):
    """Weighs experts as the pieces do that a prompt belongs to."""

    kinds = (AVENGERS, LORAUTER, ARIADNE)

    def __init__(
        self,
        kind: str,
        extractor: FeatureExtractor,
        pieces: Pieces,
        table: Float[Tensor, "piece expert"],
        experts: Sequence[str],
        centre: Float[Tensor, " dimension"] | None = None,
    ) -> None:
        """Store the weights of `experts` for prompts of every piece; pieces are around the training mean, if any."""
        super().__init__(extractor, centre)
        self.kind = kind
        self.pieces = pieces
        self.table = table
        self.experts = list(experts)

    def weigh(self, read: Float[Tensor, "row dimension"]) -> Routing:
        """Mix the pieces' weights."""
        return Routing(tuple(self.experts), self.pieces(self._centred(read)) @ self.table)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write centroids and table and return the entry for mixture.json."""
        tensors = {"centroids": self.pieces.centroids, "table": self.table}
        fields = {"experts": self.experts, "temperature": self.pieces.temperature or None}
        return self._save(folder / f"{self.kind}.safetensors", tensors, **fields)

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "ScoreTableRouter":
        """Build it from its entry and its tensors."""
        extractor, kind, names = load_extractor(record, parts), str(record["kind"]), list(record["experts"])
        wanted = {
            "centroids": (None, extractor.dimensions),
            "table": (None, len(names)),
            "centre": (extractor.dimensions,),
        }
        tensors = read_floats(parts.folder / f"{kind}.safetensors", wanted, "fit again", optional=["centre"])
        pieces = Pieces(tensors["centroids"], float(record["temperature"] or 0.0))
        return cls(kind, extractor, pieces, tensors["table"], names, tensors.get("centre"))


class FittedTable(NamedTuple):
    """Pieces and their weights, the weights that tables without a row give it, and the loss that is expected."""

    pieces: Pieces
    table: Float[Tensor, "piece expert"]
    weights: Float[Tensor, "row expert"]
    expected_nll: float


def fit_table(
    features: Float[Tensor, "row dimension"], losses: CrossFitLosses, tried: Iterable[Pieces], *, seed: int = 0
) -> FittedTable:
    """Choose pieces, and how sharply weights follow scores, by the loss of the mixture in cross-validation."""
    fold, best = folds_of(len(features), seed), None
    for pieces in tried:
        shares = pieces(features)
        for sharpness in SHARPNESSES:
            weights = torch.zeros_like(losses.nll)
            for number in fold.unique():
                own = fold == number
                weights[own] = shares[own] @ weigh(_scores(shares, losses, ~own), sharpness)
            nll = losses.mixture_nll(weights)
            expected = float((nll * losses.tokens).sum() / losses.tokens.sum())
            if best is None or expected < best.expected_nll:
                table = weigh(_scores(shares, losses, torch.ones_like(fold).bool()), sharpness)
                best = FittedTable(pieces, table, weights, expected)
    assert best is not None  # something is tried
    return best


def _scores(
    shares: Float[Tensor, "row piece"], losses: CrossFitLosses, counted: Tensor
) -> Float[Tensor, "piece expert"]:
    """Return each piece's mean loss per token of every expert, drawn to that of all rows as by one further row."""
    relative = losses.nll - losses.nll.mean(dim=1, keepdim=True)
    worth = shares[counted] * losses.tokens[counted, None]
    whole = (relative * losses.tokens[:, None])[counted].sum(dim=0) / losses.tokens[counted].sum()
    prior = losses.tokens[counted].mean()
    return (worth.T @ relative[counted] + prior * whole) / (worth.sum(dim=0)[:, None] + prior)
