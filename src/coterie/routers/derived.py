"""Another router's weights, changed: scaled to sum 1, or only the largest kept."""

from collections.abc import Sequence
from typing import Any

from coterie.data.batching import TokenRow
from coterie.routers.base import Router, Routing, Wrapper
from coterie.routers.token import TokenLevel


class DerivedRouter(Wrapper):
    """Routes as another router does, then changes its weights; what that router reads serves all derived from it."""

    kind = "derived"
    kinds = (kind,)
    saved = ("top_k", "normalised")

    def __init__(self, router: Router, *, top_k: int | None = None, normalised: bool = False) -> None:
        """Store the changes.

        Args:
            router: whose weights are changed.
            top_k: keep only so many of the largest weights of every prompt; None keeps all.
            normalised: scale every prompt's weights to sum 1, after that.
        """
        super().__init__(router)
        self.grain = router.grain
        self.every, self.cache = router.every, router.cache
        self.top_k = None if top_k is None else int(top_k)
        self.normalised = normalised

    def weigh(self, read: Any) -> Routing:
        """Change the weights that the wrapped router gives.

        Raises:
            CoterieError: when there are not `top_k` experts.
        """
        return self._change(self.router.weigh(read))

    def start(self, prompts: Sequence[TokenRow]) -> Routing:
        """Change the weights that the wrapped router starts with."""
        return self._change(self.router.start(prompts))

    def _change(self, routing: Routing) -> Routing:
        kept = routing if self.top_k is None else routing.top(self.top_k)
        return kept.normalized() if self.normalised else kept


def keep_top(router: Router, k: int) -> Router:
    """Return a router that keeps only the k largest weights, at every token if it routes again."""
    kept = DerivedRouter(router.of_prompts, top_k=k)
    return kept if router.of_prompts is router else TokenLevel(kept, router.every, router.cache)
