"""The base model with experts weighed inside its layers, by a gate at every layer and token, as it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie import ranks
from coterie.backbone.adding import Adding
from coterie.backbone.gates import Gates, Weighing
from coterie.backbone.loading import Backbone
from coterie.data.batching import IGNORED
from coterie.errors import CoterieError
from coterie.lora import Adapter, LoraPair, StackedPair, add_weighted, stack


@dataclass(frozen=True)
class GateTraining:
    """What is trained beyond the gates, and how.

    Attributes:
        experts: whether the experts are trained too.
        dropout: on the input of the experts, not of the gates.
        balance: coefficient of `balance_loss`, on average over the layers, in the loss; 0: none.
    """

    experts: bool = True
    dropout: float = 0.05
    balance: float = 0.0


GATES_ALONE = GateTraining(experts=False, dropout=0.0)
WATCHED = ("expert_load", "gate_entropy")
"""What every logged step of a training tells of the gates, on average over the layers."""


def changed_paths(adapters: Sequence[Adapter]) -> list[str]:
    """Return the module paths of the layers that some expert changes, in order.

    Raises:
        CoterieError: when there are none.
    """
    paths = sorted({path for adapter in adapters for path in adapter})
    if not paths:
        raise CoterieError("gates weigh what experts change, but none of these changes any layer; add another expert")
    return paths


class Tally(nn.Module):
    """What the gates of all layers gave to every expert, and the entropy of it, summed over tokens.

    Its sums are buffers, so that they stand in checkpoints beside the weights they belong to.
    """

    given: Float[Tensor, "layer expert"]
    entropies: Float[Tensor, " layer"]

    def __init__(self, layers: int, experts: int) -> None:
        """Start at zero."""
        super().__init__()
        self.register_buffer("given", torch.zeros(layers, experts))
        self.register_buffer("entropies", torch.zeros(layers))

    def count(
        self, layer: int, weights: Float[Tensor, "row position expert"], real: Bool[Tensor, "row position"]
    ) -> None:
        """Add the tokens of one forward pass of a layer, those apart that are padding."""
        weights = weights.detach() * real[..., None]
        self.given[layer] += weights.sum(dim=(0, 1))
        self.entropies[layer] += torch.special.entr(weights).sum()

    def add(self, other: "Tally") -> None:
        """Add what another tally of the same layers and experts has counted."""
        self.given += other.given
        self.entropies += other.entropies

    def sum(self) -> None:
        """Add what the tallies of all processes have counted."""
        self.given.copy_(ranks.summed(self.given))
        self.entropies.copy_(ranks.summed(self.entropies))

    def clear(self) -> None:
        """Forget everything."""
        self.given.zero_()
        self.entropies.zero_()

    def load(self) -> Float[Tensor, "layer expert"]:
        """Return the mean weight of each expert; NaN for a layer that saw no token, as also in `entropy`."""
        return self.given / self.given.sum(dim=-1, keepdim=True)  # the weights of a token sum to 1

    def entropy(self) -> Float[Tensor, " layer"]:
        """Return the mean entropy of the weights, in nats: 0 where a single expert acts, log E where all act alike."""
        return self.entropies / self.given.sum(dim=-1)


def balance_loss(weighing: Weighing, real: Bool[Tensor, "row position"]) -> Float[Tensor, ""]:
    """Return E sum_e f_e P_e for one layer: 1 where tokens are spread evenly, E where one expert gets them all.

    f_e is the share that expert e has of the chosen (token, expert) pairs, P_e its mean probability before any choice;
    the gradient comes through P alone (Fedus et al. 2022, "Switch Transformers", arXiv 2101.03961, eq. 4). It is 1 all
    the time, without a gradient, for gates that choose all experts.
    """
    counted = real[..., None]
    pairs = (weighing.chosen & counted).sum(dim=(0, 1))
    probabilities = (weighing.logits.softmax(dim=-1) * counted).sum(dim=(0, 1)) / real.sum()
    return len(pairs) * (pairs / pairs.sum() * probabilities).sum()


class GatedLayer(nn.Module):
    """The gate and the experts' updates of one layer.

    Factors that are trained are the bare ones, PEFT's A and B: the steps of an optimiser depend on where the scaling
    stands. Experts are padded with zeros to one rank. Nothing is learned there: the gradient of each half of zeros has
    the other half as a factor.
    """

    down: Tensor
    up: Tensor
    scalings: Tensor

    def __init__(self, pairs: Sequence[LoraPair | None], gate: Tensor, *, trained: bool) -> None:
        """Copy the gate and the updates, one per expert, of which None does not change the layer.

        The factors are parameters where they are `trained`, as the gate always is.
        """
        super().__init__()
        self._start = tuple(pairs)
        self.gate = nn.Parameter(gate.detach().float().clone())
        scalings = [pair.scaling if pair is not None and trained else 1.0 for pair in pairs]
        bare = [pair and LoraPair(pair.down, pair.bare_up if trained else pair.up) for pair in pairs]
        self.register_buffer("scalings", torch.tensor(scalings)[:, None, None], persistent=False)
        for name, factor in stack(bare)._asdict().items():
            if trained:
                self.register_parameter(name, nn.Parameter(factor))
            else:
                self.register_buffer(name, factor, persistent=False)

    def pairs(self) -> list[LoraPair | None]:
        """Return every expert's update in its own rank, on the CPU."""
        down, up, scalings = (tensor.detach().cpu() for tensor in (self.down, self.up, self.scalings))
        return [
            pair and LoraPair(down[n, : len(pair.down)].clone(), up[n, : len(pair.up)] * scalings[n], pair.scaling)
            for n, pair in enumerate(self._start)
        ]


class _Pass(NamedTuple):
    """What all layers know of a forward pass."""

    gates: Gates
    real: Bool[Tensor, "row position"]
    """Tells tokens from padding."""
    penalties: list[Tensor]
    """What balance costs, layer by layer."""


class GatedModel(nn.Module):
    """The base model with all experts mixed by gates; its parameters are the gates and, optionally, the experts."""

    def __init__(
        self, backbone: Backbone, adapters: Sequence[Adapter], gates: Gates, training: GateTraining = GATES_ALONE
    ) -> None:
        """Copy the experts and the gates."""
        super().__init__()
        self.paths = changed_paths(adapters)
        layers = {
            path: GatedLayer([adapter.get(path) for adapter in adapters], gates.layers[path], trained=training.experts)
            for path in self.paths
        }
        self.mixed = nn.ModuleList(layers.values())
        self.dropout = nn.Dropout(training.dropout)
        self.balance = training.balance
        self.step, self.epoch = (Tally(len(self.paths), len(adapters)) for _ in range(2))
        adding = Adding(backbone.model, {path: partial(self._mix, number) for number, path in enumerate(self.paths)})
        self._held = (backbone, adding, gates, layers)  # hidden from `parameters`
        self.to(backbone.device)

    def gates(self) -> Gates:
        """Return the gates as they are now."""
        _, _, start, layers = self._held
        return replace(start, layers={**start.layers, **{path: layer.gate for path, layer in layers.items()}})

    def adapters(self) -> tuple[Adapter, ...]:
        """Return the experts as they are now, on the CPU."""
        _, _, start, layers = self._held
        pairs = {path: layer.pairs() for path, layer in layers.items()}
        every = range(len(start.experts))
        return tuple({path: pair for path, own in pairs.items() if (pair := own[n]) is not None} for n in every)

    def _mix(self, number: int, out: Tensor, x: Float[Tensor, "row position in"]) -> Float[Tensor, "row position out"]:
        """Add a layer's experts to what it gives, as its gate weighs them."""
        gates, real, penalties = self._pass
        path = self.paths[number]
        layer = self._held[3][path]
        with torch.autocast(x.device.type, enabled=False):  # a choice of experts must not hang on rounding
            weighing = gates.weigh(path, x)
        self.step.count(number, weighing.weights, real)
        if self.balance:
            penalties.append(balance_loss(weighing, real))
        pair = StackedPair(layer.down, layer.up * layer.scalings)
        return add_weighted(out, self.dropout(x.to(pair.down.dtype)), pair, weighing.weights)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **_unused: Tensor,
    ) -> dict[str, Tensor]:
        """Return the mean loss over labelled tokens, and what balance adds; shapes as `TrainingCollator` makes them."""
        backbone, adding, _, _ = self._held
        penalties: list[Tensor] = []
        learns = len(logits_to_keep) > 0  # or one token stands for rows that another process has
        self._pass = _Pass(self.gates(), attention_mask.bool() & learns, penalties)
        with adding():
            hidden = backbone.hidden(input_ids, attention_mask, position_ids)
        logits = backbone.head(hidden[:, logits_to_keep])
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        labelled = (labels != IGNORED).sum()
        if penalties and learns:  # weighed as the mean over tokens is, so that micro-batches add up to one batch
            total = total + labelled * self.balance * torch.stack(penalties).mean()
        return {"loss": total / (labelled if num_items_in_batch is None else num_items_in_batch)}
