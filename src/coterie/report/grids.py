"""A grid of small bars: the same shares in many places, side by side and below each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from coterie.report import svg
from coterie.report.wording import short

_LEFT = 9.0  # per cent kept free for the names of rows
_GAP = 1.0  # per cent between two bars
_TOP = 22.0  # px above the bars, for the names of columns
_ROW, _BAR = 15.0, 11.0  # px, from bar to bar, and a bar's height
_LETTERS = 12  # of a name that is not shortened


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
    drawing = svg.picture("grid-of-bars", round(_TOP + _ROW * len(rows)), title)
    width = (100 - _LEFT) / len(columns)
    for place, name in enumerate(columns):
        x = svg.percent(_LEFT + width * (place + 0.5))
        svg.add(drawing, "text", x=x, y="12", **{"class": "mark"}).text = short(name, _LETTERS)
    for place, name in enumerate(rows):
        y = f"{_TOP + _ROW * place + _BAR - 1.5:g}"
        svg.add(drawing, "text", x=svg.percent(_LEFT - _GAP), y=y, **{"class": "right"}).text = short(name, _LETTERS)
    for cell in cells:
        _add_cell(
            drawing,
            cell,
            (_LEFT + width * columns.index(cell.column), _TOP + _ROW * rows.index(cell.row)),
            width - _GAP,
        )
    return svg.markup(drawing)


def _add_cell(drawing: ElementTree.Element, cell: Cell, corner: tuple[float, float], width: float) -> None:
    x, y = corner
    group = svg.add(drawing, "g", **{"class": "framed" if cell.framed else "plain"})
    svg.add(group, "title").text = cell.words
    box = {"y": f"{y:g}", "height": f"{_BAR:g}"}
    start = x
    for kind, share in cell.parts:
        svg.add(
            group, "rect", x=svg.percent(start), width=svg.percent(width * share), **box, **{"class": f"part {kind}"}
        )
        start += width * share
    if cell.framed:
        svg.add(group, "rect", x=svg.percent(x), width=svg.percent(width), **box, **{"class": "frame"})
