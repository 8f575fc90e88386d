"""The model rows of a batch of requests, with their KV cache: what a plan asks for, fed token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.backbone.cache import make_cache, select_rows
from coterie.backbone.gates import MeanWeights
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone
from coterie.combiners.base import Combiner, RequestRows
from coterie.data.batching import pad
from coterie.routers.base import Routing


@dataclass(frozen=True)
class RowPlan:
    """The model rows of a batch of requests: those of each side by side, request by request."""

    requests: list[RequestRows]

    @cached_property
    def prompts(self) -> tuple[int, ...]:
        """Number of the request that each row runs."""
        return tuple(number for number, own in enumerate(self.requests) for _ in own.votes)

    @cached_property
    def votes(self) -> Float[Tensor, "request row"]:
        """Weights with which the rows' logits sum to a request's."""
        return torch.block_diag(*(own.votes for own in self.requests))


class CachedRows:
    """Rows that have read their requests' texts so far; requests can leave, and their weights can change."""

    def __init__(self, backbone: Backbone, layers: ExpertLayers, combiner: Combiner, routing: Routing) -> None:
        """Plan the rows; nothing has been read yet. The routing has the bank's experts in the bank's order."""
        self._backbone = backbone
        self._layers = layers
        self._combiner = combiner
        self.routing = routing
        self._set(combiner.plan(routing))
        self.gate_weights: Float[Tensor, "request expert"] | None = None
        """Where gates weigh: the weights of the gates' experts, on average over the prompts, once these were read."""
        self._forget()

    def _forget(self) -> None:
        self._cache = make_cache(self._backbone.model.config)
        self._mask = torch.zeros(len(self.plan.prompts), 0, dtype=torch.long, device=self._backbone.device)

    @torch.inference_mode()
    def read(self, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "row position width"]:
        """Feed every request's next tokens, and return the last hidden states at them.

        What is read first may differ in length and is padded on the left; all later pieces have one length.
        """
        pad_id = self._backbone.pad_id
        texts = [tokens[request] for request in self.plan.prompts]
        ids, mask, _ = pad(texts, pad_id, side="left", device=self._backbone.device)
        seen = MeanWeights(mask) if self.routing.gates and not self._mask.shape[1] else None
        start = self._mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([self._mask, mask], dim=1)
        positions = start + (mask.cumsum(dim=1) - 1).clamp(min=0)
        with self._layers.running(self._mix, seen):
            hidden = self._backbone.hidden(ids, self._mask, positions, self._cache)
        if seen is not None and self.routing.gates is not None:
            self.gate_weights = seen.mean()[:, [*map(self.routing.experts.index, self.routing.gates.experts)]]
        return hidden

    def by_request(self, states: Float[Tensor, "row ..."]) -> Float[Tensor, "request ..."]:
        """Put states in the order of the requests, where each has one row."""
        return states

    def keep(self, requests: Sequence[int]) -> None:
        """Go on with these requests, their rows and their part of the cache; one that is named twice becomes two."""
        self.routing = self.routing.take(requests)
        if requests:
            rows = [row for request in requests for row, prompt in enumerate(self.plan.prompts) if prompt == request]
            self._set(self._combiner.plan(self.routing))
            if rows != list(range(len(self._mask))):
                select_rows(self._cache, rows, self._mask.device)
                self._mask = self._mask[rows]

    def change(self, routing: Routing, *, recompute: bool = False) -> None:
        """Go on under other weights: with what was read under the earlier ones, or forgetting it.

        Raises:
            ValueError: when the cache is kept and the new weights run other rows than the earlier ones.
        """
        self.routing = routing
        before = self.plan.prompts
        self._set(self._combiner.plan(routing))
        if recompute:
            self._forget()
        elif self.plan.prompts != before or len(before) != len(self.plan.requests):
            raise ValueError("weights can change only where every request has one row of its own")

    def _set(self, requests: list[RequestRows]) -> None:
        self.plan = RowPlan(requests)
        self._mix = self._layers.mix(requests)
