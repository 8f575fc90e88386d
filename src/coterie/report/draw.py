"""The parts every picture is made of: inline SVG as an XML tree, and marks that differ in shape.

Positions along x are per cent of the picture's width, so a picture fits a phone and a sheet of paper with its letters
at full size. Names enter the markup through the tree, which escapes them.
"""

from collections.abc import Iterable
from xml.etree import ElementTree

from markupsafe import Markup

_RING = "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z"
_BOX = "m-2.7-2.7h5.4v5.4h-5.4z"
_TENT = "m0-3.6l3.4 6h-6.8z"
_DIAMOND = "m0-3.9l3.3 3.9-3.3 3.9-3.3-3.9z"

# Outlines around the origin, about 6 units across; the first and the second four are told apart at a glance.
FILLED = (_RING, _TENT, _BOX, _DIAMOND)
STROKED = ("m-3.5 0h7m-3.5-3.5v7", "m-2.6-2.6l5.2 5.2m0-5.2l-5.2 5.2", "m0-3.7v7.4m-3.2-5.5l6.4 3.7m0-3.7l-6.4 3.7")
OUTLINES = (*FILLED, *STROKED, "m0 3.6l3.4-6h-6.8z", _RING, _TENT, _BOX, _DIAMOND)
DOT = "m-1.3 0a1.3 1.3 0 1 0 2.6 0a1.3 1.3 0 1 0-2.6 0z"

SHARED = len(OUTLINES)  # the number of the mark that all groups beyond the shapes share

DISC, SQUARE, DIAMOND, PLUS, CROSS, STAR, CIRCLE = 0, 2, 3, 4, 5, 6, 8


def picture(kind: str, title: str, *, height: int = 0, side: float = 0.0) -> ElementTree.Element:
    """Start a picture of a CSS class; `title` says in words what it shows.

    It is as wide as its place and `height` px high, or else a square of `side` units that grows and shrinks as a whole.
    """
    size = {"width": "100%", "height": str(height)} if height else {"viewBox": f"0 0 {side:g} {side:g}"}
    return ElementTree.Element("svg", {"class": kind, "role": "img", **size, "aria-label": title})


def add(parent: ElementTree.Element, tag: str, kind: str = "", **attributes: str) -> ElementTree.Element:
    """Add an element, of a CSS class unless `kind` is empty."""
    return ElementTree.SubElement(parent, tag, attributes | ({"class": kind} if kind else {}))


def add_line(parent: ElementTree.Element, kind: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Add a line between two places, each x in per cent and y in px."""
    (x1, y1), (x2, y2) = start, end
    add(parent, "line", kind, x1=percent(x1), y1=f"{y1:.1f}", x2=percent(x2), y2=f"{y2:.1f}")


def add_text(parent: ElementTree.Element, kind: str, x: float, y: float, words: str) -> None:
    """Add words whose foot lies at `x` per cent and `y` px; the CSS class says which end of them lies there."""
    add(parent, "text", kind, x=percent(x), y=f"{y:.1f}").text = words


def add_bar(parent: ElementTree.Element, kind: str, start: float, width: float, y: float, height: float) -> None:
    """Add a bar from `start` per cent, `width` per cent wide, with its top at `y` px."""
    add(parent, "rect", kind, x=percent(start), y=f"{y:g}", width=percent(width), height=f"{height:g}")


def add_marks(parent: ElementTree.Element, number: int, middles: Iterable[tuple[float, float]]) -> ElementTree.Element:
    """Add one path that draws a mark at every middle."""
    path = "".join(f"M{x:.1f} {y:.1f}{outline(number)}" for x, y in middles)
    return add(parent, "path", f"shape {css_class(number)}", d=path)


def css_class(number: int) -> str:
    """Name the CSS class of a mark or of an expert: it sets the colour, and whether the shape is filled."""
    return f"k{min(number, SHARED)}"


def outline(number: int) -> str:
    """Return a mark's path relative to its middle; all numbers beyond the shapes share a dot."""
    return OUTLINES[number] if number < SHARED else DOT


def symbol(number: int) -> Markup:
    """Draw a mark alone, for a key; the words beside it say the same."""
    tree = ElementTree.Element("svg", {"class": "symbol", "viewBox": "-5 -5 10 10", "aria-hidden": "true"})
    add_marks(tree, number, [(0.0, 0.0)])
    return markup(tree)


def percent(value: float) -> str:
    """Write a position along x."""
    return f"{value:.3f}%"


def markup(tree: ElementTree.Element) -> Markup:
    """Turn a tree into markup that is safe as it stands: the tree has escaped every text and attribute."""
    return Markup(ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False))
