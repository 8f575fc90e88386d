"""Runs of symbolic-moe that are served: who can be recruited, and the model ids of that.

Their experts are asked by a worker of their own, since their models are nobody else's.
"""

import time
import weakref
from dataclasses import dataclass, field

from coterie.experts.reply_cache import ReplyCache
from coterie.methods.symbolic.fit import Symbolic
from coterie.methods.symbolic.methods import METHOD, METHODS
from coterie.mixture.memory import budget_of, groups_of
from coterie.mixture.scheduler import ExpertScheduler
from coterie.serve.shelf import Shelf
from coterie.serve.worker import Worker
from coterie.settings.serving import ServeSettings

LONGEST = 1024
"""Tokens of an answer for which memory is set aside."""


@dataclass(frozen=True, eq=False)
class RecruitDesk:
    """A loaded run, with what asks its experts.

    Attributes:
        name: the run's id.
        fitted: whom it recruits.
        scheduler: loads experts; only the worker's thread touches it.
        worker: owns their models.
        shelf: asks them.
        loaded: when, in seconds since 1970.
    """

    name: str
    fitted: Symbolic
    scheduler: ExpertScheduler
    worker: Worker
    shelf: Shelf
    loaded: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, eq=False)
class RecruitCell:
    """What a model id stands for: a run as one of its methods, or one of its experts.

    Attributes:
        id: the one that is listed.
        root: the method, or the expert.
        desk: where it is answered.
    """

    id: str
    root: str
    desk: RecruitDesk
    parent: None = None


def open_recruits(name: str, fitted: Symbolic, settings: ServeSettings) -> RecruitDesk:
    """Get a run ready for questions; its experts are loaded when they are recruited.

    Raises:
        CoterieError: when a model does not exist.
    """
    work, placement = settings.recruited.serving, settings.placement
    groups = groups_of(fitted.pool, placement, work, batch_size=settings.capacity.places, new_tokens=LONGEST)
    scheduler = ExpertScheduler(groups, fitted.pool.identities, ReplyCache(), budget_of(work, placement))
    worker = Worker()
    desk = RecruitDesk(name, fitted, scheduler, worker.__enter__(), Shelf(scheduler, worker, work.concurrency))
    weakref.finalize(desk, worker.__exit__)
    return desk


def recruit_cells(desk: RecruitDesk) -> dict[str, RecruitCell]:
    """Name all that can be asked of a run: it, its methods, its experts."""
    own = {desk.name: RecruitCell(desk.name, METHOD, desk)}
    others = (name for name in (*METHODS, *desk.fitted.pool.names) if name != METHOD)
    return own | {f"{desk.name}:{name}": RecruitCell(f"{desk.name}:{name}", name, desk) for name in others}
