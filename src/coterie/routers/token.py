"""Routing that is renewed while an answer is written (Belofsky 2023): a wrapper around any router of prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from coterie.data.batching import TokenRow
from coterie.errors import CoterieError
from coterie.routers.base import PER_REQUEST, Router, Routing
from coterie.settings.groups import CacheUse


@runtime_checkable
class Follower(Protocol):
    """The weights of a batch of requests, whose texts grow."""

    def routing(self) -> Routing:
        """Weigh the experts for every text as far as it is known; axes (request, expert)."""
        ...

    def write(self, tokens: Sequence[Sequence[int]]) -> None:
        """Take in the next tokens of every text, before the model reads them."""
        ...

    def observe(self, states: Float[Tensor, "request position width"]) -> None:
        """Take in the model's last hidden states at the tokens that it has just read."""
        ...

    def keep(self, requests: Sequence[int]) -> None:
        """Drop all requests but these."""
        ...


@runtime_checkable
class FollowingRouter(Router, Protocol):
    """A router with a way of its own to follow texts that grow."""

    def follow(self, prompts: Sequence[TokenRow]) -> Follower:
        """Start to follow a batch of prompts."""
        ...


class TokenLevel:
    """Routes as another router does, and does so again at every n-th token of the answer.

    Tokens are counted from the answer's first one, which the prompt's weights choose: with `every=1` all later ones
    have weights of their own, with `every=2` two tokens share theirs (the reading of "every other token" here), and
    with `every=None` the prompt's weights stay.
    """

    kind = "token-level"

    def __init__(self, router: Router, every: int | None = 1, cache: str = "keep") -> None:
        """Wrap a router.

        Args:
            router: gives one row of weights a text.
            every: renew the weights after so many tokens; None for never.
            cache: `keep` what earlier weights have left in the KV cache, or `recompute` the whole text under the new
                weights, as the published code does. Both agree where weights do not change.

        Raises:
            CoterieError: for a router whose weights depend on more than the text, or `every` below 1.
        """
        if not router.axes <= PER_REQUEST:
            raise CoterieError(
                f"router {router.kind!r} weighs every token already; renewing weights is for routers that look at texts"
            )
        if every is not None and every < 1:
            raise CoterieError(f"weights are renewed after a number of tokens from 1 upwards, or never; got {every}")
        if cache not in get_args(CacheUse):
            raise CoterieError(f"the cache can {' or '.join(get_args(CacheUse))} what was read, got {cache!r}")
        self.axes = router.axes if every is None else router.axes | {"token"}
        self.router = router
        self.every = every
        self.cache = cache

    def route(self, prompts: Sequence[TokenRow]) -> Routing:
        """Weigh the experts for the beginning of every answer; axes (request, expert)."""
        return self.router.route(prompts)

    def follow(self, prompts: Sequence[TokenRow]) -> Follower:
        """Start to follow prompts whose answers are going to be written."""
        return follow(self.router, prompts)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the wrapped router's tensors and return the entry for mixture.json."""
        return {"kind": self.kind, "every": self.every, "cache": self.cache, "of": self.router.save(folder)}


def follow(router: Router, prompts: Sequence[TokenRow]) -> Follower:
    """Follow prompts in the router's own way if it has one; otherwise route every text again as a whole."""
    return router.follow(prompts) if isinstance(router, FollowingRouter) else Rerouted(router, prompts)


class Rerouted:
    """Follows texts by routing each of them again as a whole."""

    def __init__(self, router: Router, prompts: Sequence[TokenRow]) -> None:
        """Start with prompts."""
        self._router = router
        self._rows = list(prompts)

    def routing(self) -> Routing:
        """Route the texts as they stand."""
        return self._router.route(self._rows)

    def write(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append the tokens."""
        self._rows = [row.extended(own) for row, own in zip(self._rows, tokens, strict=True)]

    def observe(self, states: Float[Tensor, "request position width"]) -> None:
        """Do nothing: the text is all that counts."""

    def keep(self, requests: Sequence[int]) -> None:
        """Drop all requests but these."""
        self._rows = [self._rows[request] for request in requests]
