"""Pictures on two axes: numbered points, curves, lines, stacked areas and maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from xml.etree import ElementTree

from markupsafe import Markup

from coterie.report import draw
from coterie.report.scales import Scale, round_step
from coterie.report.wording import fixed

HEIGHT = 300  # px, of a picture of points, curves or lines
_LEFT, _RIGHT = 15.0, 95.0  # per cent, the x positions of a scale's ends
_TOP, _BOTTOM = 34.0, 262.0  # px, the y positions of a scale's ends
_CLOSE, _LETTER = 9.0, 2.0  # per cent, numbers on an axis that are nearer than this, or so much a letter, would touch
_NEAR = 8.0  # per cent, a point that is nearer than this to one on its right has no room for a label beside it
_SIZE = 1.6  # of a mark, beside its size on a map
_BESIDE = 9.0  # px, from a point to its number
_LABEL_HEIGHT = 12.0  # px

# Of stacked areas: per cent kept free for the numbers beside them, px of the picture, above the areas and of their
# depth, how many numbers stand under them, and the least share of height and width that has room for a label.
_AREAS_LEFT = 9.0
_AREAS_HEIGHT, _AREAS_TOP, _DEPTH = 150, 18.0, 96.0
_MOST_NUMBERS = 6
_HIGH, _LONG = 0.25, 0.06

_SIDE, _EDGE = 240.0, 8.0  # units, of the square a map is drawn on, and kept free around the points


@dataclass(frozen=True)
class Frame:
    """Two scales and the words for them; with `turned` the low values lie at the top."""

    across: Scale
    up: Scale
    words: tuple[str, str]
    turned: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Map two values to their place: x in per cent, y in px."""
        up = self.up.share(y)
        share = up if self.turned else 1 - up
        return _LEFT + (_RIGHT - _LEFT) * self.across.share(x), _TOP + (_BOTTOM - _TOP) * share


@dataclass(frozen=True)
class Point:
    """One point: where it lies, its shape (a mark of `draw`), its label in the picture and the words for it.

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
    """Draw points, each with its label beside it; neighbours have theirs in one line above them, from left to right."""
    drawing = _framed("scatter", [point.words for point in points], frame, title)
    labelled = []
    for point in points:
        place = _add_point(drawing, point, frame)
        if point.label:
            labelled.append(_Labelled(*frame.place(point.x, point.y), point.label, place))
    groups: list[list[_Labelled]] = []
    for own in sorted(labelled, key=lambda own: own.x):
        for group in groups:
            middle, half = _line_of_labels(group)
            room = own.x - max(group[-1].x, middle + half)
            if room < _NEAR and abs(own.y - group[-1].y) < _LABEL_HEIGHT:
                group.append(own)
                break
        else:
            groups.append([own])
    for group in groups:
        if len(group) == 1:
            draw.add(group[0].place, "text", x=f"{_BESIDE:g}", y="4").text = group[0].label
        else:
            middle, half = _line_of_labels(group)
            line, above = ", ".join(own.label for own in group), min(own.y for own in group) - _BESIDE
            draw.add_text(drawing, "mark number", min(max(middle, half), 100 - half), above, line)
    return draw.markup(drawing)


@dataclass(frozen=True)
class _Labelled:
    """A point that was drawn at `x` per cent and `y` px, and its label that was not yet."""

    x: float
    y: float
    label: str
    place: ElementTree.Element


def _line_of_labels(group: Sequence[_Labelled]) -> tuple[float, float]:
    """Measure the line of labels above a group: the middle of the group and half the line's width, in per cent."""
    letters = sum(len(own.label) for own in group) + 2 * (len(group) - 1)
    return (group[0].x + group[-1].x) / 2, _LETTER * letters / 2


def curve(points: Sequence[Point], frame: Frame, title: str, level: float | None = None) -> Markup:
    """Draw points from left to right joined by a line, with whiskers to their `ends` and labels under the axis.

    `level` is a value that is drawn dashed across the whole picture.
    """
    numbers = [(point.x, point.label) for point in points]
    drawing = _framed("curve", [point.words for point in points], frame, title, numbers)
    if level is not None:
        _, y = frame.place(points[0].x, level)
        draw.add_line(drawing, "level", (0.0, y), (100.0, y))
    for one, other in pairwise(points):
        draw.add_line(drawing, "joint", frame.place(one.x, one.y), frame.place(other.x, other.y))
    for point in points:
        if point.ends:
            low, high = point.ends
            draw.add_line(drawing, "whisker", frame.place(point.x, low), frame.place(point.x, high))
        _add_point(drawing, point, frame)
    return draw.markup(drawing)


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
    inside = _add_stretched(drawing, (_LEFT, _TOP, _RIGHT - _LEFT, _BOTTOM - _TOP), (1000, 1000))
    for line in drawn:
        way = " ".join(
            f"{1000 * frame.across.share(x):.0f} {1000 * (1 - frame.up.share(y)):.0f}" for x, y in line.places
        )
        path = draw.add(inside, "path", f"line {line.kind}", d=f"M{way}", **{"vector-effect": "non-scaling-stroke"})
        draw.add(path, "title").text = line.words
    ends = [frame.place(*line.places[-1])[1] for line in drawn]
    for line, y in zip(drawn, spread_out(ends, _LABEL_HEIGHT), strict=True):
        draw.add_text(drawing, f"end {line.kind}", _RIGHT + 1, y + 4, line.label)
    return draw.markup(drawing)


def spread_out(places: Sequence[float], least: float) -> list[float]:
    """Move places along a line apart until neighbours are `least` from each other; their order and middle stay."""
    order = sorted(range(len(places)), key=lambda number: places[number])
    groups: list[list[int]] = []
    moved = list(places)
    for number in order:
        groups.append([number])
        while len(groups) > 1 and moved[groups[-1][0]] - moved[groups[-2][-1]] < least:
            groups[-2:] = [[*groups[-2], *groups[-1]]]
            middle = sum(places[member] for member in groups[-1]) / len(groups[-1])
            for place, member in enumerate(groups[-1]):
                moved[member] = middle + least * (place - (len(groups[-1]) - 1) / 2)
    return moved


def _framed(
    kind: str, words: Sequence[str], frame: Frame, title: str, numbers: Sequence[tuple[float, str]] = ()
) -> ElementTree.Element:
    """Start a picture with the words for both axes, the grid of the values that run upwards, and numbers under it.

    The numbers are (value, text), by default those of the scale.
    """
    drawing = draw.picture(f"plot {kind}", f"{title}: {'; '.join(words)}", height=HEIGHT)
    across, up = frame.words
    draw.add_text(drawing, "left side", 0.0, 12.0, up)
    draw.add_text(drawing, "right side", 100.0, HEIGHT - 2.0, f"{across}{', log scale' if frame.across.log else ''} →")
    for value in frame.up.marks:
        _, y = frame.place(frame.across.low, value)
        draw.add_line(drawing, "grid", (0.0, y), (100.0, y))
        draw.add_text(drawing, "left", 0.0, y - 3, fixed(value, frame.up.decimals))
    free = 200.0  # from the right, those that would touch the one before are left out
    for value, text in sorted(numbers or [(mark, f"{mark:,.10g}") for mark in frame.across.marks], reverse=True):
        x, _ = frame.place(value, frame.up.low)
        draw.add_line(drawing, "tick", (x, _BOTTOM), (x, _BOTTOM + 4))
        if free - x >= max(_CLOSE, _LETTER * len(text)):
            draw.add_text(drawing, "mark", x, _BOTTOM + 17, text)
            free = x
    return drawing


def _add_point(drawing: ElementTree.Element, point: Point, frame: Frame) -> ElementTree.Element:
    """Add a picture of its own whose origin is the point's place, and within which px count."""
    x, y = frame.place(point.x, point.y)
    place = draw.add(drawing, "svg", "point", x=draw.percent(x), y=f"{y:.1f}")
    draw.add(place, "title").text = point.words
    draw.add_marks(place, point.mark, [(0.0, 0.0)]).set("transform", f"scale({_SIZE * point.size:.3g})")
    return place


def _add_stretched(
    drawing: ElementTree.Element, box: tuple[float, float, float, float], units: tuple[int, int]
) -> ElementTree.Element:
    """Add a box (x and width in per cent, y and height in px) within which units of its own count."""
    x, y, width, height = box
    ends = {"x": draw.percent(x), "y": f"{y:g}", "width": draw.percent(width), "height": f"{height:g}"}
    return draw.add(drawing, "svg", **ends, viewBox=f"0 0 {units[0]} {units[1]}", preserveAspectRatio="none")


@dataclass(frozen=True)
class Band:
    """One area: its CSS class, its label, its name and its share of 1 at every step."""

    kind: str
    label: str
    name: str
    shares: tuple[float, ...]


def stacked_areas(bands: Sequence[Band], words: tuple[str, str], title: str) -> Markup:
    """Draw how shares of a whole change from step to step: bands stacked from the bottom, one column for each step.

    Args:
        bands: from the bottom up, all with a share for each of the same steps, of which there is at least one.
        words: what runs upwards, and what a step is.
        title: what the picture shows, for those who do not see it.
    """
    count, width = len(bands[0].shares), 100 - _AREAS_LEFT
    bottom = _AREAS_TOP + _DEPTH
    drawing = draw.picture("areas", title, height=_AREAS_HEIGHT)
    for share in (0.0, 0.5, 1.0):
        draw.add_text(drawing, "right", _AREAS_LEFT - 1, bottom - _DEPTH * share + 4, f"{share:g}")
    step = max(1, round(round_step(float(count), _MOST_NUMBERS)))
    for number in range(step, count + 1, step):
        x = _AREAS_LEFT + width * (number - 0.5) / count
        draw.add_line(drawing, "tick", (x, bottom), (x, bottom + 4))
        draw.add_text(drawing, "mark", x, bottom + 17, str(number))
    draw.add_text(drawing, "left side", 0.0, 10.0, words[0])
    draw.add_text(drawing, "right side", 100.0, _AREAS_HEIGHT - 3.0, f"{words[1]} →")
    inside = _add_stretched(drawing, (_AREAS_LEFT, _AREAS_TOP, width, _DEPTH), (count, 100))
    columns = zip(*(band.shares for band in bands), strict=True)
    tops = list(zip(*map(accumulate, columns), strict=True))
    for band, heights in reversed(list(zip(bands, tops, strict=True))):  # each covers the lower part of the one above
        way, end = "M0 100", 0  # in units of a step and of a hundredth; equal neighbours are one column
        for level, same in groupby(f"{100 * (1 - height):.1f}" for height in heights):
            end += len(list(same))
            way += f"V{level}H{end}"
        path = draw.add(inside, "path", f"part {band.kind}", d=f"{way}V100z")
        draw.add(path, "title").text = band.name
    for band, heights in zip(bands, tops, strict=True):
        if (middle := _room_for_label(band)) is not None:
            y = bottom - _DEPTH * (heights[middle] - band.shares[middle] / 2)
            draw.add_text(drawing, "mark on", _AREAS_LEFT + width * (middle + 0.5) / count, y + 4, band.label)
    return draw.markup(drawing)


def _room_for_label(band: Band) -> int | None:
    """Find the middle step of a band's longest part that is high enough, where it is long enough too."""
    end, best = 0, (0, 0)
    for high, same in groupby(share >= _HIGH for share in band.shares):
        length = len(list(same))
        end += length
        best = max(best, (length, end)) if high else best
    length, end = best
    return end - (length + 1) // 2 if length >= _LONG * len(band.shares) else None


@dataclass(frozen=True)
class Group:
    """Points that share a mark and a name; `titles` say of each what it is, where that is known."""

    mark: int
    name: str
    places: tuple[tuple[float, float], ...]
    titles: tuple[str, ...] = ()


def fit(places: Sequence[tuple[float, float]], side: float = _SIDE) -> list[tuple[float, float]]:
    """Move and scale places so that they fill a square, both directions by the same factor."""
    lows = [min(place[axis] for place in places) for axis in (0, 1)]
    highs = [max(place[axis] for place in places) for axis in (0, 1)]
    longest = max(high - low for low, high in zip(lows, highs, strict=True)) or 1.0
    scale = (side - 2 * _EDGE) / longest
    middle = [(low + high) / 2 for low, high in zip(lows, highs, strict=True)]
    return [(side / 2 + scale * (x - middle[0]), side / 2 - scale * (y - middle[1])) for x, y in places]


def draw_map(groups: Sequence[Group], title: str, side: float = _SIDE) -> Markup:
    """Draw groups that were fitted to a square, the largest first, so that it does not cover the others.

    Distances count on a map, directions and units do not.
    """
    counted = [(group, f"{group.name} {len(group.places):,}") for group in groups]
    drawing = draw.picture("map", f"{title}: {'; '.join(words for _, words in counted)}", side=side)
    for group, words in sorted(counted, key=lambda pair: -len(pair[0].places)):
        singly = [([place], title) for place, title in zip(group.places, group.titles, strict=bool(group.titles))]
        for places, tooltip in singly or [(group.places, words)]:
            path = draw.add_marks(drawing, group.mark, places)
            draw.add(path, "title").text = tooltip
    return draw.markup(drawing)
