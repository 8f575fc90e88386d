"""The trainer: transformers' own, with an order of rows and a dropout that hang on the seed and the place alone.

So a training that was interrupted goes on as it would have, and one on several processes has the same rows in the same
batches with the same dropout as one process with micro-batches of that size: the two differ by the order of sums.
"""

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from coterie import ranks
from coterie.artifacts import hash_text
from coterie.backbone.loading import Backbone, loaded_by
from coterie.data.batching import IGNORED, TokenRow, pad
from coterie.data.spooled import Chosen
from coterie.errors import CoterieError
from coterie.experts.checkpoint import save_adam
from coterie.experts.fresh_adapter import save_adapter
from coterie.experts.gated_model import WATCHED, GatedModel
from coterie.experts.training_plan import WORKING_FOLDER, TrainingPlan
from coterie.progress import steps

logger = logging.getLogger(__name__)
logging.getLogger("transformers.training_args").setLevel(logging.ERROR)  # it warns where one of several works alone

MAX_GRAD_NORM = 1.0
"""Gradients of a batch are scaled down to this length. No paper here does so, and Adam's saved moments are of these."""
EMPTY: dict[str, list[int]] = {"input_ids": [], "labels": []}
"""A row that stands where a process has no row of a batch: it adds nothing to the loss."""


@dataclass(frozen=True)
class Split:
    """How the rows of one optimiser step are split up.

    Attributes:
        batch: rows of a step.
        micro: rows that go through the model at a time.
        steps: how often, in each process.
        processes: that work together.
    """

    batch: int
    micro: int
    steps: int
    processes: int = 1

    def empty(self, rows: int) -> int:
        """Return how many places are empty where this many rows are dealt out in micro-batches to all processes."""
        return -rows % (self.micro * self.processes)


def split_batch(batch: int, at_most: int, processes: int = 1) -> Split:
    """Split a batch among processes and into micro-batches, the largest that divide a process's part."""
    part = -(-batch // processes)
    micro = max(size for size in range(1, min(at_most, part) + 1) if part % size == 0)
    return Split(batch, micro, part // micro, processes)


def drawn(*numbers: int) -> int:
    """Return a seed that hangs on all of these numbers, such as a run's seed and the place of what is drawn."""
    return int(hash_text(*map(str, numbers))[:15], 16)


class RowOrder(Sampler[int]):
    """Rows of similar length side by side, in an order drawn from the seed and the epoch.

    Accelerate deals micro-batches out to the processes in turn. Where rows end within a round, `len(lengths)` stands in
    the empty places, so that all processes take part in every step.
    """

    def __init__(self, lengths: Sequence[int], split: Split, seed: int) -> None:
        """Store the rows' lengths; the first epoch is 0."""
        self.lengths, self.split, self.seed, self.epoch = list(lengths), split, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order is given next."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.split.batch)
        return len(self.lengths) + full * self.split.empty(self.split.batch) + self.split.empty(rest)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(drawn(self.seed, self.epoch))
        order = get_length_grouped_indices(self.lengths, self.split.batch, generator=generator)
        for start in range(0, len(order), self.split.batch):
            rows = order[start : start + self.split.batch]
            yield from rows
            yield from [len(order)] * self.split.empty(len(rows))


@dataclass(frozen=True)
class TrainingCollator:
    """Pads on the left, so that answers end together, and asks for logits only where some row has a label.

    The output layer is a fifth of a small model; prompts need none of it.
    """

    pad_id: int

    def __call__(self, features: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return model inputs; `labels` stand at the position that predicts them and equal `shift_labels`.

        Empty rows are left out; where there are no others, one token that nothing is learned from stands for them.
        """
        rows = [row for row in features if row["input_ids"]] or [{"input_ids": [self.pad_id], "labels": [IGNORED]}]
        batch = pad([row["input_ids"] for row in rows], self.pad_id, side="left")
        labels = pad([row["labels"] for row in rows], IGNORED, side="left").input_ids
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        positions = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
        kept = targets[:, positions]
        return {**batch._asdict(), "logits_to_keep": positions, "labels": kept, "shift_labels": kept}


class SeededTrainer(Trainer):
    """transformers' trainer; rows in the order of `RowOrder`, dropout drawn for every micro-batch by its place."""

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        rows: Sequence[Mapping[str, list[int]]],
        collate: TrainingCollator,
        split: Split,
        callbacks: list[TrainerCallback],
    ) -> None:
        """Build it for rows of token ids and labels."""
        data: Any = ConcatDataset([cast(Any, rows), cast(Any, [EMPTY])])
        super().__init__(model, arguments, train_dataset=data, data_collator=collate, callbacks=callbacks)
        self._order = RowOrder([len(row["input_ids"]) for row in rows], split, arguments.seed)
        self._split, self._step, self._round = split, -1, 0

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        return self._order

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on one micro-batch; what it draws is the same whichever process has it."""
        if self._step != self.state.global_step:
            self._step, self._round = self.state.global_step, 0
        place = self._round * self._split.processes + ranks.rank()
        self._round += 1
        torch.manual_seed(drawn(self.args.seed, self._step, place))
        return super().training_step(model, inputs, num_items_in_batch)


def make_trainer(
    backbone: Backbone,
    model: nn.Module,
    rows: Sequence[TokenRow],
    plan: TrainingPlan,
    folder: Path,
    stack: ExitStack,
) -> SeededTrainer:
    """Build the trainer of a plan; `model` takes what `TrainingCollator` makes and returns a loss.

    Where several processes work together, each of them takes its part of every batch, and gradients are summed. What
    the training shows lasts until `stack` is left.
    """
    split = split_batch(plan.batch_size, plan.micro_batch_size, ranks.count())
    if ranks.count() > 1:
        told = (plan.label, ranks.count(), split.micro * split.steps, plan.batch_size)
        logger.info("training %s: each of %d processes takes %d of the %d rows of a step", *told)
    arguments = _arguments(backbone, plan, split, folder / WORKING_FOLDER)
    if ranks.count() > 1:  # what is not trained is every process's own: the base model or a part of it, and counts
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        own = [*frozen, *(name for name, _ in model.named_buffers())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
    data: Any = Chosen(rows, range(len(rows)), lambda row: {"input_ids": list(row.ids), "labels": row.labels()})
    collate = TrainingCollator(backbone.pad_id)
    gated = isinstance(model, GatedModel)
    keeper = _GateWatch() if gated else _EpochKeeper(folder, plan, loaded_by(backbone.identity))
    callbacks: list[TrainerCallback] = [_FiniteLoss(), keeper, _Progress(plan.label, stack)]
    trainer = SeededTrainer(model, arguments, data, collate, split, callbacks)
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


class _GateWatch(TrainerCallback):
    """Puts what the gates of a `GatedModel` did since the last entry beside its loss, and adds it up over the epoch."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a new sum."""
        kwargs["model"].epoch.clear()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the averages into the entry of the step, and go on with the next."""
        if "loss" not in (kwargs.get("logs") or {}):
            return
        step, epoch = kwargs["model"].step, kwargs["model"].epoch
        step.sum()
        values = (step.load().nanmean(dim=0).tolist(), float(step.entropy().nanmean()))
        state.log_history[-1].update(zip(WATCHED, values, strict=True))
        epoch.add(step)
        step.clear()


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
