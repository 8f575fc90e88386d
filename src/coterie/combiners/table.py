"""The combiners by name, as they stand in mixture.json."""

from coterie.combiners.base import Combiner
from coterie.combiners.layers import LayerCombiner
from coterie.combiners.logits import LogitCombiner
from coterie.errors import unknown_name

COMBINERS: dict[str, type[Combiner]] = {"logits": LogitCombiner, "layers": LayerCombiner}


def make_combiner(kind: str) -> Combiner:
    """Build a combiner by name.

    Raises:
        CoterieError: when there is none of this name.
    """
    if kind not in COMBINERS:
        raise unknown_name("combiner", kind, COMBINERS)
    return COMBINERS[kind]()
