"""The parts every picture is made of: inline SVG as an XML tree.

Positions along x are per cent of the picture's width, so a picture fits a phone and a sheet of paper with its letters
at full size. Names enter the markup through the tree, which escapes them.
"""

from xml.etree import ElementTree

from markupsafe import Markup


def picture(kind: str, height: int, title: str) -> ElementTree.Element:
    """Start a picture of a CSS class that is as wide as its place; `title` says in words what it shows."""
    attributes = {"class": kind, "role": "img", "width": "100%", "height": str(height), "aria-label": title}
    return ElementTree.Element("svg", attributes)


def square_picture(kind: str, side: float, title: str) -> ElementTree.Element:
    """Start a picture whose content, drawn on a square of `side` units, grows and shrinks as a whole."""
    attributes = {"class": kind, "role": "img", "viewBox": f"0 0 {side:g} {side:g}", "aria-label": title}
    return ElementTree.Element("svg", attributes)


def add(parent: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
    """Add an element to another."""
    return ElementTree.SubElement(parent, tag, attributes)


def inset(parent: ElementTree.Element, x: float, y: float, kind: str) -> ElementTree.Element:
    """Add a place of its own whose origin lies at `x` per cent and `y` px, and within which px count."""
    return add(parent, "svg", x=percent(x), y=f"{y:.1f}", **{"class": kind})


def percent(value: float) -> str:
    """Write a position along x."""
    return f"{value:.3f}%"


def markup(tree: ElementTree.Element) -> Markup:
    """Turn a tree into markup that is safe as it stands: the tree has escaped every text and attribute."""
    return Markup(ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False))
