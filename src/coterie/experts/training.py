"""Training LoRA adapters with `transformers.Trainer`: the base adapter on all data, experts continued from it."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from coterie import ranks
from coterie.artifacts import read_tensors, write_jsonl
from coterie.backbone.loading import Backbone, loaded_by
from coterie.data.batching import TokenRow
from coterie.experts.bank import WEIGHTS_FILE
from coterie.experts.fresh_adapter import check_taken, lora_config, plain_config, save_adapter
from coterie.experts.gated_model import WATCHED, GatedModel
from coterie.experts.training_plan import LOG_FILE, WORKING_FOLDER, TrainingPlan
from coterie.settings.groups import LoraSettings

LOGGED = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def train_adapter(
    backbone: Backbone, rows: Sequence[TokenRow], plan: TrainingPlan, folder: Path, start: Path | LoraSettings
) -> None:
    """Train an adapter into `folder`, a plain PEFT folder, from a fresh start or from another adapter's folder.

    With `plan.keep_epochs`, `folder/epoch-<e>` holds the adapter and Adam's state at the end of every epoch. What an
    interrupted training left in `folder` is used to go on from its last full epoch, and ends with the same numbers.

    Raises:
        CoterieError: when the loss is not finite, or PEFT attaches the other adapter otherwise than it is written.
    """
    import peft

    torch.manual_seed(plan.seed)
    if isinstance(start, LoraSettings):
        model = peft.get_peft_model(backbone.model, lora_config(backbone, start))
    else:
        config = plain_config(start, backbone.model)
        model = peft.PeftModel.from_pretrained(backbone.model, start, is_trainable=True, config=config)
    try:
        if isinstance(start, Path):
            check_taken(model, read_tensors(start / WEIGHTS_FILE))
        with trained(backbone, model, rows, plan, folder):
            save_adapter(model, folder, loaded_by(backbone.identity))
    finally:
        model.unload()
        backbone.model.eval()


@contextmanager
def trained(
    backbone: Backbone, model: nn.Module, rows: Sequence[TokenRow], plan: TrainingPlan, folder: Path
) -> Iterator[None]:
    """Train a model, from its last full epoch in `folder` if there is one, and keep the result in the body.

    The log is left in `folder`, one entry a step, of a `GatedModel` with what its gates did. What an interrupted
    training goes on from is deleted last. The model takes what `TrainingCollator` makes and returns a loss.

    Raises:
        CoterieError: when the loss is not finite.
    """
    from coterie.experts.trainer import make_trainer  # transformers' own takes seconds to load

    working = folder / WORKING_FOLDER
    whole = ranks.by_first(lambda: _whole_checkpoints(working))
    with ExitStack() as stack:
        if ranks.count() == 1:
            stack.enter_context(ranks.alone())  # or transformers would look for the others
        trainer = make_trainer(backbone, model, rows, plan, folder, stack)
        trainer.train(resume_from_checkpoint=whole[-1] if whole else None)
    yield
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in history:  # the trainer counts micro-batches, which are others in several processes
        entry["epoch"] = entry["step"] * plan.epochs / trainer.state.max_steps
    name = plan.label.partition(" (")[0]  # not how many are trained beside it: what is taken over must be the same
    kept = (*LOGGED, *WATCHED) if isinstance(model, GatedModel) else LOGGED
    log = [{"stage": name, **{key: entry[key] for key in kept}} for entry in history]
    write_jsonl(folder / LOG_FILE, log)
    ranks.by_first(lambda: shutil.rmtree(working))


def _whole_checkpoints(working: Path) -> list[str]:
    """Return the checkpoints from which a training can go on, the last one last, and drop the others."""
    checkpoints = sorted(working.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    whole = [path for path in checkpoints if _is_whole(path)]
    for path in set(checkpoints) - set(whole):
        shutil.rmtree(path)
    return [str(path) for path in whole]


def _is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint has its last file, which a process that was killed may have left half written."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
