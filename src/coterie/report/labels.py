"""Short labels beside points, placed so that they cover neither each other nor the points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_HEIGHT = 11.0  # px, of a label
_LETTER = 7.0  # px, width of a digit
_MARK = 6.0  # px, half the width of a point's mark
_RINGS = ((13.0, 8), (21.0, 12), (31.0, 16), (43.0, 20))  # px from the point, and places tried on the way round


@dataclass(frozen=True)
class Label:
    """Where a label's middle lies from its point, in px, and whether it needs a line that leads to it."""

    dx: float
    dy: float
    led: bool


def place_labels(points: Sequence[tuple[float, float]], texts: Sequence[str], size: tuple[float, float]) -> list[Label]:
    """Place a label beside every point, all in px within `size` (width, height).

    Each takes the nearest place that is free; where none is, the one that covers the least. A picture that is wider
    than `size` only moves points apart, so what is free in a narrow picture stays free. An empty text takes no place.
    """
    marks = [_box(x, y, 2 * _MARK, 2 * _MARK) for x, y in points]
    taken: list[tuple[float, float, float, float]] = []
    labels = []
    for (x, y), text in zip(points, texts, strict=True):
        if not text:
            labels.append(Label(0.0, 0.0, led=False))
            continue
        width = _LETTER * len(text)
        best = min(
            _places(), key=lambda label: _cost(_box(x + label.dx, y + label.dy, width, _HEIGHT), marks, taken, size)
        )
        taken.append(_box(x + best.dx, y + best.dy, width, _HEIGHT))
        labels.append(best)
    return labels


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


def _places() -> list[Label]:
    """List the places around a point, the nearest first and each ring from the right onwards."""
    return [
        Label(radius * math.cos(angle), radius * math.sin(angle), ring > 0)
        for ring, (radius, count) in enumerate(_RINGS)
        for angle in (2 * math.pi * turn / count for turn in range(count))
    ]


def _cost(
    box: tuple[float, float, float, float],
    marks: Sequence[tuple[float, float, float, float]],
    taken: Sequence[tuple[float, float, float, float]],
    size: tuple[float, float],
) -> float:
    """Measure the area in px² that a label would cover of marks, labels and what lies outside."""
    inside = _overlap(box, (0.0, 0.0, *size))
    outside = (box[2] - box[0]) * (box[3] - box[1]) - inside
    return outside + sum(_overlap(box, other) for other in (*marks, *taken))


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
