"""Pictures in rows: intervals on an axis and split bars."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from coterie.report import svg
from coterie.report.scales import round_step
from coterie.report.wording import plain

ROW = 26  # px, height of one row; the list of names beside the picture has the same
AXIS = 38  # px below the rows for the numbers and the reading direction
_MARGIN = 5.0  # per cent kept free on both sides, for the numbers at the axis' ends
_MOST_STEPS = 4
_ROOM_FOR_LABEL = 0.06  # a part of a bar that is narrower than this share of it has its label in the key only


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with a number at every `step`; zero lies inside."""

    low: float
    high: float
    step: float

    def place(self, value: float) -> float:
        """Map a value to its x position in per cent of the width."""
        return _MARGIN + (100 - 2 * _MARGIN) * (value - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        """List the values that carry a number, from low to high."""
        return [self.step * count for count in range(round(self.low / self.step), round(self.high / self.step) + 1)]


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart: a value, its interval where there is one, and the words for it."""

    value: float
    ends: tuple[float, float] | None
    clear: bool
    words: str


def axis_for(values: Iterable[float]) -> Axis:
    """Choose the axis that holds all values between round numbers, with zero inside, in at most five steps."""
    held = [0.0, *values]
    low, high = min(held), max(held)
    if low == high:
        return Axis(-1.0, 1.0, 1.0)
    step = round_step(high - low, _MOST_STEPS)
    low, high = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(step * min(low, -1), step * max(high, 1), step)


def interval_chart(intervals: Sequence[Interval | None], axis: Axis, sides: tuple[str, str, str], title: str) -> Markup:
    """Draw one row per interval: a line from end to end, a dot at the value (filled when the interval excludes zero).

    Args:
        intervals: from top to bottom; None leaves its row empty.
        axis: the scale, shared by pictures that are to be compared.
        sides: the words under the axis at its left, middle and right.
        title: what the picture shows, for those who do not see it; the words of all rows are added.
    """
    words = "; ".join(interval.words for interval in intervals if interval)
    drawing = svg.picture("intervals", len(intervals) * ROW + AXIS, f"{title}: {words}")
    _draw_axis(drawing, axis, len(intervals) * ROW, sides)
    for number, interval in enumerate(intervals):
        if interval:
            _draw_interval(drawing, interval, axis, number * ROW + ROW / 2)
    return svg.markup(drawing)


def _draw_far(group: ElementTree.Element, value: float, axis: Axis, y: float) -> None:
    """Write a value that lies beyond the axis at the end it lies beyond, with an arrow."""
    above = value > axis.high
    place = svg.percent(axis.place(axis.high if above else axis.low))
    words = f"{plain(value, axis.step)} →" if above else f"← {plain(value, axis.step)}"
    svg.add(group, "text", x=place, y=str(y + 4), **{"class": "right far" if above else "left far"}).text = words


def split_bar(parts: Sequence[tuple[str, float]], longest: float, title: str) -> Markup:
    """Draw one bar whose parts (CSS class, length) stand end to end; a bar of length `longest` fills the width."""
    drawing = svg.picture("bar", 16, title)
    start = 0.0
    for kind, length in parts:
        share = 100 * length / longest if longest else 0.0
        svg.add(drawing, "rect", x=svg.percent(start), y="2", width=svg.percent(share), height="12", **{"class": kind})
        start += share
    return svg.markup(drawing)


def share_bar(parts: Sequence[tuple[str, float, str]], title: str) -> Markup:
    """Draw one bar of the whole width whose parts (CSS class, share of 1, label) stand end to end.

    A label stands in its part where there is room.
    """
    drawing = svg.picture("bar", 22, title)
    start = 0.0
    for kind, share, label in parts:
        x, width = svg.percent(start), svg.percent(100 * share)
        svg.add(drawing, "rect", x=x, y="1", width=width, height="20", **{"class": f"part {kind}"})
        if share >= _ROOM_FOR_LABEL:
            middle = svg.percent(start + 50 * share)
            svg.add(drawing, "text", x=middle, y="15", **{"class": "mark on"}).text = label
        start += 100 * share
    return svg.markup(drawing)


def _draw_axis(drawing: ElementTree.Element, axis: Axis, bottom: int, sides: tuple[str, str, str]) -> None:
    for value in axis.marks():
        at = svg.percent(axis.place(value))
        kind = "zero" if abs(value) < axis.step / 2 else "grid"
        svg.add(drawing, "line", x1=at, x2=at, y1="0", y2=str(bottom + 3), **{"class": kind})
        svg.add(drawing, "text", x=at, y=str(bottom + 16), **{"class": "mark"}).text = plain(value, axis.step)
    for at, kind, words in zip((_MARGIN, 50.0, 100 - _MARGIN), ("left", "mark", "right"), sides, strict=True):
        svg.add(drawing, "text", x=svg.percent(at), y=str(bottom + 33), **{"class": f"{kind} side"}).text = words


def _draw_interval(drawing: ElementTree.Element, interval: Interval, axis: Axis, y: float) -> None:
    group = svg.add(drawing, "g", **{"class": "clear" if interval.clear else "open"})
    svg.add(group, "title").text = interval.words
    if not axis.low <= interval.value <= axis.high:
        _draw_far(group, interval.value, axis, y)
        return
    if interval.ends:
        left, right = (svg.percent(axis.place(min(max(end, axis.low), axis.high))) for end in interval.ends)
        svg.add(group, "line", x1=left, x2=right, y1=str(y), y2=str(y), **{"class": "interval"})
    svg.add(group, "circle", cx=svg.percent(axis.place(interval.value)), cy=str(y), r="4.5")
