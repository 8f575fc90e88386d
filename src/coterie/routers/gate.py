"""Routing inside the model: every adapted layer has a gate that weighs the experts at every token (ELREA's MoLE)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coterie.artifacts import write_tensors
from coterie.backbone.layers import ExpertLayers, Gated, linear_layers, linear_shapes
from coterie.backbone.loading import Backbone
from coterie.data.batching import TokenRow, by_length, pad
from coterie.errors import CoterieError, unknown_name
from coterie.lora import Adapter
from coterie.routers.base import AXES, Gates, Routing

BATCH = 8
LEARNED_SCORES = ("linear", "arrow")
"""Scores of gates with one vector an expert, which is what is trained."""


class GateRouter:
    """Weighs experts by every layer's gate, at every token of the layer's input."""

    kind = "gate"
    axes = frozenset(AXES)

    def __init__(self, backbone: Backbone, adapters: Sequence[Adapter], gates: Gates) -> None:
        """Store the gates.

        Args:
            backbone: the base model.
            adapters: of the gates' experts, in their order.
            gates: one for every layer that some expert changes.

        Raises:
            CoterieError: when a layer has no gate of its width.
        """
        self.gates = gates.to(backbone.device)
        self._backbone = backbone
        self._layers = ExpertLayers(backbone.model, adapters)
        shapes = linear_shapes(backbone.model)
        for path in self._layers.paths:
            if path not in gates.layers or gates.layers[path].shape[-1] != shapes[path][0]:
                raise CoterieError(f"the layer {path} has no gate of width {shapes[path][0]}; train the gates again")

    def route(self, prompts: Sequence[TokenRow]) -> Routing:
        """Run the prompts and return the weights that the gates gave, on average over tokens and layers.

        Axes (request, expert); the gates themselves, which do the work, come along.
        """
        weights = torch.zeros(len(prompts), len(self.gates.experts))
        for numbers in by_length(prompts, BATCH):
            weights[numbers] = self._means([prompts[i].ids for i in numbers])
        return Routing(self.gates.experts, ("request", "expert"), weights, gates=self.gates)

    @torch.inference_mode()
    def _means(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "row expert"]:
        batch = pad(texts, self._backbone.tokenizer.pad_token_id, device=self._backbone.device)
        every = tuple(range(len(self.gates.experts)))
        seen: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(self._layers.attached())
            stack.enter_context(self._layers.choosing(Gated(every, self.gates)))
            stack.enter_context(self._watching(batch.attention_mask, seen))
            self._backbone.hidden(*batch)
        return torch.stack(seen).mean(dim=0).cpu()

    @contextmanager
    def _watching(self, mask: Tensor, seen: list[Tensor]) -> Iterator[None]:
        """Collect every layer's weights, on average over the tokens that are there."""

        def watch(path: str) -> Any:
            def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                real = mask.to(inputs[0].device)[..., None]
                weights = self.gates.weights(path, inputs[0]) * real
                seen.append((weights.sum(dim=1) / real.sum(dim=1)).to(mask.device))

            return keep

        modules = linear_layers(self._backbone.model)
        handles = [modules[path].register_forward_pre_hook(watch(path)) for path in self._layers.paths]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the gates, rows in the order of the experts, and return the entry for mixture.json."""
        write_tensors(folder / "gates.safetensors", self.gates.layers)
        return {**self._entry(), "score": self.gates.score}

    def _entry(self) -> dict[str, Any]:
        gates = self.gates
        return {
            "kind": self.kind,
            "experts": list(gates.experts),
            "top_k": gates.top_k,
            "temperature": gates.temperature,
        }


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
