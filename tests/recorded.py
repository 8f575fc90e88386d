"""A stand-in for CUDA graphs on a CPU: passes are recorded as operations, and run again without the code that asked."""

from functools import partial
from unittest.mock import patch

import torch
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from coterie.backbone.steps import Pass


def replayed(run: Pass) -> Pass:
    """Record a pass.

    What a CUDA graph keeps is kept: numbers of the host are those of the time when it was recorded, tensors are read
    and written where they were then. A decision of the host on what tensors hold raises, as it does there. Not shown
    are streams, memory that is used anew, and whether a GPU's own operations may be recorded.
    """
    nothing = torch.zeros(1)
    with patch.object(proxy_tensor, "extract_val", lambda *_, **__: None):  # each value's shape, at half of the time
        return partial(make_fx(lambda _: run())(nothing), nothing)
