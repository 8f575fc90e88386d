"""Routing by how much each expert has to say: the length of what it adds to one layer, read in one forward pass.

LoGo: Lee et al. 2025, "LoRA on the Go", arXiv 2511.07129. Nothing is trained and no data is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_layers
from coterie.backbone.loading import Backbone
from coterie.backbone.prototypes import PROTOTYPES
from coterie.data.batching import TokenRow, by_length, pad
from coterie.data.devices import on_device
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank
from coterie.routers.base import Router, RouterParts, Routing

LOGO = "logo"
BY_UPDATES = (*PROTOTYPES, LOGO)
"""Routers that a bank alone gives."""
BATCH = 8


class LogoRouter(Router):
    """Weighs experts by |B A x| at the prompt's last token, x the input of the probe: a layer of the last block.

    All experts take part in the pass that x comes from, with even weights. The probe is the first layer there that some
    expert changes: the query's projection, where that is adapted, as in the paper.
    """

    kind = LOGO
    kinds = (LOGO,)
    saved = ("experts",)

    def __init__(self, backbone: Backbone, bank: ExpertBank) -> None:
        """Take the bank's experts.

        Raises:
            CoterieError: when they change no layer.
        """
        self.experts = bank.names
        self._backbone = backbone
        self._layers = ExpertLayers(backbone.model, bank.adapters)
        if not self._layers.paths:
            raise CoterieError(
                f"{LOGO!r} routes by the experts' updates, but none of them changes any layer; add another"
            )
        ordered = [path for path in linear_layers(backbone.model) if path in self._layers.paths]
        places = {id(module): number for number, block in enumerate(backbone.blocks) for module in block.modules()}
        named = dict(backbone.model.named_modules())
        self._probe = max(ordered, key=lambda path: (places.get(id(named[path]), -1), -ordered.index(path)))

    @torch.inference_mode()
    def read(self, prompts: Sequence[TokenRow]) -> Float[Tensor, "row expert"]:
        """Return the length of each expert's output of the probe at every prompt's last token."""
        result = torch.zeros(len(prompts), len(self.experts))
        even = torch.full((1, len(self.experts)), 1 / len(self.experts))
        for numbers in by_length(prompts, BATCH):
            batch = pad([prompts[i].ids for i in numbers], self._backbone.pad_id, device=self._backbone.device)
            kept: list[Tensor] = []

            def keep(path: str, x: Tensor, out: Tensor, kept: list[Tensor] = kept) -> None:
                kept.extend([x] if path == self._probe else [])

            with self._layers.running(self._layers.weighted(even.expand(len(numbers), -1)), watch=keep):
                self._backbone.hidden(*batch)
            last = on_device([len(prompts[i].ids) - 1 for i in numbers], kept[0].device)
            x = kept[0][torch.arange(len(numbers), device=last.device), last].float()
            down, up = self._layers.stack(self._probe)
            added = torch.einsum("ni,eri,ero->neo", x, down.float(), up.float())
            result[numbers] = added.norm(dim=-1).cpu()
        return result

    def weigh(self, read: Float[Tensor, "row expert"]) -> Routing:
        """Weigh by length; evenly where nobody adds anything."""
        total = read.sum(dim=1, keepdim=True)
        weights = torch.where(total > 0, read / total, 1 / len(self.experts))
        return Routing(self.experts, weights, dict(zip(self.experts, read.T, strict=True)))

    @classmethod
    def load(cls, record: Mapping[str, Any], parts: RouterParts) -> "LogoRouter":
        """Take the experts from the bank again."""
        names = tuple(record["experts"])
        adapters = tuple(parts.bank.adapters[parts.bank.index(name)] for name in names)
        return cls(parts.backbone, ExpertBank(names, adapters))
