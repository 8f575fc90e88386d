"""Stacked areas: how shares of a whole change from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.etree import ElementTree

from markupsafe import Markup

from coterie.report import svg
from coterie.report.scales import round_step

_LEFT = 9.0  # per cent kept free for the numbers beside the areas
_TOP, _DEPTH = 18.0, 96.0  # px above the areas, and their height
_BOTTOM = _TOP + _DEPTH
_HEIGHT = 150
_MOST_NUMBERS = 6
_HIGH, _LONG = 0.25, 0.06  # the least share of the height and of the width that has room for a label


@dataclass(frozen=True)
class Band:
    """One area: its CSS class, its label, its name and its share of 1 at every step."""

    kind: str
    label: str
    name: str
    shares: tuple[float, ...]


def stacked_areas(bands: Sequence[Band], words: tuple[str, str], title: str) -> Markup:
    """Draw bands stacked from the bottom, one column for each step.

    Args:
        bands: from the bottom up, all with a share for each of the same steps, of which there is at least one.
        words: what runs upwards, and what a step is.
        title: what the picture shows, for those who do not see it.
    """
    count = len(bands[0].shares)
    drawing = svg.picture("areas", _HEIGHT, title)
    _add_axes(drawing, count, words)
    box = {"x": svg.percent(_LEFT), "y": f"{_TOP:g}", "width": svg.percent(100 - _LEFT), "height": f"{_DEPTH:g}"}
    inside = svg.add(drawing, "svg", **box, viewBox=f"0 0 {count} 100", preserveAspectRatio="none")
    tops = _tops(bands)
    for band, heights in reversed(list(zip(bands, tops, strict=True))):  # each covers the lower part of the one above
        path = svg.add(inside, "path", d=_outline(heights), **{"class": f"part {band.kind}"})
        svg.add(path, "title").text = band.name
    for band, heights in zip(bands, tops, strict=True):
        _add_label(drawing, band, heights)
    return svg.markup(drawing)


def _tops(bands: Sequence[Band]) -> list[tuple[float, ...]]:
    """Sum the shares from the bottom up, step by step."""
    sums = [0.0] * len(bands[0].shares)
    tops = []
    for band in bands:
        sums = [below + own for below, own in zip(sums, band.shares, strict=True)]
        tops.append(tuple(sums))
    return tops


def _outline(heights: Sequence[float]) -> str:
    """Outline columns down to the ground, in units of a step and of a hundredth; equal neighbours are one column."""
    way, end = "M0 100", 0
    for level, same in groupby(f"{100 * (1 - height):.1f}" for height in heights):
        end += len(list(same))
        way += f"V{level}H{end}"
    return f"{way}V100z"


def _add_label(drawing: ElementTree.Element, band: Band, tops: Sequence[float]) -> None:
    """Write a band's label in the middle of its longest part that is high enough, where it is long enough too."""
    count, end, best = len(tops), 0, (0, 0)
    for high, same in groupby(share >= _HIGH for share in band.shares):
        length = len(list(same))
        end += length
        best = max(best, (length, end)) if high else best
    length, end = best
    if length >= _LONG * count:
        middle = end - (length + 1) // 2
        x = _LEFT + (100 - _LEFT) * (middle + 0.5) / count
        y = _BOTTOM - _DEPTH * (tops[middle] - band.shares[middle] / 2)
        svg.add(drawing, "text", x=svg.percent(x), y=f"{y + 4:.1f}", **{"class": "mark on"}).text = band.label


def _add_axes(drawing: ElementTree.Element, count: int, words: tuple[str, str]) -> None:
    for share, text in ((0.0, "0"), (0.5, "0.5"), (1.0, "1")):
        y = _BOTTOM - _DEPTH * share
        svg.add(drawing, "text", x=svg.percent(_LEFT - 1), y=f"{y + 4:g}", **{"class": "right"}).text = text
    step = max(1, round(round_step(float(count), _MOST_NUMBERS)))
    for number in range(step, count + 1, step):
        x = svg.percent(_LEFT + (100 - _LEFT) * (number - 0.5) / count)
        svg.add(drawing, "line", x1=x, x2=x, y1=f"{_BOTTOM:g}", y2=f"{_BOTTOM + 4:g}", **{"class": "tick"})
        svg.add(drawing, "text", x=x, y=f"{_BOTTOM + 17:g}", **{"class": "mark"}).text = str(number)
    svg.add(drawing, "text", x="0%", y="10", **{"class": "left side"}).text = words[0]
    svg.add(drawing, "text", x="100%", y=f"{_HEIGHT - 3}", **{"class": "right side"}).text = f"{words[1]} →"
