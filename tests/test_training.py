"""How a training runs: on which device, in which batches."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn
from transformers import Trainer

import tiny
from coterie.backbone.loading import load_backbone
from coterie.backbone.model import Backbone
from coterie.data.batching import PromptFormat
from coterie.data.examples import load_examples
from coterie.experts.trainer import EMPTY, RowOrder, TrainingCollator, drawn, make_trainer, split_batch
from coterie.experts.training_plan import TrainingPlan
from coterie.settings.groups import ModelSettings
from helpers import table


def trainer_of(backbone: Backbone, folder, **changes) -> Trainer:
    values = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 2, "seed": 0}
    plan = TrainingPlan(**{**values, "report_to": "none", "label": "x", **changes})
    rows = [PromptFormat(backbone.tokenizer).row(example) for example in load_examples(tiny.make_rows(32))]
    return make_trainer(backbone, backbone.model, rows, plan, folder, ExitStack())


# ------------------------------------------------------------------------------------------------------------- batches

BATCHES = table(
    ("divides", 16, 8, 8),
    ("does not divide", 16, 6, 4),
    ("a prime batch", 7, 4, 1),
    ("more than the batch", 4, 8, 4),
    ("one", 16, 1, 1),
)


@pytest.mark.parametrize(("batch", "at_most", "micro"), BATCHES)
def test_a_step_is_taken_on_the_batch_that_was_asked_for(model_folder, tmp_path, batch, at_most, micro):
    assert split_batch(batch, at_most).micro == micro
    backbone = load_backbone(ModelSettings(model=str(model_folder), device="cpu"))
    for parameter in backbone.model.parameters():
        parameter.requires_grad_(True)
    trainer = trainer_of(backbone, tmp_path, batch_size=batch, micro_batch_size=at_most)
    trainer.train()
    assert trainer.state.global_step == -(-32 // batch)
    assert trainer.args.train_batch_size == micro


# ------------------------------------------------------------------------------------------- several processes' batches

SPLITS = table(
    ("halves", 16, 8, 2, 8, 1),
    ("each its own micro-batches", 16, 2, 2, 2, 4),
    ("no whole parts", 16, 8, 3, 6, 1),
    ("fewer rows than processes", 2, 8, 4, 1, 1),
)


@pytest.mark.parametrize(("batch", "at_most", "processes", "micro", "steps"), SPLITS)
def test_every_process_gets_its_part_of_a_batch(batch, at_most, processes, micro, steps):
    split = split_batch(batch, at_most, processes)
    assert (split.micro, split.steps) == (micro, steps)
    assert 0 <= split.micro * split.steps * processes - batch < processes


def dealt(count: int, batch: int, at_most: int, processes: int) -> list[list[list[int]]]:
    """The rows of every step of an epoch, by process, as accelerate deals micro-batches out in turn."""
    split = split_batch(batch, at_most, processes)
    order = RowOrder([5 + n % 7 for n in range(count)], split, seed=3)
    places = list(order)
    assert len(places) == len(order)
    micros = [places[start : start + split.micro] for start in range(0, len(places), split.micro)]
    assert len(micros) % processes == 0
    rounds = [micros[start : start + processes] for start in range(0, len(micros), processes)]
    steps = [rounds[start : start + split.steps] for start in range(0, len(rounds), split.steps)]
    return [
        [[row for micro in own for row in micro if row < count] for own in zip(*step, strict=True)] for step in steps
    ]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize(("count", "batch", "at_most"), [(32, 16, 8), (45, 16, 4), (3, 16, 2), (17, 5, 2)])
def test_a_step_is_taken_on_the_same_rows_however_many_processes_share_it(count, batch, at_most, processes):
    alone = [sorted(row for own in step for row in own) for step in dealt(count, batch, at_most, 1)]
    shared = [sorted(row for own in step for row in own) for step in dealt(count, batch, at_most, processes)]
    assert shared == alone
    assert sorted(row for step in alone for row in step) == list(range(count))


def test_every_epoch_has_an_order_of_its_own_that_the_seed_draws():
    split = split_batch(4, 2)
    orders = {(seed, epoch): RowOrder([3] * 20, split, seed) for seed in (0, 1) for epoch in (0, 1)}
    for (_, epoch), order in orders.items():
        order.set_epoch(epoch)
    found = {key: tuple(order) for key, order in orders.items()}
    assert len(set(found.values())) == 4
    assert tuple(orders[0, 1]) == found[0, 1]


def test_a_place_without_a_row_adds_nothing_to_the_loss(backbone):
    collate = TrainingCollator(backbone.pad_id)
    rows = [PromptFormat(backbone.tokenizer).row(example) for example in load_examples(tiny.make_rows(2))]
    data = [{"input_ids": list(row.ids), "labels": row.labels()} for row in rows]
    for name, value in collate(data).items():
        torch.testing.assert_close(collate([*data, EMPTY])[name], value)
    nothing = backbone.model(**collate([EMPTY, EMPTY]), num_items_in_batch=torch.tensor(7))
    assert float(nothing.loss) == 0


def test_what_a_micro_batch_draws_hangs_on_its_place_alone():
    seeds = {drawn(seed, step, place) for seed in range(3) for step in range(3) for place in range(3)}
    assert len(seeds) == 27
    assert drawn(1, 23) != drawn(12, 3)


# ------------------------------------------------------------------------------------------------------------- devices


@pytest.fixture
def two_gpus(monkeypatch) -> tuple[list[torch.device], list[torch.device]]:
    """A machine that says it has two GPUs, with the base model on the second.

    Return where models were asked to go, and which devices were made current, in turn.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    moves, current = [], []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(Backbone, "device", torch.device("cuda:1"))
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda _self, _model, device: moves.append(device))
    return moves, current


def test_training_stays_on_the_base_models_device_whatever_else_is_there(backbone, tmp_path, two_gpus):
    trainer = trainer_of(backbone, tmp_path)
    device = torch.device("cuda:1")
    moves, current = two_gpus
    assert (moves, current[-1]) == ([device], device)
    assert (trainer.args.device, trainer.accelerator.device, trainer.args.n_gpu) == (device, device, 1)
    assert trainer.args.train_batch_size == 2
    assert not isinstance(trainer._wrap_model(backbone.model), nn.DataParallel)
