"""What a launcher says in the environment: which process this is, of how many, how the base model is split."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from coterie.errors import CoterieError

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
FSDP = "ACCELERATE_USE_FSDP"
OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""What else a configuration of accelerate may ask for to split the base model up; none of it was ever tried."""
WITH_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
}
"""What was never tried beside FSDP."""
VARIABLES = (*RANKS, *COUNTS, "LOCAL_RANK", "LOCAL_WORLD_SIZE", FSDP, *OTHER_WAYS)
"""What launchers say in the environment, and libraries look for there."""


def number() -> str | None:
    """Return the number that a launcher gave this process."""
    return next((os.environ[name] for name in RANKS if name in os.environ), None)


def launched() -> tuple[int, int]:
    """Return the number of this process and how many there are, as a launcher says.

    Raises:
        CoterieError: when it says only one of them.
    """
    rank = number()
    total = next((os.environ[name] for name in COUNTS if name in os.environ), "1")
    if not total.isdecimal() or not (rank or "0").isdecimal() or (rank is None and total != "1"):
        raise CoterieError(
            f"WORLD_SIZE is {total!r} and RANK is {rank!r}, so nobody knows which process this is; start it with "
            "accelerate launch -m coterie or torchrun -m coterie"
        )
    return int(rank or 0), int(total)


def wants_sharding() -> bool:
    """Tell whether accelerate's configuration asks for FSDP.

    Raises:
        CoterieError: when it asks for another way to split a model up, or for FSDP in a way that is not to be had.
    """
    asked = [name for name in (FSDP, *OTHER_WAYS, *WITH_FSDP) if os.environ.get(name, "").lower() in ("true", "1")]
    unusable = OTHER_WAYS | (WITH_FSDP if FSDP in asked else {})
    if found := [unusable[name] for name in asked if name in unusable]:
        raise CoterieError(
            f"accelerate's configuration asks for {found[0]}, which was never tried here; choose multi-GPU, or FSDP "
            "version 2 without it"
        )
    if FSDP in asked and os.environ.get("FSDP_VERSION", "1") != "2":
        raise CoterieError(
            "accelerate's configuration asks for version 1 of FSDP; set fsdp_version: 2 in it, or type: accelerate "
            "to-fsdp2 --config_file FILE"
        )
    return FSDP in asked


@contextmanager
def hidden(names: Iterable[str]) -> Iterator[None]:
    """Context manager: let nobody see these variables."""
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)
