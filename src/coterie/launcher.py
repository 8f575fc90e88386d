"""What a launcher says in the environment: which process this is, of how many, how the base model is split."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from coterie.errors import CoterieError, first_line

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
FSDP = "ACCELERATE_USE_FSDP"
READ_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
OTHER_WAYS = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""What else a configuration of accelerate may ask for to split the base model up; none of it was ever tried."""
WITH_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
}
"""What was never tried beside FSDP."""
VARIABLES = (*RANKS, *COUNTS, "LOCAL_RANK", "LOCAL_WORLD_SIZE", FSDP, DEEPSPEED, *OTHER_WAYS)
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
    """Tell whether accelerate's configuration asks for the base model to be sharded: by FSDP, or by stage 3 of ZeRO.

    Raises:
        CoterieError: when it asks for another way to split a model up, or for one of these in a way that is not to be
            had.
    """
    asked = [name for name in (FSDP, *OTHER_WAYS, *WITH_FSDP) if is_true(name)]
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
    return FSDP in asked or (is_true(DEEPSPEED) and _zero_stage() == 3)


def reads_once() -> bool:
    """Tell whether one process of a machine is to read the base model's weights, and give them to the others."""
    return is_true(READ_ONCE) or is_true("ACCELERATE_DEEPSPEED_ZERO3_INIT")


def is_true(name: str) -> bool:
    """Tell whether accelerate has set one of its switches."""
    return os.environ.get(name, "").lower() in ("true", "1")


def _zero_stage() -> int:
    """Return the stage of DeepSpeed's ZeRO that is asked for; below 3 every process holds all frozen weights.

    Raises:
        CoterieError: when weights are to be offloaded, or DeepSpeed's own file cannot be read.
    """
    stage: object = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    offloaded = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        from accelerate.utils.deepspeed import HfDeepSpeedConfig

        try:
            told = HfDeepSpeedConfig(file)
        except (OSError, ValueError, AttributeError) as error:
            raise CoterieError(f"deepspeed_config_file cannot be read: {first_line(error)}") from error
        stage = told.get_value("zero_optimization.stage", 0)
        offloaded = told.get_value("zero_optimization.offload_param.device") or "none"
    if str(stage) not in ("0", "1", "2", "3"):
        raise CoterieError(f"accelerate's configuration asks for stage {stage!r} of ZeRO; give zero_stage from 0 to 3")
    if str(stage) == "3" and offloaded != "none":
        raise CoterieError(
            f"accelerate's configuration asks for weights to be offloaded to {offloaded!r}, which was never tried "
            "here; set offload_param_device: none in it"
        )
    return int(str(stage))


@contextmanager
def hidden(names: Iterable[str]) -> Iterator[None]:
    """Context manager: let nobody see these variables."""
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)
