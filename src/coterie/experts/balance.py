"""How evenly gates use the experts: load and entropy, the loss that evens them out, the alarm when one takes all."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.backbone.gates import Weighing

COLLAPSE = 0.9
"""A mixture that gives one expert more than this share of all weight is that expert, at the cost of all of them."""


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

    def clear(self) -> None:
        """Forget everything."""
        self.given.zero_()
        self.entropies.zero_()

    def load(self) -> Float[Tensor, "layer expert"]:
        """Return the mean weight of each expert; NaN for a layer that saw no token, as also in `entropy`."""
        return self.given / self._tokens[:, None]

    def entropy(self) -> Float[Tensor, " layer"]:
        """Return the mean entropy of the weights, in nats: 0 where a single expert acts, log E where all act alike."""
        return self.entropies / self._tokens

    @property
    def _tokens(self) -> Float[Tensor, " layer"]:
        return self.given.sum(dim=-1)  # the weights of a token sum to 1


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


def collapsed(load: Mapping[str, Tensor], names: Sequence[str]) -> str | None:
    """Return the name of the expert that gets more than `COLLAPSE` of all weight, on average over the layers, if any.

    Args:
        load: the mean weight of each expert, by module path; for example `TrainedMixture.load`.
        names: of the experts. One alone has nobody to take anything from.
    """
    mean = torch.stack(list(load.values())).mean(dim=0)
    top = int(mean.argmax())
    return names[top] if len(names) > 1 and float(mean[top]) > COLLAPSE else None
