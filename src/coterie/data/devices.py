"""Copies to a device that the host does not wait for."""

from typing import Any

import torch
from torch import Tensor

WAITED_FOR = ("mps",)
"""Devices that may read the host's memory after a copy has been asked for."""


def on_device(values: Any, device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:  # noqa: ANN401
    """Copy a tensor of the host, or a list of numbers, to a device, whatever it is still busy with.

    At any other copy torch waits until all that was asked of a GPU before is done. This one returns as soon as the
    memory was read, so that it may be changed then.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return tensor.to(device, dtype, non_blocking=device is not None and device.type not in WAITED_FOR)
