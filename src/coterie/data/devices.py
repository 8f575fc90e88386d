"""Copies to a device, and its time, for which the host does not wait."""

import logging
import time
from typing import Any

import torch
from torch import Tensor

from coterie import ranks

logger = logging.getLogger(__name__)

WAITED_FOR = ("mps",)
"""Devices that may read the host's memory after a copy has been asked for."""


def on_device(values: Any, device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ANN401
    """Copy a tensor of the host, or a list of numbers, to a device, whatever it is still busy with.

    At any other copy torch waits until all that was asked of a GPU before is done. This one returns as soon as the
    memory was read, so that it may be changed then.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return tensor.to(device, dtype, non_blocking=device is not None and device.type not in WAITED_FOR)


class Stopwatch:
    """Times what is asked of a device inside a `with`; to be read when the host has waited for something behind it."""

    def __init__(self, device: torch.device) -> None:
        """Begin with nothing timed."""
        self._events = [torch.cuda.Event(enable_timing=True) for _ in "se"] if device.type == "cuda" else []
        self._times: list[float] = []

    def __enter__(self) -> "Stopwatch":
        """Start."""
        self._note()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._note()

    def _note(self) -> None:
        if self._events:
            self._events[len(self._times)].record()
        self._times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """What it took."""
        start, end = self._times
        return self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else end - start


def tell_idle(used: torch.device) -> None:
    """Name the GPUs that a fit leaves idle, and what would use them, where nobody launched several processes."""
    idle = [f"cuda:{number}" for number in range(torch.cuda.device_count()) if number != (used.index or 0)]
    if used.type == "cuda" and idle and ranks.local() is None:
        logger.info("this runs on one GPU; to use %s too, start it with: accelerate launch -m coterie", ", ".join(idle))
