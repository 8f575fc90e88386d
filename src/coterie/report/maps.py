"""A map of points on a plane: each group has a mark of its own; distances count, directions and units do not."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from coterie.report import marks, svg

_SIDE = 240.0  # units, of the square the map is drawn on
_EDGE = 8.0  # units kept free around it


@dataclass(frozen=True)
class Group:
    """Points that share a mark and a name; `titles` say of each what it is, where that is known."""

    mark: int
    name: str
    places: tuple[tuple[float, float], ...]
    titles: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The name and the number of points."""
        return f"{self.name} {len(self.places):,}"


def fit(places: Sequence[tuple[float, float]], side: float = _SIDE) -> list[tuple[float, float]]:
    """Move and scale places so that they fill a square, both directions by the same factor."""
    lows = [min(place[axis] for place in places) for axis in (0, 1)]
    highs = [max(place[axis] for place in places) for axis in (0, 1)]
    longest = max(high - low for low, high in zip(lows, highs, strict=True)) or 1.0
    scale = (side - 2 * _EDGE) / longest
    middle = [(low + high) / 2 for low, high in zip(lows, highs, strict=True)]
    return [(side / 2 + scale * (x - middle[0]), side / 2 - scale * (y - middle[1])) for x, y in places]


def draw_map(groups: Sequence[Group], title: str, side: float = _SIDE) -> Markup:
    """Draw groups that were fitted to a square, the largest first, so that it does not cover the others."""
    words = "; ".join(group.words for group in groups)
    drawing = svg.square_picture("map", side, f"{title}: {words}")
    for group in sorted(groups, key=lambda group: -len(group.places)):
        singly = [([place], title) for place, title in zip(group.places, group.titles, strict=bool(group.titles))]
        for places, words in singly or [(group.places, group.words)]:
            path = marks.add_marks(drawing, group.mark, places)
            svg.add(path, "title").text = words
    return svg.markup(drawing)
