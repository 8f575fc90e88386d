"""A base model whose blocks are sharded over the processes that work together, by torch's FSDP2.

It does what stage 3 of DeepSpeed's ZeRO asks for, too: both part frozen weights alike, and nothing else is large here.

Every process holds a part of each block's weights, and gets the rest of a block for as long as it runs. Embeddings,
the last norm and the output layer stay whole, since they are used apart from passes through the model; so do adapters,
which are small. Accelerate's configuration is heard where it makes a difference: `fsdp_reshard_after_forward`, and
`fsdp_cpu_ram_efficient_loading`, with which one process of a machine reads the weights and gives them to the others.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from coterie import launcher, ranks
from coterie.backbone.model import Backbone
from coterie.errors import CoterieError

logger = logging.getLogger(__name__)


@contextmanager
def one_reads() -> Iterator[None]:
    """Context manager: let transformers read no weights in a process that gets them from another one."""
    told = {}
    if ranks.is_sharded() and launcher.reads_once():
        told = {launcher.FSDP: "true", launcher.READ_ONCE: "true", "LOCAL_RANK": str(ranks.local())}
    with launcher.hidden(told):
        os.environ.update(told)
        try:
            yield
        finally:
            for name in told:
                del os.environ[name]


def shard(backbone: Backbone, device: torch.device) -> None:
    """Shard the blocks of a model that lies on the CPU, and put all of it on this process's device.

    Raises:
        CoterieError: when another process has trouble, or the model's blocks are not known.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model: Any = backbone.model
    blocks, decoder = backbone.blocks, backbone.decoder
    if not blocks:
        raise CoterieError(
            f"the blocks of {backbone.identity.id} are not known, so it cannot be sharded; leave FSDP or ZeRO-3 out"
        )
    ranks.ready()
    asked = FullyShardedDataParallelPlugin(fsdp_version=2)
    mesh = distributed.init_device_mesh(device.type, (distributed.get_world_size(),))
    how: Any = {"mesh": mesh, "reshard_after_forward": asked.reshard_after_forward}
    for block in blocks:
        if launcher.reads_once():
            _receive(block.modules(), device)
        fully_shard(block, **how)
    if launcher.reads_once():
        inside = {*blocks.modules()}
        _receive([part for part in model.modules() if part not in inside], device)
        model.tie_weights()
    model.to(device)
    whole = {*model.parameters()} - {*blocks.parameters()}
    fully_shard(decoder, ignored_params=whole, **how)
    decoder.register_forward_pre_hook(_refuse_by_itself, prepend=True)
    for block in (part for part in blocks if isinstance(part, FSDPModule)):
        block.unshard()  # first outside inference mode, whose tensors no training could use
        block.reshard()
    weights = [*model.parameters()]
    here = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
    told = here / 1e6, sum(w.numel() for w in weights) / 1e6, sum(w.numel() for w in whole) / 1e6
    logger.info("this process holds %.3fM of the base model's %.3fM weights, of which %.3fM are in no block", *told)


def _refuse_by_itself(decoder: nn.Module, inputs: tuple[Any, ...]) -> None:
    ranks.is_sharded()  # which raises where the others would never run this pass


def _receive(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Give every process what the first one holds in these modules, on its own device."""
    is_first = distributed.get_rank() == 0
    for module in modules:
        for held in (cast(dict[str, Any], module._parameters), cast(dict[str, Any], module._buffers)):
            for name, tensor in held.items():
                if tensor is not None:
                    here = tensor.detach().to(device) if is_first else torch.empty_like(tensor, device=device)
                    distributed.broadcast(here, 0)
                    held[name] = nn.Parameter(here, requires_grad=False) if held is module._parameters else here
