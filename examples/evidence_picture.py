"""A picture of the evidence: what every method gains or harms, with its interval, on every side of every mix."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from evidence_tables import BACKBONE, BASE, Difference, differences, read

from coterie.records.evaluation import LEVEL
from coterie.report.scales import Scale, even_scale

WIDTH, EDGE, NAMES, ROW, HEAD, FOOT, GAP = 960, 12, 190, 22, 44, 46, 52  # px
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #222 } .title { font-weight: 600 } .small { font-size: 11px; fill: #666 }
.grid { stroke: #ddd } .zero { stroke: #555 } .interval { stroke-width: 2 } circle { stroke-width: 2 }
.better { stroke: #1f6fb4; fill: #1f6fb4 } .worse { stroke: #c8501e; fill: #c8501e } .open { stroke: #777; fill: #fff }
rect { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .small { fill: #aaa } .grid { stroke: #333 }
.zero { stroke: #999 } .better { stroke: #6ab0ea; fill: #6ab0ea } .worse { stroke: #f08a5a; fill: #f08a5a }
.open { stroke: #999; fill: #111 } rect { fill: #111 } }
"""


class Panel(NamedTuple):
    """What methods have more than the base adapter on some rows, in nats a token."""

    title: str
    methods: Mapping[str, Difference]

    @classmethod
    def of(cls, title: str, folders: Sequence[Path]) -> "Panel | None":
        """Read the likelihoods of evaluations of the same rows with other seeds; None where there are none.

        The backbone, which was trained on nothing, is left out: beside it nothing else would be seen.
        """
        for measure in read(folders):
            if measure.name == "NLL" and BASE in measure.values:
                pairs = [(name, BASE) for name in measure.values if name not in (BACKBONE, BASE)]
                found = differences(measure, pairs)
                return cls(f"{title} ({len(measure.weights)} rows)", {name: own for (name, _), own in found.items()})
        return None


def picture(mixes: Mapping[str, Sequence[Panel]]) -> str:
    """Draw the panels of every mix side by side on one scale, and the mixes below each other, as SVG."""
    drawn, top = [], 0.0
    for mix, panels in mixes.items():
        names = list(dict.fromkeys(name for panel in panels for name in panel.methods))
        bottom = top + HEAD + ROW * len(names)
        drawn.append(_text(EDGE, top + 20, mix, "title"))
        drawn += [_text(EDGE, top + HEAD + ROW * (place + 0.7), name) for place, name in enumerate(names)]
        gaps = [own.gap for panel in panels for own in panel.methods.values() if own.gap and own.gap.ends]
        axis = even_scale([end for gap in gaps for end in (gap.low, gap.high)], around_zero=True)
        width = (WIDTH - NAMES) / len(panels)
        for place, panel in enumerate(panels):
            left = NAMES + place * width
            drawn += _panel(panel, names, axis, (left, left + width - GAP), (top, bottom))
        top = bottom + FOOT
    key = "nats a token more than the base adapter, with 95% intervals; filled: significant after Holm's correction"
    drawn.append(_text(EDGE, top + 12, f"{key}; left of the line is better", "small"))
    size = f'width="{WIDTH}" height="{top + 24:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {top + 24:.0f}" role="img">'
    return f'{head}<style>{STYLE}</style><rect width="100%" height="100%"/>{"".join(drawn)}</svg>\n'


def _panel(
    panel: Panel, names: Sequence[str], axis: Scale, across: tuple[float, float], down: tuple[float, float]
) -> Iterator[str]:
    (left, right), (top, bottom) = across, down
    yield _text((left + right) / 2, top + 20, panel.title, "title", "middle")

    def x(value: float) -> float:
        return left + (right - left) * axis.share(value)

    for mark in axis.marks:
        kind = "zero" if abs(mark) < axis.step / 2 else "grid"
        yield f'<path class="{kind}" d="M{x(mark):.1f} {top + HEAD - 8:.1f}V{bottom:.1f}"/>'
        yield _text(x(mark), bottom + 16, f"{mark:+.{axis.decimals}f}" if kind == "grid" else "0", "small", "middle")
    for place, name in enumerate(names):
        if (own := panel.methods.get(name)) is None:
            continue
        y, value = top + HEAD + ROW * (place + 0.5), own.gap.value if own.gap else 0.0
        kind = "open" if own.p >= LEVEL else "better" if value < 0 else "worse"
        yield f"<g><title>{escape(f'{name}, {panel.title}: {own}, p = {own.p:.4f}')}</title>"
        if own.gap and own.gap.ends:
            yield f'<path class="interval {kind}" d="M{x(own.gap.low):.1f} {y:.1f}H{x(own.gap.high):.1f}"/>'
        yield f'<circle class="{kind}" cx="{x(value):.1f}" cy="{y:.1f}" r="4"/></g>'


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'
