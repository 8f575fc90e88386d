"""Speculation: tokens are proposed for nothing or little, and one pass of all experts says which of them are right.

A pass over several tokens costs less than as many passes (Leviathan et al., arXiv 2211.17192). What is chosen does not
change: the noise of a token hangs on its place alone, so that at every place the token is chosen that would be chosen
without proposals, and proposals count as far as they are these tokens.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from coterie.engine.reading import Text

LENGTHS = (0, 1, 2, 3, 5, 8, 12)
"""How many tokens are proposed at once; few sizes, so that each is soon known to pay or not."""
FREE = ("off", "lookup")
"""Ways to propose that need no model."""
GUESS = 0.2  # what a further token of each row adds to a pass that has not been measured, in passes
DRAFTED = 0.3  # what a token by a cheaper model takes that has not been measured, in passes
ALONE = 4.0  # what the second token of a lone row adds: on CPUs a product of one row is a cheap form of its own
MEASURED = 3  # passes over one token before anything is proposed; the first ones take longer
TRIED_AGAIN = 100  # passes over one token after which the cost of others is measured anew
KEPT_COSTS = 9  # the least of the last ones counts, since other work on the machine only adds to it
MEMORY = 0.9  # weight that an earlier proposal keeps when the next one was right or wrong


@runtime_checkable
class Proposer(Protocol):
    """Proposes how one text goes on."""

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Return at most so many tokens that may follow; a text that has grown since the last call is the same one."""
        ...


class PromptLookup:
    """Proposes what came when the last tokens stood in the text before (LLMA, arXiv 2304.04487; prompt look-up).

    It costs nothing, and is right where an answer repeats its prompt or itself.
    """

    SIZES = (4, 3, 2)
    """Tokens that have to be the same, of longest matches first."""

    def __init__(self) -> None:
        """Know nothing of the text yet."""
        self._known = 0
        self._behind: dict[tuple[int, ...], int] = {}  # the place behind the last occurrence of some tokens

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """Return what followed the last tokens where they stood last; where that reaches the end, it goes round."""
        for end in range(self._known, len(ids)):
            self._behind |= {tuple(ids[end - size : end]): end for size in self.SIZES if size <= end}
        self._known = len(ids)
        for size in self.SIZES:
            if (place := self._behind.get(tuple(ids[-size:]))) is not None and size <= len(ids):
                found = list(ids[place : place + count])
                while len(found) < count:
                    found.append(found[len(found) - (len(ids) - place)])
                return found
        return []


@dataclass
class Drafting:
    """Proposals for one text, and how good they were so far.

    Attributes:
        proposer: makes them.
        right: how many of the last ones were right, earlier ones counting less.
        checked: how many there were, in the same way.
        proposed: the last ones, verified or not.
        text: what a cheaper model has read, where one proposes.
        is_given_up: the model has failed, so that it is not asked again.
    """

    proposer: Proposer = field(default_factory=PromptLookup)
    right: float = 0.2
    checked: float = 2.0
    proposed: list[int] = field(default_factory=list)
    text: Text | None = None
    is_given_up: bool = False

    @classmethod
    def by(cls, proposer: str) -> "Drafting":
        """Begin with as much trust in a model as makes it be tried; what is free proves itself unverified."""
        return cls() if proposer in FREE else cls(right=1.4)

    @property
    def chance(self) -> float:
        """The chance that the next proposed token is right, where those before it are."""
        return self.right / self.checked

    def learn(self, chosen: Sequence[int]) -> None:
        """Compare the last proposals, also where they were not verified, with the tokens that came."""
        for draft, token in zip(self.proposed, chosen, strict=False):
            self.right = MEMORY * self.right + (draft == token)
            self.checked = MEMORY * self.checked + 1
            if draft != token:
                return


class PassCosts:
    """What passes take, by how many rows they have and how many tokens of each, as measured while they are taken."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._seconds: dict[tuple[int, int], deque[float]] = {}
        self._drafts: dict[tuple[str, int], deque[float]] = {}
        self._plain = 0

    def note(self, rows: int, positions: int, seconds: float) -> None:
        """Take in what a pass took; now and then the longer ones are forgotten, so that they are tried once more."""
        self._seconds.setdefault((rows.bit_length(), positions), deque(maxlen=KEPT_COSTS)).append(seconds)
        self._plain += positions == 1
        if self._plain > TRIED_AGAIN:
            self._plain, self._seconds = 0, {key: own for key, own in self._seconds.items() if key[1] == 1}
            self._drafts.clear()

    def knows(self, rows: int) -> bool:
        """Tell whether passes over one token of so many rows were measured, which all others are compared with."""
        return len(self._seconds.get((rows.bit_length(), 1), ())) >= MEASURED

    def note_drafts(self, proposer: str, rows: int, seconds: float) -> None:
        """Take in what each token took that a cheaper model has proposed, for so many texts at once."""
        self._drafts.setdefault((proposer, rows.bit_length()), deque(maxlen=KEPT_COSTS)).append(seconds)

    def of_drafts(self, proposer: str, texts: int, rows: int) -> float:
        """Return what a proposed token takes for so many texts, in passes over one token of so many rows."""
        own, plain = self._drafts.get((proposer, texts.bit_length())), self._seconds.get((rows.bit_length(), 1))
        return min(own) / min(plain) if own and plain else DRAFTED

    def of(self, rows: int, positions: int) -> float:
        """Return what a pass takes, in passes over one token a row.

        One that was never tried takes what the next shorter one does and some more; the guess is low, so that it is
        tried where it may pay.
        """
        if not (plain := self._seconds.get((rows.bit_length(), 1))):
            return self._guess(rows, positions, 1, 1.0)
        tried = (size for size in range(positions, 1, -1) if (rows.bit_length(), size) in self._seconds)
        nearest = next(tried, 1)
        cost = min(self._seconds[rows.bit_length(), nearest]) / min(plain)
        return self._guess(rows, positions, nearest, cost)

    def _guess(self, rows: int, positions: int, known: int, cost: float) -> float:
        """Go on from a shorter pass whose cost is known."""
        return cost + GUESS * (positions - known) + ALONE * (rows == 1 and known == 1 < positions)


def draft_length(chances: Sequence[tuple[float, int]], cost: Callable[[int], float]) -> int:
    """Say how many tokens to propose for texts that are read together, so that most tokens come out a second.

    With the chance a of a proposal, k of them bring 1 + a + ... + a^k tokens in a pass over k + 1.

    Args:
        chances: of each text, and how many proposals there are for it.
        cost: of a pass over that many tokens of each text.
    """

    def gain(length: int) -> float:
        tokens = sum(chance**n for chance, most in chances for n in range(min(length, most) + 1))
        return tokens / cost(length + 1)

    return max(LENGTHS, key=gain)
