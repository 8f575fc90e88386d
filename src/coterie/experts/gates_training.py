"""Training of mixtures whose experts are weighed inside the layers, by a gate at every layer and token.

The experts and their gates together: Yang et al. 2024, "Leveraging Open Knowledge for Advancing Task Expertise in Large
Language Models", arXiv 2408.15915. Its eq. 9 feeds gates with the experts' outputs, its published code with the layer's
input, as is done here. The gates alone: MoLE as ELREA runs it, arXiv 2404.13628 and 2502.00089.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from coterie.backbone.gates import Gates
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.loading import Backbone
from coterie.backbone.prototypes import prototypes
from coterie.data.batching import TokenRow
from coterie.errors import check_known
from coterie.experts.gated_model import GATES_ALONE, GatedModel, GateTraining, changed_paths
from coterie.experts.training import trained
from coterie.experts.training_plan import TrainingPlan
from coterie.lora import Adapter

STARTS = ("zeros", "random", "arrow")
COLLAPSE = 0.9
"""A mixture that gives one expert more than this share of all weight is that expert, at the cost of all of them."""


@dataclass(frozen=True)
class TrainedMixture:
    """What a training made, on the CPU.

    Attributes:
        adapters: float32, every expert in its own ranks and with updates of its own layers only.
        gates: one a layer.
        load: by module path, (expert): its mean weight over all tokens of the last epoch, padding apart; it sums to 1.
        entropy: by module path: the mean entropy of these weights in nats.
    """

    adapters: tuple[Adapter, ...]
    gates: Gates
    load: Mapping[str, Tensor]
    entropy: Mapping[str, float]


def start_gates(
    kind: str, backbone: Backbone, adapters: Sequence[Adapter], names: Sequence[str], *, top_k: int | None, seed: int
) -> Gates:
    """Make the gates that a training starts from, one for every layer that some expert changes.

    Args:
        kind: `zeros` (equal scores: the even mixture, of the first experts where `top_k` leaves some out), `random` (as
            `torch.nn.Linear` starts: what was published), or `arrow` (the prototypes of Arrow and its score |gate . x|;
            an expert without an update in a layer keeps the score 0 there).
        backbone: the base model.
        adapters: one per expert.
        names: of the experts.
        top_k: experts that act at every token; None for all.
        seed: of `random`.

    Raises:
        CoterieError: for another kind, a `top_k` out of its range, or experts that all change nothing.
    """
    check_known("start of gates", kind, STARTS)
    paths = changed_paths(adapters)
    if kind == "arrow":
        layers = {path: prototypes(kind, [adapter.get(path) for adapter in adapters]) for path in paths}
        return Gates(tuple(names), layers, kind, top_k)
    shapes = linear_shapes(backbone.model)
    layers = {path: torch.zeros(len(adapters), shapes[path][0]) for path in paths}
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        for gate in layers.values():
            nn.init.kaiming_uniform_(gate, a=math.sqrt(5), generator=generator)
    return Gates(tuple(names), layers, top_k=top_k)


def train_mixture(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    gates: Gates,
    rows: Sequence[TokenRow],
    plan: TrainingPlan,
    folder: Path,
    training: GateTraining,
) -> TrainedMixture:
    """Train the gates and optionally the adapters, starting from the given ones, of any ranks and layers.

    An interrupted training goes on from its last full epoch in `folder`, where the log is left too, and ends with the
    same numbers. The plan's `keep_epochs` does nothing here.

    Raises:
        CoterieError: when the loss is not finite, or no expert changes any layer.
    """
    torch.manual_seed(plan.seed)
    model = GatedModel(backbone, adapters, gates, training)
    with trained(backbone, model, rows, plan, folder):
        loads, entropies = model.epoch.load().cpu(), model.epoch.entropy().tolist()
        seen = {path: n for n, path in enumerate(model.paths) if bool(loads[n].isfinite().all())}
        gates = model.gates()
        layers = {path: gate.detach() for path, gate in gates.layers.items()}
        return TrainedMixture(
            model.adapters(),
            replace(gates, layers=layers).to(torch.device("cpu")),
            {path: loads[n] for path, n in seen.items()},
            {path: entropies[n] for path, n in seen.items()},
        )


def collapsed(load: Mapping[str, Tensor], names: Sequence[str]) -> str | None:
    """Return the name of the expert that gets more than `COLLAPSE` of all weight, on average over the layers, if any.

    Args:
        load: the mean weight of each expert, by module path; for example `TrainedMixture.load`.
        names: of the experts. One alone has nobody to take anything from.
    """
    mean = torch.stack(list(load.values())).mean(dim=0)
    top = int(mean.argmax())
    return names[top] if len(names) > 1 and float(mean[top]) > COLLAPSE else None


def train_gates(
    backbone: Backbone, adapters: Sequence[Adapter], rows: Sequence[TokenRow], plan: TrainingPlan, folder: Path
) -> dict[str, Tensor]:
    """Train the gates of an even mixture of experts that stay as they are; return them by module path, (expert, in).

    Raises:
        CoterieError: as `train_mixture`.
    """
    names = tuple(map(str, range(len(adapters))))
    gates = start_gates("zeros", backbone, adapters, names, top_k=None, seed=plan.seed)
    return dict(train_mixture(backbone, adapters, gates, rows, plan, folder, GATES_ALONE).gates.layers)
