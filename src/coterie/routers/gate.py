"""Routing inside the model: every adapted layer has a gate that weighs the experts at every token.

Gates are trained (ELREA's MoLE), or computed from the experts' own updates without any training: an expert is known by
the inputs that its update acts on.

Arrow: Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv 2405.11157.
SpectR: Fleshman and Van Durme 2025, "Dynamically Composing LM Experts with Spectral Routing", arXiv 2504.03454.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import read_floats, write_tensors
from coterie.backbone.gates import Gates, MeanWeights
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.loading import Backbone
from coterie.backbone.prototypes import PROTOTYPES, prototypes
from coterie.backbone.row_mix import Gated
from coterie.data.batching import TokenRow, by_length, pad
from coterie.errors import CoterieError, unknown_name
from coterie.experts.bank import ExpertBank
from coterie.lora import Adapter
from coterie.routers.base import Router, RouterParts, Routing

GATE = "gate"
BATCH = 8
LEARNED_SCORES = ("linear", "arrow")
"""Scores of gates with one vector an expert, which is what is trained."""
NULL_COSINE = 0.1
"""How similar a token must be to some expert to be kept from the null expert. A random direction in 576 dimensions has
a cosine of 0.03 on average, and the largest of ten such is 0.08."""


class GateRouter(Router):
    """Weighs experts by every layer's gate, at every token of the layer's input."""

    kinds = (GATE, *PROTOTYPES)
    grain = "layer"

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[Adapter],
        gates: Gates,
        kind: str = GATE,
        null: Mapping[str, Any] | None = None,
    ) -> None:
        """Store the gates.

        Args:
            backbone: the base model.
            adapters: of the gates' experts, in their order.
            gates: one for every layer that some expert changes.
            kind: gate where they were trained; arrow or spectr where the experts' updates give them.
            null: name and cosine of the expert that takes over where nothing is similar, where there is one.

        Raises:
            CoterieError: when a layer has no gate of its width.
        """
        self.kind = kind
        self.null = null
        self.gates = gates.to(backbone.device)
        self._backbone = backbone
        self._layers = ExpertLayers(backbone.model, adapters)
        shapes = linear_shapes(backbone.model)
        for path in self._layers.paths:
            if path not in gates.layers or gates.layers[path].shape[-1] != shapes[path][0]:
                raise CoterieError(f"the layer {path} has no gate of width {shapes[path][0]}; train the gates again")

    def read(self, prompts: Sequence[TokenRow]) -> Float[Tensor, "row expert"]:
        """Run the prompts and return the weights that the gates gave, on average over tokens and layers."""
        weights = torch.zeros(len(prompts), len(self.gates.experts))
        every = tuple(range(len(self.gates.experts)))
        for numbers in by_length(prompts, BATCH):
            ids = [prompts[i].ids for i in numbers]
            batch = pad(ids, self._backbone.pad_id, device=self._backbone.device)
            seen = MeanWeights(batch.attention_mask)
            mix = self._layers.gated(Gated(every, self.gates), len(ids))
            with torch.inference_mode(), self._layers.running(mix, seen):
                self._backbone.hidden(*batch)
            weights[numbers] = seen.mean()
        return weights

    def weigh(self, read: Float[Tensor, "row expert"]) -> Routing:
        """Return the average weights; the gates themselves, which do the work, come along."""
        return Routing(self.gates.experts, read, gates=self.gates)

    def start(self, prompts: Sequence[TokenRow]) -> Routing:
        """Return the gates, with even weights: what they give on average is known once the prompts were read."""
        count = len(self.gates.experts)
        return self.weigh(torch.full((len(prompts), count), 1 / count))

    def save(self, folder: Path) -> dict[str, Any]:
        """Write gates that were trained, rows in the order of the experts, and return the entry for mixture.json."""
        gates = self.gates
        how = {"top_k": gates.top_k, "temperature": gates.temperature}
        entry = {"kind": self.kind, "experts": list(gates.experts), **how}
        if self.kind != GATE:
            return {**entry, "null": self.null}
        write_tensors(folder / "gates.safetensors", gates.layers)
        return {**entry, "score": gates.score}

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "GateRouter":
        """Read trained gates, or compute the others again from the bank, which holds the experts."""
        names, top_k = record["experts"], record.get("top_k")
        how: dict[str, Any] = {
            "top_k": None if top_k is None else int(top_k),
            "temperature": float(record.get("temperature", 1.0)),
        }
        if record["kind"] != GATE:
            if null := record["null"]:
                how |= {"null": str(null["name"]), "null_cosine": float(null["cosine"])}
            return spectral_router(record["kind"], parts.backbone, parts.bank, names, **how)
        adapters = [parts.bank.adapters[parts.bank.index(name)] for name in names]
        shapes = linear_shapes(parts.backbone.model)
        wanted = {path: (len(names), shapes[path][0]) for adapter in adapters for path in adapter}
        layers = read_floats(parts.folder / "gates.safetensors", wanted, "train the gates again")
        gates = read_gates(layers, names, str(record.get("score", "linear")), **how)
        return cls(parts.backbone, adapters, gates)


def read_gates(
    tensors: Mapping[str, Tensor],
    experts: Sequence[str],
    score: str = "linear",
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Gates:
    """Check gates from a file.

    Raises:
        CoterieError: when one is not (expert, in) with finite values, or the score is none that such gates have.
    """
    if score not in LEARNED_SCORES:
        raise unknown_name("score of gates", score, LEARNED_SCORES)
    for path, gate in tensors.items():
        if gate.dim() != 2 or len(gate) != len(experts) or not bool(torch.isfinite(gate).all()):
            raise CoterieError(
                f"router/gates.safetensors: the gate of {path} is {tuple(gate.shape)} for {len(experts)} experts "
                "or holds NaN; train the gates again"
            )
    layers = {path: gate.float() for path, gate in tensors.items()}
    return Gates(tuple(experts), layers, score, top_k, temperature)


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
) -> GateRouter:
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
    if null is not None and any(bool(pair.up.any()) for pair in bank.adapters[bank.index(null)].values()):
        raise CoterieError(f"the null expert must change nothing, but {null!r} changes layers; name an empty expert")
    if null is not None and not 0 < null_cosine <= 1:
        raise CoterieError(f"the null expert's cosine must be above 0 and at most 1, got {null_cosine}")
    names = list(bank.names if experts is None else experts)
    if null is not None and null not in names:
        names.append(null)
    chosen = ExpertBank(tuple(names), tuple(bank.adapters[bank.index(name)] for name in names))
    paths = sorted({path for adapter in chosen.adapters for path in adapter})
    if not paths:
        raise CoterieError(f"{kind!r} routes by the experts' updates, but none of them changes any layer; add another")
    layers = {path: prototypes(kind, [adapter.get(path) for adapter in chosen.adapters]) for path in paths}
    floors = {}
    if null is not None:
        for path, gate in layers.items():
            # The largest score that any expert gives to an input of length 1, by the first, longest row of its
            # prototype: 1 for Arrow, the largest singular value of all updates for SpectR.
            largest = gate.reshape(len(gate), -1, gate.shape[-1])[:, 0].norm(dim=-1).max()
            floors[path] = torch.zeros(len(gate))
            floors[path][chosen.index(null)] = null_cosine * largest
    gates = Gates(chosen.names, layers, kind, top_k, temperature, floors)
    named = {"name": null, "cosine": null_cosine} if null else None
    return GateRouter(backbone, chosen.adapters, gates, kind, named)
