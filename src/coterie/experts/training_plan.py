"""How an adapter is trained, and what its training logged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.artifacts import read_jsonl

LOG_FILE = "log.jsonl"
WORKING_FOLDER = "trainer"
"""What an interrupted training goes on from, in its folder."""


@dataclass(frozen=True)
class TrainingPlan:
    """One adapter's training.

    Attributes:
        epochs: passes over the rows.
        learning_rate: peak, decaying linearly to 0.
        batch_size: examples per optimiser step.
        micro_batch_size: examples per forward pass.
        seed: of initialisation, order and dropout.
        report_to: tracker known to transformers.
        label: name in progress bars and logs.
        keep_epochs: whether every epoch's adapter and Adam state are kept.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    micro_batch_size: int
    seed: int
    report_to: str
    label: str
    keep_epochs: bool = False


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the losses that a training logged."""
    return read_jsonl(folder / LOG_FILE)
