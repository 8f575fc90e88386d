"""Marks that differ in shape, so that groups of points are told apart without colour."""

from collections.abc import Iterable
from xml.etree import ElementTree

from markupsafe import Markup

from coterie.report import svg

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


def kind(number: int) -> str:
    """Name the CSS class of a mark: it sets the colour, and whether the shape is filled."""
    return f"k{min(number, SHARED)}"


def outline(number: int) -> str:
    """Return a mark's path relative to its middle; all numbers beyond the shapes share a dot."""
    return OUTLINES[number] if number < SHARED else DOT


def add_marks(parent: ElementTree.Element, number: int, middles: Iterable[tuple[float, float]]) -> ElementTree.Element:
    """Add one path that draws a mark at every middle."""
    path = "".join(f"M{x:.1f} {y:.1f}{outline(number)}" for x, y in middles)
    return svg.add(parent, "path", d=path, **{"class": f"shape {kind(number)}"})


def symbol(number: int) -> Markup:
    """Draw a mark alone, for a key; the words beside it say the same."""
    tree = ElementTree.Element("svg", {"class": "symbol", "viewBox": "-5 -5 10 10", "aria-hidden": "true"})
    add_marks(tree, number, [(0.0, 0.0)])
    return svg.markup(tree)
