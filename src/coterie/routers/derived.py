"""Another router's weights, changed: scaled to sum 1, or only the largest kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.data.batching import TokenRow
from coterie.routers.base import Router, Routing


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

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the wrapped router's tensors and return the entry for mixture.json."""
        changes = {"top_k": self._top_k, "normalised": self._normalised}
        return {"kind": self.kind, **changes, "of": self.router.save(folder)}
