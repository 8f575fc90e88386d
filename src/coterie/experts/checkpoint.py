"""Adam's state beside an epoch's adapter: what gradients are divided by to describe rows as a training saw them."""

from pathlib import Path

import torch
from torch import nn

from coterie.artifacts import read_floats, write_json, write_tensors
from coterie.experts.bank import KEY_PREFIX, load_adapter
from coterie.features.gradient import AdamState, Checkpoint, Moments
from coterie.records.adapter import AdamRecord
from coterie.records.schema import read

ADAM_TENSORS = "adam.safetensors"
ADAM_RECORD = "adam.json"


def save_adam(model: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float], steps: int, folder: Path) -> None:
    """Write Adam's moments of every factor that is trained, and what its steps were.

    Args:
        model: PEFT's, whose trained parameters are the factors.
        optimizer: whose state is written.
        rates: the learning rates of the steps of this epoch.
        steps: since the training began.
        folder: where the two files go.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = optimizer.state.get(parameter) or {}  # Adam knows nothing yet of what never got a gradient
            plain = name.removeprefix(KEY_PREFIX).removesuffix(".default.weight")
            for moment, kept in (("mean", "exp_avg"), ("square", "exp_avg_sq")):
                tensors[f"{plain}.{moment}"] = state.get(kept, torch.zeros_like(parameter))
    write_tensors(folder / ADAM_TENSORS, tensors)
    group = optimizer.param_groups[0]
    record = {
        "steps": steps,
        "learning_rate": sum(rates) / len(rates),
        "betas": list(group["betas"]),
        "eps": group["eps"],
    }
    write_json(folder / ADAM_RECORD, record)


def load_checkpoint(folder: Path, model: nn.Module) -> Checkpoint:
    """Read an epoch's adapter and Adam state.

    Raises:
        CoterieError: when a file is missing, broken, or does not fit the base model.
    """
    adapter, shapes = load_adapter(folder, model), {}
    for path, pair in adapter.items():
        shapes |= {f"{path}.lora_A": pair.down.shape, f"{path}.lora_B": pair.up.T.shape}
    wanted = {f"{name}.{moment}": shape for name, shape in shapes.items() for moment in ("mean", "square")}
    tensors = read_floats(folder / ADAM_TENSORS, wanted, "fit again")
    record = read(AdamRecord, folder / ADAM_RECORD, "fit again")
    device = next(model.parameters()).device
    moments = {name: Moments(*(tensors[f"{name}.{part}"].to(device) for part in ("mean", "square"))) for name in shapes}
    return Checkpoint(adapter, AdamState(moments, record.steps, record.learning_rate, record.betas, record.eps))
