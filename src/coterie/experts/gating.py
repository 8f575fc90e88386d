"""Training of the gates inside layers, everything else frozen (MoLE as ELREA runs it: arXiv 2404.13628, 2502.00089)."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import set_seed

from coterie.artifacts import write_jsonl
from coterie.backbone.gates import Gates
from coterie.backbone.layers import ExpertLayers, Gated, linear_shapes
from coterie.backbone.loading import Backbone
from coterie.data.batching import IGNORED, TokenRow
from coterie.experts.training import LOG_FILE, TrainingPlan, last_full_checkpoint, logged, make_trainer, progress_of
from coterie.lora import Adapter


class GatedModel(nn.Module):
    """The base model with all experts mixed by gates; the gates are its only parameters."""

    def __init__(self, backbone: Backbone, adapters: Sequence[Adapter]) -> None:
        """Start with gates of zeros, which weigh all experts alike."""
        super().__init__()
        self._held = (
            backbone,
            ExpertLayers(backbone.model, adapters),
        )  # a tuple hides it from `parameters`
        shapes = linear_shapes(backbone.model)
        self.paths = self._held[1].paths
        self.gates = nn.ParameterList(torch.zeros(len(adapters), shapes[path][0]) for path in self.paths)
        self.to(backbone.device)

    def layers(self) -> dict[str, Tensor]:
        """Return every layer's gate, (expert, in), by module path."""
        return dict(zip(self.paths, self.gates, strict=True))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **_: Tensor,
    ) -> dict[str, Tensor]:
        """Return the mean loss over labelled tokens; shapes as `TrainingCollator` makes them."""
        backbone, experts = self._held
        every = range(experts.size)
        choice = Gated(tuple(every), Gates(tuple(map(str, every)), self.layers()))
        with experts.attached(), experts.choosing(choice):
            hidden = backbone.hidden(input_ids, attention_mask, position_ids)
        logits = backbone.head(hidden[:, logits_to_keep])
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}


def train_gates(
    backbone: Backbone, adapters: Sequence[Adapter], rows: Sequence[TokenRow], plan: TrainingPlan, folder: Path
) -> dict[str, Tensor]:
    """Train one gate per adapted layer, (expert, in) each, and return them by module path.

    An interrupted training goes on from its last full epoch in `folder`.

    Raises:
        CoterieError: when the loss is not finite.
    """
    set_seed(plan.seed)
    model = GatedModel(backbone, adapters)
    trainer = make_trainer(backbone, model, rows, plan, folder / "trainer")
    with progress_of(trainer, plan.label):
        trainer.train(resume_from_checkpoint=last_full_checkpoint(folder / "trainer"))
    write_jsonl(folder / LOG_FILE, logged(trainer, plan.label))
    shutil.rmtree(folder / "trainer")
    return {path: gate.detach().cpu() for path, gate in model.layers().items()}
