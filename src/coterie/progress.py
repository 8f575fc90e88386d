"""One bar for the whole of a long command, with the time that is left; in a log, a line now and then.

A command says before its first step what its parts weigh (`whole`), in passes of a row through the model. It enters
them one by one (`part`), and the loops inside (`steps`) move the bar within the part that they run in. A loop that no
command is around has a bar of its own.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from coterie import ranks

TRAINING = 3.0
"""What training on a row weighs, in passes of a row without gradients: the pass, and its way back."""
GRADIENTS = 3.0
"""What a row's gradient feature weighs at one checkpoint."""
EMBEDDING = 0.2
"""What a text's embedding by a sentence encoder weighs."""
ANSWERING = 8.0
"""What a row's answer weighs: some hundred tokens, of which each takes a small part of a pass."""

FIRST, BETWEEN = 10.0, 30.0
"""How a log is written to: seconds until its first line, and between two."""
WHOLE = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"


@dataclass
class _Lines:
    """What a bar is in a log: a plain line now and then, and a last one where there was a first."""

    desc: str
    total: int | float
    initial: int | float = 0
    is_whole: bool = False
    disable: bool = False

    def __post_init__(self) -> None:
        """Begin."""
        self.n, self.postfix, self.shown = self.initial, "", 0
        self.began = self.last = time.monotonic()

    def update(self, by: int | float) -> None:
        """Go on, and tell of it where it is time to."""
        self.n += by
        if time.monotonic() - (self.last if self.shown else self.began - BETWEEN + FIRST) >= BETWEEN:
            self.show()

    def show(self) -> None:
        """Write a line, unless nothing is to be shown."""
        self.last = time.monotonic()
        gone, done = self.last - self.began, self.n - self.initial
        left = clock((self.total - self.n) * gone / done) if done else "?"
        reached = f"{self.n / self.total:.0%}" if self.is_whole else f"{self.n:.0f} of {self.total:.0f}"
        if not self.disable:
            self.shown += 1
            told = f"{self.desc}: {reached}, {clock(gone)} gone, {left} left"
            sys.stderr.write(", ".join(filter(None, (told, self.postfix))) + "\n")

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:  # noqa: FBT001, FBT002 - as tqdm has it
        """Say what is done at present."""
        self.postfix = text

    def __enter__(self) -> "_Lines":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write the last line."""
        if self.shown:
            self.show()


def clock(seconds: float) -> str:
    """Return a time as people read it, such as 1:05:09 or 05:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


@dataclass
class _Stretch:
    """A piece of a bar: its length, its parts, and how far it has come."""

    bar: Any  # tqdm, or lines
    length: float
    parts: dict[str, float] = field(default_factory=dict)
    come: float = 0.0

    def move(self, by: float) -> None:
        """Move the bar by work that was done now."""
        self.bar.update(self._within(by))

    def skip(self, by: float) -> None:
        """Move the bar by what was there already, as in a run that goes on: it tells nothing of the pace."""
        by = self._within(by)
        if not self.bar.disable:
            self.bar.initial += by
            self.bar.n += by

    def _within(self, by: float) -> float:
        """Go on by this much, but beyond the end neither of the stretch nor, where sums are rounded, of the bar."""
        by = min(by, self.length - self.come)
        self.come += by
        return max(0.0, min(by, self.bar.total - self.bar.n))


_AROUND: ContextVar[_Stretch | None] = ContextVar("_AROUND", default=None)


@contextmanager
def whole(name: str, parts: Mapping[str, int | float]) -> Iterator[None]:
    """Show one bar for all parts, each as long as its weight; inside a part, divide that part in their ratio.

    Without parts nothing is shown, neither of itself nor of what is done in it.
    """
    around = _AROUND.get()
    total = float(sum(parts.values()))
    length = total if around is None else around.length
    own = {part: length * weight / (total or 1.0) for part, weight in parts.items()}
    if around is not None:
        with _within(_Stretch(around.bar, length, own)):
            yield
        around.come = length
        return
    with _bar(name, total, is_whole=True, disable=not total) as bar, _within(_Stretch(bar, total, own)):
        yield
        bar.n = total  # sums of fractions end beside it


@contextmanager
def part(name: str) -> Iterator[None]:
    """Do a part of the command around, if there is one; what of it no step tells of was there already.

    Raises:
        KeyError: when the command has no such part.
    """
    around = _AROUND.get()
    if around is None:
        yield
        return
    around.bar.set_postfix_str(name, refresh=False)
    length, around.parts[name] = around.parts[name], 0.0  # whoever enters it again finds it done
    with _within(_Stretch(around.bar, length)):
        yield
    around.come += length


@contextmanager
def steps(label: str, total: int, unit: str, *, done: int = 0) -> Iterator[Callable[..., None]]:
    """Give a function that tells of so many more steps of a loop, with what is to be known of them.

    Args:
        label: what the loop does; without one it has no bar of its own.
        total: steps of the loop.
        unit: what a step is.
        done: steps that were done before.
    """
    around = _AROUND.get()
    if around is None:
        with _bar(label, total, unit=unit, initial=done, disable=not label) as bar:
            yield lambda count=1, note="": _tell(bar, note, lambda: bar.update(count))
        return
    each = around.length / total if total and not around.parts else 0.0
    around.skip(done * each)
    if label:
        around.bar.set_postfix_str(label, refresh=False)
    token = _AROUND.set(_Stretch(around.bar, 0.0))  # a loop inside this one is no further work
    try:
        yield lambda count=1, note="": _tell(
            around.bar, ", ".join(filter(None, (label, note))), lambda: around.move(count * each)
        )
    finally:
        _AROUND.reset(token)


@contextmanager
def _within(stretch: _Stretch) -> Iterator[None]:
    """Let loops move a stretch, and bring it to its end, unless an error ends it."""
    token = _AROUND.set(stretch)
    try:
        yield
    finally:
        _AROUND.reset(token)
    stretch.skip(stretch.length)


def _tell(bar: Any, note: str, move: Callable[[], object]) -> None:
    if note:
        bar.set_postfix_str(note, refresh=False)  # in a log, each would be a line
    move()


def _bar(name: str, total: int | float, *, is_whole: bool = False, **how: Any) -> Any:  # noqa: ANN401 - tqdm, or lines
    from tqdm.auto import tqdm  # reads when it is imported how it writes, which the command line says before
    from tqdm.notebook import tqdm_notebook

    how["disable"] = how.get("disable", False) or ranks.is_quiet()
    if not sys.stderr.isatty() and not issubclass(tqdm, tqdm_notebook):
        how.pop("unit", None)
        return _Lines(name, total, is_whole=is_whole, **how)
    if is_whole:  # parts are weighed alike, so the pace of all says more than the last moment's
        how |= {"smoothing": 0.0, "bar_format": WHOLE}
    return tqdm(total=total, desc=name, **how)
