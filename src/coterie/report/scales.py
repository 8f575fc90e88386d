"""Scales: where a value lies between two ends, and the round values that carry a number."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_MOST_MARKS = 6
_WIDE = 4.0  # values that span more than this factor are set out by their ratios
_LOG_ROOM = 1.15  # a log scale reaches this factor beyond its values


@dataclass(frozen=True)
class Scale:
    """A scale from `low` to `high`, even in the values or, with `log`, in their ratios."""

    low: float
    high: float
    marks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Map a value to its share of the way from `low` to `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def step(self) -> float:
        """The distance of two neighbouring marks on an even scale."""
        return self.marks[1] - self.marks[0]

    @property
    def decimals(self) -> int:
        """How many decimals tell two neighbouring marks apart on an even scale."""
        return max(0, -math.floor(math.log10(self.step) + 1e-9))


def round_step(span: float, most: int) -> float:
    """Find the smallest of 1, 2 and 5 times a power of ten that covers a span in at most so many steps."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= span * (1 - 1e-9))


def even_scale(values: Iterable[float], *, around_zero: bool = False) -> Scale:
    """Choose the scale that holds all values between two round numbers; with zero inside, in at most five steps."""
    held = [0.0, *values] if around_zero else list(values)
    low, high = min(held), max(held)
    if around_zero:
        step = round_step(high - low, 4) if low < high else 1.0
        low, high = min(low, -step), max(high, step)
    else:
        if low == high:
            room = abs(low) / 10
            low, high = low - room, high + (room or 1.0)
        step = round_step(high - low, _MOST_MARKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(step * first, step * last, tuple(step * count for count in range(first, last + 1)))


def scale_for(values: Iterable[float]) -> Scale:
    """Choose a log scale for values that are positive and far apart, an even one otherwise."""
    held = list(values)
    if min(held) <= 0 or max(held) < _WIDE * min(held):
        return even_scale(held)
    low, high = min(held) / _LOG_ROOM, max(held) * _LOG_ROOM
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks: list[float] = []
    for factors in ((1, 2, 5), (1,)):
        marks = [mark for power in powers for factor in factors if low <= (mark := factor * 10.0**power) <= high]
        if len(marks) <= _MOST_MARKS:
            break
    return Scale(low, high, tuple(marks[:: math.ceil(len(marks) / _MOST_MARKS)]), log=True)
