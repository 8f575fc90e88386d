"""Several processes that do one command together, as `accelerate launch` or torchrun starts them: who does what.

All of them run the same code. Work that can be shared out is (`spread`, `share`), what is one is made by the first
process (`by_first`), and each of these ends when all are there, so that none reads what another has not written yet. A
process that nobody started beside others is the first of one, and all of this costs it nothing.

What they tell each other is JSON and numbers, over gloo, on the CPU: nothing is pickled.

Where accelerate's configuration asks for FSDP or ZeRO-3, each of them holds a part of the base model (`is_sharded`), so
that none of them can pass anything through it alone: all do, equally often.
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

from coterie import launcher
from coterie.errors import CoterieError, first_line

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

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
        sharing: all of them, where each holds a part of the base model; also while this one works alone.
        is_by_itself: whether the others wait while this one works.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    is_quiet: bool = False
    local: int | None = None
    sharing: "_Processes | None" = None
    is_by_itself: bool = False


_NOW: ContextVar[_Processes] = ContextVar("_NOW", default=_Processes())  # noqa: B039 - it is frozen


def rank() -> int:
    """Return this process's number; the first one, 0, writes what is one."""
    return _NOW.get().rank


def count() -> int:
    """Return how many processes work together."""
    return _NOW.get().count


def is_quiet() -> bool:
    """Tell whether another process says what all of them do, so that this one shows nothing but its own trouble."""
    return _NOW.get().is_quiet or launcher.number() not in (None, "0")


def local() -> int | None:
    """Return this process's number among those of its machine, which is that of its GPU; None where it is alone."""
    return _NOW.get().local


def is_sharded() -> bool:
    """Tell whether every process holds a part of the base model, so that all of them run each pass through it.

    Raises:
        CoterieError: when this one does something by itself, for which the others would never run a pass.
    """
    now = _NOW.get()
    if now.sharing and now.is_by_itself:
        raise needs_it_whole("this")
    return now.sharing is not None


def needs_it_whole(what: str) -> CoterieError:
    """Return the error of what one process does alone where each would have only a part of the base model."""
    return CoterieError(
        f"one process does {what} by itself, and accelerate's configuration leaves it a part of the base model; "
        "start it without accelerate launch, and add --load-in-4bit where the model is too large"
    )


@contextmanager
def alone(*, by_itself: bool = False) -> Iterator[None]:
    """Do the body as one process that nobody started beside others; libraries see no launcher either.

    A base model that is sharded stays so; the others do the same meanwhile, unless this one works `by_itself`.
    """
    now = _NOW.get()
    token = _NOW.set(replace(now, rank=0, count=1, group=None, is_by_itself=now.is_by_itself or by_itself))
    try:
        with launcher.hidden(launcher.VARIABLES):
            yield
    finally:
        _NOW.reset(token)


@contextmanager
def joined() -> Iterator[None]:
    """Do the body together with all processes that were launched, if there are others.

    Raises:
        CoterieError: when they cannot be reached, one of them has ended, or the launcher asks for what nobody can do.
    """
    if count() > 1:
        yield
        return
    number, total = launcher.launched()
    shards = launcher.wants_sharding()
    if total == 1:
        with alone():
            yield
        return
    if launcher.is_true(launcher.DEEPSPEED):
        logger.info("of DeepSpeed's settings the stage of ZeRO and zero3_init_flag are heard; flags say all else")
    what_shards = launcher.hidden([launcher.FSDP, launcher.DEEPSPEED])  # what is trained is whole
    with _connected(number, total) as group, what_shards:
        own = _Processes(number, total, group, number > 0, int(os.environ.get("LOCAL_RANK", number)))
        token = _NOW.set(replace(own, sharing=own) if shards else own)
        try:
            held = ", each with a part of the base model" if shards else ""
            logger.info("%d processes do this together%s", total, held)
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
            if is_sharded():
                raise needs_it_whole(settings.command) if rank() == 0 else SharedError(settings.command)
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
            with alone(by_itself=True):
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
    except SharedError:
        raise
    except CoterieError as error:
        trouble = error
    _tell_trouble(trouble)
    return made  # pyrefly: ignore[bad-return] - it was made, or this process would have had trouble


def ready() -> None:
    """Wait until all processes that share the base model have come as far in what `each` of them makes.

    Raises:
        CoterieError: the trouble of the first that has some.
    """
    token = _NOW.set(_NOW.get().sharing or _Processes())
    try:
        _tell_trouble(None)
    finally:
        _NOW.reset(token)


def _tell_trouble(own: CoterieError | None) -> None:
    """Tell all processes whether this one has trouble, and end where any of them has."""
    for number, message in enumerate(_told(None if own is None else str(own))):
        if message is not None:
            place = f"process {number} of {count()}: " if number else ""
            raise SharedError(place + message) from own


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

    Where there are fewer tasks than processes, or each holds a part of the base model, all do every task together.
    """
    if count() == 1 or len(tasks) < count() or is_sharded():
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


def share(batches: Sequence[list[int]]) -> Sequence[list[int]]:
    """Return those of many alike batches of numbers that are this process's.

    Where each holds a part of the base model, all get equally many: empty ones stand in for those that lack.
    """
    lacking = -len(batches) % count() if is_sharded() else 0
    return [*batches, *([] for _ in range(lacking))][rank() :: count()]


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
