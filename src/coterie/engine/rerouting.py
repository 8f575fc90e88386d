"""Re-routing every n tokens: when weights change while answers are written, and under which of them tokens are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from coterie.engine.rows import CachedRows
from coterie.features.growing_text import GrowingFeatures
from coterie.routers.base import Routing


@dataclass(frozen=True)
class Rerouting:
    """How the weights of a batch change while its answers are written.

    Attributes:
        texts: what is known of the requests' texts, as they grow.
        weigh: turns the texts' features into weights.
        experts: the bank's, in its order.
        every: tokens of an answer that share weights.
        recompute: read the whole text again under new weights, instead of keeping the cache.
    """

    texts: GrowingFeatures
    weigh: Callable[[Any], Routing]
    experts: tuple[str, ...]
    every: int
    recompute: bool = False

    def routing(self) -> Routing:
        """Weigh the bank's experts for the texts as far as they are known."""
        return self.weigh(self.texts.features()).aligned(self.experts)

    def read(
        self, rows: CachedRows, tokens: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], written: int
    ) -> Float[Tensor, "row position width"]:
        """Read the next tokens of every request, under new weights where they are due.

        Args:
            rows: what the requests have read so far.
            tokens: equally many of every request, no more than `every`.
            texts: everything up to and with these tokens.
            written: tokens of the answers, up to and with the first of these.

        Returns:
            The last hidden states at `tokens`, whatever else was read.
        """
        self.texts.append([own[:1] for own in tokens])
        is_due = written % self.every == 0
        if is_due:
            rows.change(self.routing(), recompute=self.recompute)
        self.texts.append([own[1:] for own in tokens])
        length = len(tokens[0])
        hidden = rows.read(texts if is_due and self.recompute else tokens)[:, -length:]
        self.texts.append_states(rows.by_request(hidden))
        return hidden
