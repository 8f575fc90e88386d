"""Routing again while an answer is written (Belofsky 2023): a wrapper around any router of prompts."""

from typing import get_args

from coterie.errors import CoterieError
from coterie.routers.base import Router, Wrapper
from coterie.settings.groups import CacheUse


class TokenLevel(Wrapper):
    """Routes as another router does, and does so again at every n-th token of the answer.

    Tokens are counted from the answer's first one, which the prompt's weights choose: with `every=1` all later ones
    have weights of their own, with `every=2` two tokens share theirs (the reading of "every other token" here), and
    with `every=None` the prompt's weights stay.
    """

    kind = "token-level"
    kinds = (kind,)
    saved = ("every", "cache")

    def __init__(self, router: Router, every: int | None = 1, cache: str = "keep") -> None:
        """Wrap a router.

        Args:
            router: gives one row of weights a text.
            every: route again after so many tokens; None for never.
            cache: `keep` what earlier weights have left in the KV cache, or `recompute` the whole text under the new
                weights, as the published code does. Both agree where weights do not change.

        Raises:
            CoterieError: for a router whose weights depend on more than the text, or `every` below 1.
        """
        if router.grain != "prompt":
            raise CoterieError(
                f"router {router.kind!r} weighs every token already; renewing weights is for routers that look at texts"
            )
        if every is not None and every < 1:
            raise CoterieError(f"weights are renewed after a number of tokens from 1 upwards, or never; got {every}")
        if cache not in get_args(CacheUse):
            raise CoterieError(f"the cache can {' or '.join(get_args(CacheUse))} what was read, got {cache!r}")
        super().__init__(router)
        self.grain = "prompt" if every is None else "step"
        self.every = every
        self.cache = cache

    @property
    def of_prompts(self) -> Router:
        """The wrapped router."""
        return self.router
