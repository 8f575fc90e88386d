"""The combiners by name, as they stand in mixture.json."""

from collections.abc import Callable

from coterie.combiners.base import Combiner
from coterie.combiners.layers import LayerCombiner
from coterie.combiners.logits import LogitCombiner
from coterie.combiners.texts import TextCombiner
from coterie.combiners.weights import WeightCombiner
from coterie.errors import CoterieError, unknown_name
from coterie.lora import MERGES

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
    if kind not in COMBINERS:
        raise unknown_name("combiner", kind, COMBINERS)
    return COMBINERS[kind]()


def check_fit(router_kind: str, axes: frozenset[str], combiner: Combiner) -> None:
    """Refuse a combiner that cannot read all axes of a router's weights.

    Raises:
        CoterieError: naming the combiners that can.
    """
    if not axes <= combiner.axes:
        fitting = [name for name, make in COMBINERS.items() if axes <= make().axes]
        raise CoterieError(
            f"combiner {combiner.kind!r} reads weights by {', '.join(sorted(combiner.axes))}, but router "
            f"{router_kind!r} gives them by {', '.join(sorted(axes))}; use {' or '.join(fitting)}"
        )
