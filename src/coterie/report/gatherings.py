"""What was gathered from a pool of open data: the fates of its rows, in numbers and on a map."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from coterie.report import marks, wording
from coterie.report.maps import Group, draw_map, fit
from coterie.report.records import Gathering, PoolPart, PoolPoint

MOST_DRAWN = 2000
SHOT, CHOSEN = "shot", "chosen"
MARKS = {
    SHOT: marks.STAR,
    CHOSEN: marks.DISC,
    "too near to an example": marks.CROSS,
    "too near to an excluded row": marks.PLUS,
    "too near to a chosen row": marks.CIRCLE,
    "beyond the budget": marks.SHARED,
}
"""The marks of what may become of a row that was compared by its embedding."""
_SIDE = 420.0  # units, of the map; its marks are as small as a thousand of them need


@dataclass(frozen=True)
class FateLine:
    """What became of rows: the mark on the map, where there is one, the name, and how many there are in all."""

    symbol: Markup | None
    name: str
    rows: int
    drawn: int


@dataclass(frozen=True)
class GatheringView:
    """All that the page shows of the gathered data; `facts` are its settings in one line."""

    picture: Markup | None
    lines: tuple[FateLine, ...]
    pools: tuple[PoolPart, ...]
    facts: str
    finding: str
    rows: int


def gathering_view(gathering: Gathering | None) -> GatheringView | None:
    """Draw the map of the pool, and count what became of its rows."""
    if gathering is None:
        return None
    drawn = gathering.points[:MOST_DRAWN]
    return GatheringView(
        picture=_picture(drawn) if drawn else None,
        lines=_lines(gathering, drawn),
        pools=gathering.pools,
        facts=", ".join(f"{name.replace('_', ' ')} {value}" for name, value in gathering.settings.items()),
        finding=_finding(gathering),
        rows=gathering.rows,
    )


def _lines(gathering: Gathering, drawn: Sequence[PoolPoint]) -> tuple[FateLine, ...]:
    """List the shots, then the fates with the chosen rows first, with a mark where any is drawn."""
    fates = {SHOT: len(gathering.shots), CHOSEN: 0} | {name: round(count) for name, count in gathering.fates.items()}
    on_map = [point.fate for point in drawn]
    return tuple(
        FateLine(marks.symbol(_mark(name)) if name in on_map else None, name, count, on_map.count(name))
        for name, count in fates.items()
        if count or name in on_map
    )


def _mark(fate: str) -> int:
    return MARKS.get(fate, marks.SHARED)


def _picture(points: Sequence[PoolPoint]) -> Markup:
    middles = fit([(point.x, point.y) for point in points], _SIDE)
    groups = [
        Group(_mark(fate), fate, places, labels)
        for fate in dict.fromkeys(point.fate for point in points)
        for places, labels in [_of_fate(fate, points, middles)]
    ]
    return draw_map(groups, "Map of the pool", _SIDE)


def _of_fate(
    fate: str, points: Sequence[PoolPoint], middles: Sequence[tuple[float, float]]
) -> tuple[tuple[tuple[float, float], ...], tuple[str, ...]]:
    """Take the places of a fate's points, and what each is."""
    own = [(middle, _told(point)) for point, middle in zip(points, middles, strict=True) if point.fate == fate]
    return tuple(place for place, _ in own), tuple(words for _, words in own)


def _told(point: PoolPoint) -> str:
    alike = "" if point.similarity is None else f", similarity {wording.fixed(point.similarity, 3)}"
    return f"{point.fate}{alike}: {point.label}" if point.label else f"{point.fate}{alike}"


def _finding(gathering: Gathering) -> str:
    """Say how similar the chosen rows are, and how many shots they answer to."""
    compared, chosen = gathering.median
    sentences = []
    if chosen is not None:
        among = "" if compared is None else f", that of all compared rows {wording.fixed(compared, 2)}"
        sentences.append(f"The median similarity of the chosen rows to the shots is {wording.fixed(chosen, 2)}{among}.")
    if gathering.shots:
        served = sum(count > 0 for _, count in gathering.shots)
        of_all = f"Of {wording.counted(len(gathering.shots), 'shot')}, {served:,}"
        sentences.append(f"{of_all} {'is' if served == 1 else 'are'} the nearest to at least one chosen row.")
    return " ".join(sentences)
