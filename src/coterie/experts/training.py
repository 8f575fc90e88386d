"""Training LoRA adapters with `transformers.Trainer`: the base adapter on all data, experts continued from it."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from coterie import ranks
from coterie.artifacts import read_tensors, write_jsonl
from coterie.backbone.loading import Backbone, loaded_by
from coterie.data.batching import TokenRow
from coterie.data.spooled import Chosen
from coterie.errors import CoterieError
from coterie.experts.bank import WEIGHTS_FILE
from coterie.experts.checkpoint import save_adam
from coterie.experts.fresh_adapter import check_taken, lora_config, plain_config, save_adapter
from coterie.experts.trainer import SeededTrainer, Split, TrainingCollator, split_batch
from coterie.experts.training_plan import LOG_FILE, TrainingPlan
from coterie.progress import steps
from coterie.settings.groups import LoraSettings

logger = logging.getLogger(__name__)

LOGGED = ("step", "epoch", "loss", "learning_rate", "grad_norm")
MAX_GRAD_NORM = 1.0
"""Gradients of a batch are scaled down to this length. No paper here does so, and Adam's saved moments are of these."""


def train_adapter(
    backbone: Backbone, rows: Sequence[TokenRow], plan: TrainingPlan, folder: Path, start: Path | LoraSettings
) -> None:
    """Train an adapter into `folder`, a plain PEFT folder, from a fresh start or from another adapter's folder.

    With `plan.keep_epochs`, `folder/epoch-<e>` holds the adapter and Adam's state at the end of every epoch. What an
    interrupted training left in `folder` is used to go on from its last full epoch, and ends with the same numbers.

    Raises:
        CoterieError: when the loss is not finite, or PEFT attaches the other adapter otherwise than it is written.
    """
    set_seed(plan.seed)
    if isinstance(start, LoraSettings):
        model = get_peft_model(backbone.model, lora_config(backbone, start))
    else:
        config = plain_config(start, backbone.model)
        model = PeftModel.from_pretrained(backbone.model, start, is_trainable=True, config=config)
    try:
        if isinstance(start, Path):
            check_taken(model, read_tensors(start / WEIGHTS_FILE))
        keeper = _EpochKeeper(folder, plan, loaded_by(backbone.identity))
        with trained(backbone, model, rows, plan, folder, keeper):
            save_adapter(model, folder, loaded_by(backbone.identity))
    finally:
        model.unload()
        backbone.model.eval()


@contextmanager
def trained(
    backbone: Backbone,
    model: nn.Module,
    rows: Sequence[TokenRow],
    plan: TrainingPlan,
    folder: Path,
    callback: TrainerCallback,
    also: Sequence[str] = (),
) -> Iterator[None]:
    """Train a model, from its last full epoch in `folder` if there is one, and keep the result in the body.

    The log is left in `folder`, one entry a step, with what `also` names of the trainer's own log. What an interrupted
    training goes on from is deleted last. The model takes what `TrainingCollator` makes and returns a loss.

    Raises:
        CoterieError: when the loss is not finite.
    """
    working = folder / "trainer"
    whole = ranks.by_first(lambda: _whole_checkpoints(working))
    with ExitStack() as stack:
        if ranks.count() == 1:
            stack.enter_context(ranks.alone())  # or transformers would look for the others
        trainer = make_trainer(backbone, model, rows, plan, working, [callback, _Progress(plan.label, stack)])
        trainer.train(resume_from_checkpoint=whole[-1] if whole else None)
    yield
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in history:  # the trainer counts micro-batches, which are others in several processes
        entry["epoch"] = entry["step"] * plan.epochs / trainer.state.max_steps
    name = plan.label.partition(" (")[0]  # not how many are trained beside it: what is taken over must be the same
    log = [{"stage": name, **{key: entry[key] for key in (*LOGGED, *also)}} for entry in history]
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


def make_trainer(
    backbone: Backbone,
    model: nn.Module,
    rows: Sequence[TokenRow],
    plan: TrainingPlan,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> SeededTrainer:
    """Build the trainer of a plan; `model` takes what `TrainingCollator` makes and returns a loss.

    Where several processes work together, each of them takes its part of every batch, and gradients are summed.
    """
    split = split_batch(plan.batch_size, plan.micro_batch_size, ranks.count())
    if ranks.count() > 1:
        told = (plan.label, ranks.count(), split.micro * split.steps, plan.batch_size)
        logger.info("training %s: each of %d processes takes %d of the %d rows of a step", *told)
    arguments = _arguments(backbone, plan, split, folder)
    if ranks.count() > 1:  # what is not trained is every process's own: the base model or a part of it, and counts
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        own = [*frozen, *(name for name, _ in model.named_buffers())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
    data: Any = Chosen(rows, range(len(rows)), lambda row: {"input_ids": list(row.ids), "labels": row.labels()})
    collate = TrainingCollator(backbone.pad_id)
    trainer = SeededTrainer(model, arguments, data, collate, split, callbacks=[_FiniteLoss(), *callbacks])
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(backbone: Backbone, plan: TrainingPlan, split: Split, folder: Path) -> TrainingArguments:
    """Tell transformers how a plan is trained, on the one device of the base model."""
    dtype = backbone.model.dtype
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=plan.epochs,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="linear",
        per_device_train_batch_size=split.micro,
        gradient_accumulation_steps=split.steps,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch",  # without weight decay this is the paper's Adam
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=backbone.device.type == "cpu",
        dataloader_pin_memory=backbone.device.type == "cuda",
        seed=plan.seed,
        report_to=plan.report_to,
        run_name=plan.label,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # adapted layers run on every token
    )
    # one device, the base model's: several visible ones would split every batch among copies of the model
    state: Any = arguments.distributed_state
    arguments._n_gpu = 1
    arguments._setup_devices = state.device = backbone.device
    if backbone.device.type == "cuda":  # kernels may be launched on the current device; the arguments chose the first
        torch.cuda.set_device(backbone.device)
    return arguments


class _FiniteLoss(TrainerCallback):
    """Stops a training whose loss is NaN or infinite."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            message = f"the training loss became {loss} at step {state.global_step}"
            kind = ranks.SharedError if ranks.count() > 1 else CoterieError  # the loss is that of all processes
            raise kind(f"{message}; lower --learning-rate or check the data")


@dataclass(eq=False)
class _Progress(TrainerCallback):
    """Tells of every step and its loss, until the stack is left."""

    label: str
    stack: ExitStack
    told: Callable[..., None] | None = None
    note: str = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        label, done = f"training {self.label}", state.global_step
        self.told = self.stack.enter_context(steps(label, state.max_steps, "step", done=done))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.told is not None  # the training has begun
        self.told(1, self.note)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        self.note = self.note if loss is None else f"loss {loss:.3f}"


@dataclass(eq=False)
class _EpochKeeper(TrainerCallback):
    """Keeps the adapter and Adam's state at the end of every epoch, where the plan asks for it."""

    folder: Path
    plan: TrainingPlan
    base: str
    rates: list[float] = field(default_factory=list)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])  # the rate that the coming step uses

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rates, self.rates = self.rates, []
        if not self.plan.keep_epochs or ranks.rank():
            return
        target = self.folder / f"epoch-{round(state.epoch or 0) - 1}"
        temporary = target.with_name("." + target.name)
        shutil.rmtree(temporary, ignore_errors=True)
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # accelerate wraps it
        save_adapter(kwargs["model"], temporary, self.base)
        save_adam(kwargs["model"], optimizer, rates, state.global_step, temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
