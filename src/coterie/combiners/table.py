"""The combiners by name, as they stand in mixture.json."""

from collections.abc import Callable

from coterie.combiners.base import Combiner
from coterie.combiners.layers import LayerCombiner
from coterie.combiners.logits import LogitCombiner
from coterie.combiners.texts import TextCombiner
from coterie.combiners.weights import WeightCombiner
from coterie.errors import CoterieError, check_known
from coterie.lora import MERGES
from coterie.routers.base import GRAINS, Grain, Router

COMBINERS: dict[str, Callable[[], Combiner]] = {
    "logits": LogitCombiner,
    "layers": LayerCombiner,
    "weights": WeightCombiner,
    **{f"weights:{how}": lambda how=how: WeightCombiner(how) for how in (*MERGES, "svd") if how != "exact"},
    "texts": TextCombiner,
}
"""Every combiner that needs no number; `weights:svd:R` is the one that does."""


def make_combiner(kind: str) -> Combiner:
    """Build a combiner by name.

    Raises:
        CoterieError: when there is none of this name.
    """
    if kind.startswith("weights:"):
        return WeightCombiner(kind.removeprefix("weights:"))
    check_known("combiner", kind, COMBINERS)
    return COMBINERS[kind]()


def check_fit(router: Router, combiner: Combiner) -> None:
    """Refuse a combiner that cannot follow a router's weights as often as they change.

    Raises:
        CoterieError: naming the combiners that can.
    """
    if not fits(router.grain, combiner):
        raise CoterieError(
            f"combiner {combiner.kind!r} takes weights once a {combiner.finest}, but router {router.kind!r} gives "
            f"them anew at every {router.grain}; use {' or '.join(fitting(router))}"
        )


def fitting(router: Router) -> list[str]:
    """Return the combiners that can follow a router, by name."""
    return [name for name, make in COMBINERS.items() if fits(router.grain, make())]


def that_follows(router: Router, combiner: Combiner) -> Combiner:
    """Return a combiner, or the one that follows the router's weights where no other does."""
    names = fitting(router)
    return make_combiner(names[0]) if len(names) == 1 and not fits(router.grain, combiner) else combiner


def fits(grain: Grain, combiner: Combiner) -> bool:
    """Tell whether a combiner can follow weights of this grain."""
    return GRAINS.index(grain) <= GRAINS.index(combiner.finest)
