"""How a training runs: on which device, in which batches, in one process."""

import pytest
import torch
from torch import nn
from transformers import Trainer

import tiny
from conftest import write_rows
from coterie import methods
from coterie.backbone.loading import load_backbone
from coterie.backbone.model import Backbone
from coterie.data.batching import PromptFormat
from coterie.data.examples import load_examples
from coterie.errors import CoterieError
from coterie.experts.training import TrainingPlan, make_trainer, micro_batch
from coterie.settings.groups import ModelSettings
from helpers import table


def trainer_of(backbone: Backbone, folder, **changes) -> Trainer:
    values = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 2, "seed": 0}
    plan = TrainingPlan(**{**values, "report_to": "none", "label": "x", **changes})
    rows = [PromptFormat(backbone.tokenizer).row(example) for example in load_examples(tiny.make_rows(32))]
    return make_trainer(backbone, backbone.model, rows, plan, folder, [])


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
    assert micro_batch(batch, at_most) == micro
    backbone = load_backbone(ModelSettings(model=str(model_folder), device="cpu"))
    for parameter in backbone.model.parameters():
        parameter.requires_grad_(True)
    trainer = trainer_of(backbone, tmp_path, batch_size=batch, micro_batch_size=at_most)
    trainer.train()
    assert trainer.state.global_step == -(-32 // batch)
    assert trainer.args.train_batch_size == micro


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


LAUNCHED = table(
    ("torchrun", {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "one of 2"),
    ("torchrun with one process", {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK 0"),
    ("another launcher", {"WORLD_SIZE": "4"}, "one of 4"),
)


@pytest.mark.parametrize(("variables", "message"), LAUNCHED)
def test_training_in_several_processes_is_refused_before_anything_is_loaded(variables, message, tmp_path, monkeypatch):
    data, output = write_rows(tmp_path / "rows.jsonl", tiny.make_rows(6)), tmp_path / "run"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for start in (
        lambda: methods.elrea("no/model", str(data), output=output, device="cpu"),
        lambda: methods.token_level("no/model", {"a": str(data)}, output=output),
        lambda: methods.kshot("no-bank", str(data), output=output),
    ):
        with pytest.raises(CoterieError, match=f"training runs in one process .*{message}"):
            start()
    assert not output.exists()
