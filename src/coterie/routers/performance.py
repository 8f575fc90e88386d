"""Centroids labelled by who did best, not by where rows come from (RouterRetriever, AAAI 2025)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.errors import CoterieError
from coterie.routers.base import Routing
from coterie.routers.centroid import standardised
from coterie.routers.feature import Description, FeatureRouter

Pilots = Mapping[str, Float[Tensor, "pilot dimension"]]
"""Every expert's centroids; an expert that was nowhere the best has none and is not here."""


class PerformanceRouter(FeatureRouter):
    """Routes a prompt by its mean cosine to each expert's pilots, standardised over experts as ELREA does."""

    kind = "performance-centroids"

    def __init__(
        self, description: Description, pilots: Pilots, centre: Float[Tensor, " dimension"] | None = None
    ) -> None:
        """Store the pilots.

        Raises:
            CoterieError: when there are none.
        """
        if not pilots:
            raise CoterieError("performance-labelled centroids need at least one expert with rows it is best on")
        super().__init__(description, centre)
        self.pilots = {name: torch.nn.functional.normalize(rows.float(), dim=-1) for name, rows in pilots.items()}

    def _weigh(self, features: Float[Tensor, "row dimension"]) -> Routing:
        unit = torch.nn.functional.normalize(features, dim=-1)
        cosines = torch.stack([(unit @ rows.T).mean(dim=-1) for rows in self.pilots.values()], dim=-1)
        similarities = dict(zip(self.pilots, cosines.T, strict=True))
        return Routing(tuple(self.pilots), ("request", "expert"), standardised(cosines).softmax(dim=-1), similarities)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the pilots, named by expert, and return the entry for mixture.json."""
        self._write(folder / "pilots.safetensors", {f"pilots.{name}": rows for name, rows in self.pilots.items()})
        return self._entry(experts=list(self.pilots))


def read_pilots(tensors: Mapping[str, Tensor], experts: Sequence[str]) -> Pilots:
    """Return the pilots of `experts`.

    Raises:
        CoterieError: when an expert has none.
    """
    missing = [name for name in experts if f"pilots.{name}" not in tensors]
    if missing:
        raise CoterieError(f"router/pilots.safetensors has no pilots for the expert {missing[0]!r}; fit again")
    return {name: tensors[f"pilots.{name}"] for name in experts}


def make_pilots(
    features: Float[Tensor, "row dimension"], best: Sequence[str], sources: Sequence[str | None]
) -> dict[str, Float[Tensor, "pilot dimension"]]:
    """Average the unit features of rows with one source and one best expert: up to a pilot per source and expert."""
    unit = torch.nn.functional.normalize(features, dim=-1)
    groups: dict[tuple[str, str], list[int]] = {}
    for row, expert in enumerate(best):
        groups.setdefault((expert, sources[row] or ""), []).append(row)
    pilots: dict[str, list[Tensor]] = {}
    for (expert, _), rows in sorted(groups.items()):
        pilots.setdefault(expert, []).append(unit[rows].mean(dim=0))
    return {expert: torch.stack(rows) for expert, rows in pilots.items()}
