"""The trainer: transformers' own, with an order of rows and a dropout that hang on the seed and the place alone.

So a training that was interrupted goes on as it would have, and one on several processes has the same rows in the same
batches with the same dropout as one process with micro-batches of that size: the two differ by the order of sums.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from coterie import ranks
from coterie.artifacts import hash_text
from coterie.data.batching import IGNORED, pad

logging.getLogger("transformers.training_args").setLevel(logging.ERROR)  # it warns where one of several works alone

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


WATCHED = ("expert_load", "gate_entropy")
"""What every logged step tells beyond the loss, on average over the layers."""


class GateWatch(TrainerCallback):
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
