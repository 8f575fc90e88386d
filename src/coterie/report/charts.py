"""Pictures as inline SVG: intervals on an axis and split bars.

Positions along x are per cent of the picture's width, so a picture fits a phone and a sheet of paper with its letters
at full size. Names enter the markup through an XML tree, which escapes them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from coterie.report.wording import plain

ROW = 26  # px, height of one row; the list of names beside the picture has the same
AXIS = 38  # px below the rows for the numbers and the reading direction
_MARGIN = 5.0  # per cent kept free on both sides, for the numbers at the axis' ends
_MOST_STEPS = 4


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
    power = 10.0 ** math.floor(math.log10((high - low) / _MOST_STEPS))
    step = next(
        power * round_step
        for round_step in (1, 2, 5, 10)
        if power * round_step * _MOST_STEPS >= (high - low) * (1 - 1e-9)
    )
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
    svg = _picture("intervals", len(intervals) * ROW + AXIS, f"{title}: {words}")
    _draw_axis(svg, axis, len(intervals) * ROW, sides)
    for number, interval in enumerate(intervals):
        if interval:
            _draw_interval(svg, interval, axis, number * ROW + ROW / 2)
    return _markup(svg)


def split_bar(parts: Sequence[tuple[str, float]], longest: float, title: str) -> Markup:
    """Draw one bar whose parts (CSS class, length) stand end to end; a bar of length `longest` fills the width."""
    svg = _picture("bar", 16, title)
    start = 0.0
    for kind, length in parts:
        share = 100 * length / longest if longest else 0.0
        _add(svg, "rect", x=_percent(start), y="2", width=_percent(share), height="12", **{"class": kind})
        start += share
    return _markup(svg)


def _picture(kind: str, height: int, title: str) -> ElementTree.Element:
    attributes = {"class": kind, "role": "img", "width": "100%", "height": str(height), "aria-label": title}
    return ElementTree.Element("svg", attributes)


def _draw_axis(svg: ElementTree.Element, axis: Axis, bottom: int, sides: tuple[str, str, str]) -> None:
    for value in axis.marks():
        at = _percent(axis.place(value))
        kind = "zero" if abs(value) < axis.step / 2 else "grid"
        _add(svg, "line", x1=at, x2=at, y1="0", y2=str(bottom + 3), **{"class": kind})
        _add(svg, "text", x=at, y=str(bottom + 16), **{"class": "mark"}).text = plain(value, axis.step)
    for at, kind, words in zip((_MARGIN, 50.0, 100 - _MARGIN), ("left", "mark", "right"), sides, strict=True):
        _add(svg, "text", x=_percent(at), y=str(bottom + 33), **{"class": f"{kind} side"}).text = words


def _draw_interval(svg: ElementTree.Element, interval: Interval, axis: Axis, y: float) -> None:
    group = _add(svg, "g", **{"class": "clear" if interval.clear else "open"})
    _add(group, "title").text = interval.words
    if interval.ends:
        left, right = (_percent(axis.place(end)) for end in interval.ends)
        _add(group, "line", x1=left, x2=right, y1=str(y), y2=str(y), **{"class": "interval"})
    _add(group, "circle", cx=_percent(axis.place(interval.value)), cy=str(y), r="4.5")


def _add(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, attributes)


def _percent(value: float) -> str:
    return f"{value:.3f}%"


def _markup(svg: ElementTree.Element) -> Markup:
    """Turn a tree into markup that is safe as it stands: the tree has escaped every text and attribute."""
    return Markup(ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False))
