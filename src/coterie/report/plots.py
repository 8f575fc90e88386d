"""Pictures on two axes: numbered points, curves and lines, drawn into the same frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

from markupsafe import Markup

from coterie.report import marks, svg
from coterie.report.labels import Label, place_labels, spread_out
from coterie.report.scales import Scale
from coterie.report.wording import fixed

HEIGHT = 300  # px, of the whole picture
_LEFT, _RIGHT = 15.0, 95.0  # per cent, the x positions of a scale's ends
_TOP, _BOTTOM = 34.0, 262.0  # px, the y positions of a scale's ends
_NARROW = 300.0  # px, the width on a small phone, for which labels are placed
_CLOSE = 9.0  # per cent, numbers on an axis that are nearer than this would touch
_SIZE = 1.6  # of a mark, beside its size on a map
_LABEL_HEIGHT = 12.0  # px


@dataclass(frozen=True)
class Frame:
    """Two scales and the words for them; with `turned` the low values lie at the top."""

    across: Scale
    up: Scale
    words: tuple[str, str]
    turned: bool = False

    def x(self, value: float) -> float:
        """Map a value to its x position in per cent."""
        return _LEFT + (_RIGHT - _LEFT) * self.across.share(value)

    def y(self, value: float) -> float:
        """Map a value to its y position in px."""
        share = self.up.share(value)
        return _TOP + (_BOTTOM - _TOP) * (share if self.turned else 1 - share)


@dataclass(frozen=True)
class Point:
    """One point: where it lies, its shape (`marks`), its label in the picture and the words for it.

    An empty label is left out; `size` is relative to the usual one.
    """

    x: float
    y: float
    mark: int
    label: str
    words: str
    ends: tuple[float, float] | None = None
    size: float = 1.0


def scatter(points: Sequence[Point], frame: Frame, title: str) -> Markup:
    """Draw points, each with its label beside it, led by a line where there is no room."""
    drawing = _framed("scatter", [point.words for point in points], frame, title)
    _add_marks_across(drawing, frame)
    middles = [(frame.x(point.x) / 100 * _NARROW, frame.y(point.y)) for point in points]
    labels = place_labels(middles, [point.label for point in points], (_NARROW, _BOTTOM))
    for point, label in zip(points, labels, strict=True):
        place = _add_point(drawing, point, frame)
        if point.label:
            _add_label(place, point.label, label)
    return svg.markup(drawing)


def curve(points: Sequence[Point], frame: Frame, title: str, level: float | None = None) -> Markup:
    """Draw points from left to right joined by a line, with whiskers to their `ends` and labels under the axis.

    `level` is a value that is drawn dashed across the whole picture.
    """
    drawing = _framed("curve", [point.words for point in points], frame, title)
    _add_numbers_across(drawing, frame, [(point.x, point.label) for point in points])
    if level is not None:
        _add_line(drawing, "level", (0.0, frame.y(level)), (100.0, frame.y(level)))
    for one, other in pairwise(points):
        _add_line(drawing, "joint", (frame.x(one.x), frame.y(one.y)), (frame.x(other.x), frame.y(other.y)))
    for point in points:
        if point.ends:
            x, (low, high) = frame.x(point.x), map(frame.y, point.ends)
            _add_line(drawing, "whisker", (x, low), (x, high))
        _add_point(drawing, point, frame)
    return svg.markup(drawing)


@dataclass(frozen=True)
class Line:
    """One line: its CSS class, the label at its end, the words for it, and where it passes, from left to right."""

    kind: str
    label: str
    words: str
    places: tuple[tuple[float, float], ...]


def lines(drawn: Sequence[Line], frame: Frame, title: str) -> Markup:
    """Draw lines over the same steps, each with its label at its right end."""
    drawing = _framed("lines", [line.words for line in drawn], frame, title)
    _add_marks_across(drawing, frame)
    box = {
        "x": svg.percent(_LEFT),
        "y": f"{_TOP:g}",
        "width": svg.percent(_RIGHT - _LEFT),
        "height": f"{_BOTTOM - _TOP:g}",
    }
    inside = svg.add(drawing, "svg", **box, viewBox="0 0 1000 1000", preserveAspectRatio="none")
    for line in drawn:
        way = " ".join(
            f"{1000 * frame.across.share(x):.0f} {1000 * (1 - frame.up.share(y)):.0f}" for x, y in line.places
        )
        path = svg.add(
            inside, "path", d=f"M{way}", **{"class": f"line {line.kind}", "vector-effect": "non-scaling-stroke"}
        )
        svg.add(path, "title").text = line.words
    ends = [frame.y(line.places[-1][1]) for line in drawn]
    for line, y in zip(drawn, spread_out(ends, _LABEL_HEIGHT), strict=True):
        _add_text(drawing, f"end {line.kind}", _RIGHT + 1, y + 4, line.label)
    return svg.markup(drawing)


def _framed(kind: str, told: Sequence[str], frame: Frame, title: str) -> ElementTree.Element:
    drawing = svg.picture(f"plot {kind}", HEIGHT, f"{title}: {'; '.join(told)}")
    across, up = frame.words
    _add_text(drawing, "left side", 0.0, 12.0, up)
    _add_text(drawing, "right side", 100.0, HEIGHT - 2.0, f"{across}{', log scale' if frame.across.log else ''} →")
    for value in frame.up.marks:
        y = frame.y(value)
        _add_line(drawing, "grid", (0.0, y), (100.0, y))
        _add_text(drawing, "left", 0.0, y - 3, fixed(value, frame.up.decimals))
    return drawing


def _add_marks_across(drawing: ElementTree.Element, frame: Frame) -> None:
    _add_numbers_across(drawing, frame, [(mark, f"{mark:,.10g}") for mark in frame.across.marks])


def _add_numbers_across(drawing: ElementTree.Element, frame: Frame, numbers: Sequence[tuple[float, str]]) -> None:
    """Write numbers under the picture, from the right, and leave out those that would touch the one before."""
    free = 200.0
    for value, text in sorted(numbers, reverse=True):
        x = frame.x(value)
        _add_line(drawing, "tick", (x, _BOTTOM), (x, _BOTTOM + 4))
        if free - x >= _CLOSE:
            _add_text(drawing, "mark", x, _BOTTOM + 17, text)
            free = x


def _add_point(drawing: ElementTree.Element, point: Point, frame: Frame) -> ElementTree.Element:
    place = svg.inset(drawing, frame.x(point.x), frame.y(point.y), "point")
    svg.add(place, "title").text = point.words
    marks.add_marks(place, point.mark, [(0.0, 0.0)]).set("transform", f"scale({_SIZE * point.size:.3g})")
    return place


def _add_label(place: ElementTree.Element, text: str, label: Label) -> None:
    if label.led:
        svg.add(place, "line", x2=f"{0.7 * label.dx:.1f}", y2=f"{0.7 * label.dy:.1f}", **{"class": "lead"})
    svg.add(place, "text", x=f"{label.dx:.1f}", y=f"{label.dy + 4:.1f}", **{"class": "mark"}).text = text


def _add_line(drawing: ElementTree.Element, kind: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    (x1, y1), (x2, y2) = start, end
    ends = {"x1": svg.percent(x1), "y1": f"{y1:.1f}", "x2": svg.percent(x2), "y2": f"{y2:.1f}"}
    svg.add(drawing, "line", **ends, **{"class": kind})


def _add_text(drawing: ElementTree.Element, kind: str, x: float, y: float, words: str) -> None:
    svg.add(drawing, "text", x=svg.percent(x), y=f"{y:.1f}", **{"class": kind}).text = words
