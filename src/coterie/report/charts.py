"""Pictures in rows: intervals on an axis, split bars, and a grid of small bars."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from coterie.report import draw
from coterie.report.scales import Scale
from coterie.report.wording import plain, short

ROW = 26  # px, height of one row; the list of names beside the picture has the same
AXIS = 38  # px below the rows for the numbers and the reading direction
_MARGIN = 5.0  # per cent kept free on both sides, for the numbers at the axis' ends
_ROOM_FOR_LABEL = 0.06  # a part of a bar that is narrower than this share of it has its label in the key only

# Of a grid of bars: per cent kept free for the names of rows, and between two bars; px above the bars for the names of
# columns, from bar to bar, and of a bar's height; letters of a name that is not shortened.
_LEFT, _GAP = 9.0, 1.0
_TOP, _LINE, _BAR = 22.0, 15.0, 11.0
_LETTERS = 12


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart: a value, its interval where there is one, and the words for it."""

    value: float
    ends: tuple[float, float] | None
    clear: bool
    words: str


def interval_chart(
    intervals: Sequence[Interval | None], axis: Scale, sides: tuple[str, str, str], title: str
) -> Markup:
    """Draw one row per interval: a line from end to end, a dot at the value (filled when the interval excludes zero).

    Args:
        intervals: from top to bottom; None leaves its row empty.
        axis: the scale, shared by pictures that are to be compared.
        sides: the words under the axis at its left, middle and right.
        title: what the picture shows, for those who do not see it; the words of all rows are added.
    """
    words = "; ".join(interval.words for interval in intervals if interval)
    bottom = len(intervals) * ROW
    drawing = draw.picture("intervals", f"{title}: {words}", height=bottom + AXIS)
    for value in axis.marks:
        x = _across(axis, value)
        draw.add_line(drawing, "zero" if abs(value) < axis.step / 2 else "grid", (x, 0.0), (x, bottom + 3.0))
        draw.add_text(drawing, "mark", x, bottom + 16.0, plain(value, axis.decimals))
    for x, kind, words in zip((_MARGIN, 50.0, 100 - _MARGIN), ("left", "mark", "right"), sides, strict=True):
        draw.add_text(drawing, f"{kind} side", x, bottom + 33.0, words)
    for number, interval in enumerate(intervals):
        if interval is None:
            continue
        y, value = number * ROW + ROW / 2, plain(interval.value, axis.decimals)
        group = draw.add(drawing, "g", "clear" if interval.clear else "open")
        draw.add(group, "title").text = interval.words
        # A value beyond the axis is written at the end it lies beyond, with an arrow.
        if interval.value > axis.high:
            draw.add_text(group, "right far", 100 - _MARGIN, y + 4, f"{value} →")
        elif interval.value < axis.low:
            draw.add_text(group, "left far", _MARGIN, y + 4, f"← {value}")
        else:
            if interval.ends:
                left, right = (_across(axis, min(max(end, axis.low), axis.high)) for end in interval.ends)
                draw.add_line(group, "interval", (left, y), (right, y))
            draw.add(group, "circle", cx=draw.percent(_across(axis, interval.value)), cy=f"{y:.1f}", r="4.5")
    return draw.markup(drawing)


def _across(axis: Scale, value: float) -> float:
    return _MARGIN + (100 - 2 * _MARGIN) * axis.share(value)


def split_bar(parts: Sequence[tuple[str, float, str]], title: str, whole: float = 1.0) -> Markup:
    """Draw one bar whose parts (CSS class, length, label) stand end to end; a length of `whole` fills the width.

    A label stands in its part where there is room.
    """
    drawing = draw.picture("bar", title, height=22)
    start = 0.0
    for kind, length, label in parts:
        share = length / whole if whole else 0.0
        draw.add_bar(drawing, f"part {kind}", start, 100 * share, 1.0, 20.0)
        if label and share >= _ROOM_FOR_LABEL:
            draw.add_text(drawing, "mark on", start + 50 * share, 15.0, label)
        start += 100 * share
    return draw.markup(drawing)


@dataclass(frozen=True)
class Cell:
    """One bar: its row and column, its parts (CSS class, share of 1), the words for it, and whether it is framed."""

    row: str
    column: str
    parts: tuple[tuple[str, float], ...]
    words: str
    framed: bool


def bar_grid(cells: Sequence[Cell], title: str) -> Markup:
    """Draw every cell's bar where its row and column meet, both in the order in which the cells name them."""
    rows, columns = (list(dict.fromkeys(names)) for names in ([c.row for c in cells], [c.column for c in cells]))
    drawing = draw.picture("grid-of-bars", title, height=round(_TOP + _LINE * len(rows)))
    width = (100 - _LEFT) / len(columns)
    for place, name in enumerate(columns):
        draw.add_text(drawing, "mark", _LEFT + width * (place + 0.5), 12.0, short(name, _LETTERS))
    for place, name in enumerate(rows):
        y = _TOP + _LINE * place + _BAR - 1.5
        draw.add_text(drawing, "right", _LEFT - _GAP, y, short(name, _LETTERS))
    for cell in cells:
        group = draw.add(drawing, "g", "framed" if cell.framed else "plain")
        draw.add(group, "title").text = cell.words
        x, y = _LEFT + width * columns.index(cell.column), _TOP + _LINE * rows.index(cell.row)
        start = x
        for kind, share in cell.parts:
            draw.add_bar(group, f"part {kind}", start, (width - _GAP) * share, y, _BAR)
            start += (width - _GAP) * share
        if cell.framed:
            draw.add_bar(group, "frame", x, width - _GAP, y, _BAR)
    return draw.markup(drawing)
