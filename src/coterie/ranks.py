"""Several processes that do one command together, as `accelerate launch` or torchrun starts them: who does what.

All of them run the same code. Work that can be shared out is (`spread`, `share`), what is one is made by the first
process (`by_first`), and each of these ends when all are there, so that none reads what another has not written yet. A
process that nobody started beside others is the first of one, and all of this costs it nothing.

What they tell each other is JSON and numbers, over gloo, on the CPU: nothing is pickled.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from coterie.errors import CoterieError, first_line

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
SPLITTING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What a configuration of accelerate may ask for that splits the base model up."""
LAUNCHER = (*RANKS, *COUNTS, "LOCAL_RANK", "LOCAL_WORLD_SIZE", *SPLITTING)
"""What launchers say in the environment, and libraries look for there."""
PATIENCE = timedelta(days=7)
"""How long a process waits for others that have longer work; one that is gone is noticed at once, by its connection."""
GONE = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What an error says when another process can no longer be reached."""

FEW = 12
"""Tasks that are named where it is said who does which; of more, the numbers are."""

Item = TypeVar("Item")


class SharedError(CoterieError):
    """Trouble that all processes know of, so that the first one tells it for all."""


@dataclass(frozen=True)
class _Processes:
    """The processes that work together at present.

    Attributes:
        rank: the number of this one among them.
        count: how many they are.
        group: over which they tell each other things (a `torch.distributed.ProcessGroup`).
        is_quiet: whether another process tells what all of them do, also while this one works alone.
        local: its number among those of its machine; None where nobody started others.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    is_quiet: bool = False
    local: int | None = None


_NOW: ContextVar[_Processes] = ContextVar("_NOW", default=_Processes())  # noqa: B039 - it is frozen


def rank() -> int:
    """Return this process's number; the first one, 0, writes what is one."""
    return _NOW.get().rank


def count() -> int:
    """Return how many processes work together."""
    return _NOW.get().count


def is_quiet() -> bool:
    """Tell whether another process says what all of them do, so that this one shows nothing but its own trouble."""
    number = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    return _NOW.get().is_quiet or number != "0"


def local() -> int | None:
    """Return this process's number among those of its machine, which is that of its GPU; None where it is alone."""
    return _NOW.get().local


def launched() -> tuple[int, int]:
    """Return the number of this process and how many there are, as a launcher says.

    Raises:
        CoterieError: when it says only one of them.
    """
    number = next((os.environ[name] for name in RANKS if name in os.environ), None)
    total = next((os.environ[name] for name in COUNTS if name in os.environ), "1")
    if not total.isdecimal() or not (number or "0").isdecimal() or (number is None and total != "1"):
        raise CoterieError(
            f"WORLD_SIZE is {total!r} and RANK is {number!r}, so nobody knows which process this is; start it with "
            "accelerate launch -m coterie or torchrun -m coterie"
        )
    return int(number or 0), int(total)


@contextmanager
def alone() -> Iterator[None]:
    """Do the body as one process that nobody started beside others; libraries see no launcher either."""
    token = _NOW.set(replace(_NOW.get(), rank=0, count=1, group=None))
    hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
        _NOW.reset(token)


@contextmanager
def joined() -> Iterator[None]:
    """Do the body together with all processes that were launched, if there are others.

    Raises:
        CoterieError: when they cannot be reached, one of them has ended, or the launcher asks to split the model up.
    """
    if count() > 1:
        yield
        return
    number, total = launched()
    if split := [name for variable, name in SPLITTING.items() if os.environ.get(variable, "").lower() == "true"]:
        raise CoterieError(
            f"accelerate's configuration asks for {split[0]}, which splits the base model up, but gradient features "
            "and routing need it whole in every process; choose multi-GPU without it in accelerate config, and add "
            "--load-in-4bit where the model is too large"
        )
    if total == 1:
        with alone():
            yield
        return
    with _connected(number, total) as group:
        token = _NOW.set(_Processes(number, total, group, number > 0, int(os.environ.get("LOCAL_RANK", number))))
        try:
            logger.info("%d processes do this together", total)
            yield
        except SharedError:
            raise
        except CoterieError as error:
            if number:  # nobody else knows of it
                logger.error("error: process %d of %d: %s", number, total, error)
            raise
        except RuntimeError as error:
            if not any(sign in str(error) for sign in GONE):
                raise
            message = f"process {number} of {total} has lost another one, which says why it ended"
            raise SharedError(f"{message}; the same command goes on where it stopped") from error
        finally:
            _NOW.reset(token)


def by_one(load: Callable[[Any], Item]) -> Callable[[Callable[..., Item]], Callable[..., Item]]:
    """Make a function of settings one that the first process does alone; the others wait, and `load` what it made."""

    def decorate(do: Callable[..., Item]) -> Callable[..., Item]:
        @wraps(do)
        @joined()
        def done(settings: Any, *more: Any) -> Item:
            if count() == 1:
                return do(settings, *more)
            logger.info("%s is done by one of the %d processes alone", settings.command, count())
            made: list[Item] = []
            by_first(lambda: made.append(do(settings, *more)))
            return made[0] if made else load(settings)

        return done

    return decorate


@contextmanager
def _connected(number: int, total: int) -> Iterator[Any]:
    """Give a group over which processes tell each other things; what is there already is used, and stays."""
    from torch import distributed

    was_there = distributed.is_initialized()
    try:
        if not was_there:
            distributed.init_process_group(rank=number, world_size=total)
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise CoterieError(
            f"process {number} of {total} cannot reach the others ({first_line(error)}); start all with "
            "accelerate launch -m coterie or torchrun -m coterie"
        ) from error
    yield group
    if not was_there:  # after an error it might wait for those who are gone
        distributed.destroy_process_group()


def wait() -> None:
    """Wait until all processes are here."""
    _told(None)


def by_first(make: Callable[[], Any]) -> Any:  # whatever JSON holds
    """Let the first process make something when all are here, and tell what it made, or why it could not.

    Raises:
        CoterieError: the first process's.
    """
    if count() == 1:
        return make()
    wait()
    value, trouble = None, None
    if rank() == 0:
        try:
            with alone():
                value = make()
        except CoterieError as error:
            trouble = error
    value, message = _told([value, None if trouble is None else str(trouble)])[0]
    if message is not None:
        raise SharedError(message) from trouble
    return value


def each(make: Callable[[], Item]) -> Item:
    """Let every process make something for itself; all go on if none of them has trouble.

    Raises:
        CoterieError: the trouble of the first that has some.
    """
    if count() == 1:
        return make()
    made, trouble = None, None
    try:
        with alone():
            made = make()
    except CoterieError as error:
        trouble = error
    for number, message in enumerate(_told(None if trouble is None else str(trouble))):
        if message is not None:
            place = f"process {number} of {count()}: " if number else ""
            raise SharedError(place + message) from trouble
    return made  # pyrefly: ignore[bad-return] - it was made, or this process would have had trouble


def check_same(facts: Mapping[str, str]) -> None:
    """Refuse to work together on things that are not the same everywhere.

    Raises:
        CoterieError: naming the first thing in which a process differs from the first one.
    """
    first, *others = _told(dict(facts))
    for number, own in enumerate(others, start=1):
        different = [name for name in first if own.get(name) != first[name]]
        if different:
            raise SharedError(
                f"process {number} of {count()} has another {different[0]} than the first; give all the same files"
            )


def spread(tasks: Mapping[str, Callable[[], object]], weights: Mapping[str, float], what: str) -> None:
    """Share tasks out by weight, the heaviest first; each is done by one process, as if it were alone.

    Where there are fewer tasks than processes, all do every task together.
    """
    if count() == 1 or len(tasks) < count():
        if count() > 1:
            logger.info("%s: all %d processes do each of the %d together", what, count(), len(tasks))
        for task in tasks.values():
            task()
        return
    shares = shared_out(weights, count())
    told = [", ".join(own) if len(tasks) <= FEW else f"{len(own)} of {len(tasks)}" for own in shares]
    logger.info("%s: %s", what, "; ".join(f"process {number} does {own or 'none'}" for number, own in enumerate(told)))
    own = shares[rank()]
    with alone():
        for name in own:
            tasks[name]()
    wait()


def shared_out(weights: Mapping[str, float], processes: int) -> list[list[str]]:
    """Give the heaviest task that is left to whoever has the least, and return every process's tasks in their order."""
    loads, owners = [0.0] * processes, {}
    for name in sorted(weights, key=lambda name: -weights[name]):
        owner = loads.index(min(loads))
        loads[owner] += weights[name]
        owners[name] = owner
    return [[name for name in weights if owners[name] == number] for number in range(processes)]


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Return those of many alike pieces of work that are this process's."""
    return items[rank() :: count()]


def summed(values: "Tensor") -> "Tensor":
    """Add up what all processes have at the same places, each of them zeros where the others have numbers."""
    if count() == 1:
        return values
    from torch import distributed

    total = values.cpu()
    distributed.all_reduce(total, group=_NOW.get().group)
    return total.to(values.device)


def _told(value: Any) -> list[Any]:  # whatever JSON holds
    """Tell all processes a value, and return what each of them tells, in their order."""
    if count() == 1:
        return [value]
    import torch
    from torch import distributed

    group = _NOW.get().group
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(count())]
    distributed.all_gather(sizes, torch.tensor([len(own)]), group=group)
    longest = int(max(sizes))
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    distributed.all_gather(texts, torch.nn.functional.pad(own, (0, longest - len(own))), group=group)
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]
