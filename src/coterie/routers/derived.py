"""Another router's weights, changed: scaled to sum 1, or only the largest kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from coterie.data.batching import TokenRow
from coterie.routers.base import Router, Routing
from coterie.routers.token import Follower, TokenLevel, follow


class DerivedRouter:
    """Routes as another router does, then changes its weights.

    The wrapped router's work serves all that are derived from it (see `change`).
    """

    def __init__(self, router: Router, *, top_k: int | None = None, normalised: bool = False) -> None:
        """Store the changes.

        Args:
            router: whose weights are changed.
            top_k: keep only so many of the largest weights of every prompt; None keeps all.
            normalised: scale every prompt's weights to sum 1, after that.
        """
        self.kind = "derived"
        self.router = router
        self.axes = router.axes
        self._top_k = top_k
        self._normalised = normalised

    def route(self, prompts: Sequence[TokenRow]) -> Routing:
        """Return the wrapped router's weights, changed."""
        return self.change(self.router.route(prompts))

    def change(self, routing: Routing) -> Routing:
        """Change weights that the wrapped router gave.

        Raises:
            CoterieError: when there are not `top_k` experts.
        """
        kept = routing if self._top_k is None else routing.top(self._top_k)
        return kept.normalized() if self._normalised else kept

    def follow(self, prompts: Sequence[TokenRow]) -> "DerivedFollower":
        """Start to follow prompts whose answers are going to be written."""
        return DerivedFollower(self, follow(self.router, prompts))

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the wrapped router's tensors and return the entry for mixture.json."""
        changes = {"top_k": self._top_k, "normalised": self._normalised}
        return {"kind": self.kind, **changes, "of": self.router.save(folder)}


def keep_top(router: Router, k: int) -> Router:
    """Return a router that keeps only the k largest weights, at every token if it renews them."""
    if isinstance(router, TokenLevel):
        return TokenLevel(keep_top(router.router, k), router.every, router.cache)
    return DerivedRouter(router, top_k=k)


class DerivedFollower:
    """Follows texts as another router does, and changes its weights."""

    def __init__(self, router: DerivedRouter, inner: Follower) -> None:
        """Store who changes the weights, and who gives them."""
        self._router = router
        self._inner = inner

    def routing(self) -> Routing:
        """Return the changed weights of every text as far as it is known."""
        return self._router.change(self._inner.routing())

    def write(self, tokens: Sequence[Sequence[int]]) -> None:
        """Take in the next tokens of every text, before the model reads them."""
        self._inner.write(tokens)

    def observe(self, states: Float[Tensor, "request position width"]) -> None:
        """Take in the model's last hidden states at the tokens that it has just read."""
        self._inner.observe(states)

    def keep(self, requests: Sequence[int]) -> None:
        """Drop all requests but these."""
        self._inner.keep(requests)
