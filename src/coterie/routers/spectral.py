"""Routing inside the model without any training: an expert is known by the inputs that its own update acts on.

Arrow: Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv 2405.11157.
SpectR: Fleshman and Van Durme 2025, "Dynamically Composing LM Experts with Spectral Routing", arXiv 2504.03454.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.gates import Gates
from coterie.backbone.loading import Backbone
from coterie.backbone.prototypes import prototypes
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank
from coterie.lora import Adapter
from coterie.routers.gate import GateRouter

NULL_COSINE = 0.1
"""How similar a token must be to some expert to be kept from the null expert. A random direction in 576 dimensions has
a cosine of 0.03 on average, and the largest of ten such is 0.08."""


def null_floor(gate: Tensor, place: int, cosine: float) -> Float[Tensor, " expert"]:
    """Return what the score of the null expert, at this place, gains for every unit of the input's norm.

    It is `cosine` times the largest score that any expert gives to an input of length 1: that is 1 for Arrow, and the
    largest singular value of all updates for SpectR. The first row of every prototype is its longest.
    """
    floor = torch.zeros(len(gate))
    floor[place] = cosine * gate.reshape(len(gate), -1, gate.shape[-1])[:, 0].norm(dim=-1).max()
    return floor


class SpectralRouter(GateRouter):
    """Weighs experts at every token of the input x of every layer by what their own updates do to x."""

    def __init__(
        self, backbone: Backbone, adapters: Sequence[Adapter], gates: Gates, null: dict[str, Any] | None
    ) -> None:
        """Store the gates; see `spectral_router`, which makes them."""
        super().__init__(backbone, adapters, gates)
        self.kind = gates.score
        self.null = null

    def save(self, folder: Path) -> dict[str, Any]:
        """Return the entry for mixture.json; the gates are computed from the bank again."""
        return {**self._entry(), "null": self.null}


def spectral_router(
    kind: str,
    backbone: Backbone,
    bank: ExpertBank,
    experts: Sequence[str] | None = None,
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
    null: str | None = None,
    null_cosine: float = NULL_COSINE,
) -> SpectralRouter:
    """Make a router from nothing but the experts' updates.

    Args:
        kind: `arrow` (score |x . v|, v the direction that the update acts on most) or `spectr` (score |B A x|).
        backbone: the base model.
        bank: holds the experts.
        experts: names of those that take part; all of the bank by default.
        top_k: experts computed at every token; None for all.
        temperature: what scores are divided by before the softmax; x is not normalised, so its norm acts as well.
        null: an expert without any update that takes over where nothing is similar; it takes part, named or not.
        null_cosine: for `arrow`, the null expert scores highest where no expert's prototype has a cosine to x beyond
            this; for `spectr`, where no update answers x with more than this share of what the strongest one can give.

    Raises:
        CoterieError: for a kind or an expert that does not exist, a null expert with updates, experts that all change
            nothing, or a number out of its range.
    """
    if null is not None:
        _check_null(bank, null, null_cosine)
    names = list(bank.names if experts is None else experts)
    if null is not None and null not in names:
        names.append(null)
    chosen = ExpertBank(tuple(names), tuple(bank.adapters[bank.index(name)] for name in names))
    layers = _gates(kind, chosen.adapters)
    floors = {path: null_floor(gate, chosen.index(null), null_cosine) for path, gate in layers.items()} if null else {}
    gates = Gates(chosen.names, layers, kind, top_k, temperature, floors)
    return SpectralRouter(backbone, chosen.adapters, gates, {"name": null, "cosine": null_cosine} if null else None)


def _gates(kind: str, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    paths = sorted({path for adapter in adapters for path in adapter})
    if not paths:
        raise CoterieError(f"{kind!r} routes by the experts' updates, but none of them changes any layer; add another")
    return {path: prototypes(kind, [adapter.get(path) for adapter in adapters]) for path in paths}


def _check_null(bank: ExpertBank, null: str, cosine: float) -> None:
    if any(bool(pair.up.any()) for pair in bank.adapters[bank.index(null)].values()):
        raise CoterieError(f"the null expert must change nothing, but {null!r} changes layers; name an empty expert")
    if not 0 < cosine <= 1:
        raise CoterieError(f"the null expert's cosine must be above 0 and at most 1, got {cosine}")
