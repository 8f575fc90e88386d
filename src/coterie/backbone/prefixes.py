"""What rows have cached of the beginnings of texts, kept for later texts that begin alike and run the same."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a row had cached when it had read so many tokens.

    Attributes:
        tokens: what it had read.
        states: of every layer, in the order of the cache.
        written: tokens up to which the row was written once.
    """

    tokens: tuple[int, ...]
    states: list[Tensor]
    written: int

    @property
    def bytes(self) -> int:
        """What the states take."""
        return sum(state.nbytes for state in self.states)

    def common(self, tokens: Sequence[int]) -> int:
        """Return how many tokens a text has in common with this one, from the first one on."""
        pairs = enumerate(zip(self.tokens, tokens, strict=False))
        return next((place for place, (own, other) in pairs if own != other), min(len(self.tokens), len(tokens)))


class Prefixes:
    """Prefixes by what their rows run; those that were of no use for longest go first."""

    def __init__(self, budget: int, holds: Callable[[int, int], bool]) -> None:
        """Start empty.

        Args:
            budget: the most bytes that prefixes take.
            holds: tells whether a row can go on from a length, when it was written up to another.
        """
        self.budget = budget
        self._holds = holds
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], Prefix] = OrderedDict()

    @property
    def bytes(self) -> int:
        """What the prefixes take."""
        return sum(prefix.bytes for prefix in self._kept.values())

    def find(self, key: str, tokens: Sequence[int]) -> tuple[int, Prefix | None]:
        """Return the longest beginning of a text that can be taken from a prefix under the key, and that prefix."""
        best, found = 0, None
        for own, prefix in self._kept.items():
            if own[0] == key and (length := prefix.common(tokens)) > best and self.gives(prefix, length):
                best, found = length, prefix
        if found is not None:
            self._kept.move_to_end((key, found.tokens))
        return best, found

    def gives(self, prefix: Prefix, length: int) -> bool:
        """Tell whether a row can go on from some of a prefix's tokens."""
        return length == len(prefix.tokens) or self._holds(length, prefix.written)

    def add(self, key: str, prefix: Prefix) -> None:
        """Keep a prefix, in place of those that it holds as well."""
        for own, other in list(self._kept.items()):
            shorter = len(other.tokens)
            if own[0] == key and prefix.common(other.tokens) == shorter and self.gives(prefix, shorter):
                del self._kept[own]
        self._kept[key, prefix.tokens] = prefix
        self.shrink(self.budget)

    def shrink(self, budget: int) -> None:
        """Give up prefixes until the others take no more than so many bytes."""
        held = self.bytes
        while self._kept and held > budget:
            held -= self._kept.popitem(last=False)[1].bytes
