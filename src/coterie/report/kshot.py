"""How a mixture was made from a few shots: the adapters chosen from a bank, and the rows gathered from open data."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from coterie.records.task import AdapterRecord, GatheringRecord, GroupRecord, PoolPoint, PoolSource, SelectionRecord
from coterie.records.wording import listed
from coterie.report import draw, wording
from coterie.report.plots import Frame, Group, Point, draw_map, fit, scatter
from coterie.report.scales import even_scale, scale_for

MOST_NUMBERED = 24  # points in the picture; of more only the candidates carry their number
MOST_OPEN = 12  # lines of the table; a longer one is folded away
_SMALLEST, _LARGEST = 0.7, 1.5  # of a mark, beside its usual size
_CHOSEN, _CANDIDATE, _OTHER, _DROPPED = draw.DIAMOND, draw.DISC, draw.CIRCLE, draw.CROSS
_KEY = {_CHOSEN: "chosen", _CANDIDATE: "candidate", _OTHER: "not a candidate", _DROPPED: "left out"}
_REASONS = {"leak": "left out: leak", "halving": "left out by halving"}

MOST_DRAWN = 2000  # points on the map of gathered rows
_MAP_SIDE = 420.0  # units, of that map; its marks are as small as a thousand of them need
_SHOT, _GATHERED = "shot", "chosen"
MARK_OF_OUTCOME = {
    _SHOT: draw.STAR,
    _GATHERED: draw.DISC,
    "too near to an example": draw.CROSS,
    "too near to an excluded row": draw.PLUS,
    "too near to a chosen row": draw.CIRCLE,
    "beyond the budget": draw.SHARED,
}
"""The marks of what may become of a row that was compared by its embedding; any other outcome has the shared one."""


@dataclass(frozen=True)
class AdapterLine:
    """A line of the table: the adapter's number, its mark, and what became of it in words."""

    number: int
    adapter: AdapterRecord
    mark: int
    symbol: Markup
    outcome: str


@dataclass(frozen=True)
class SelectionView:
    """All that the page shows of the selection.

    `sizes` are the similarities of the smallest and the largest mark; `open` is whether the table stands open.
    """

    picture: Markup | None
    key: tuple[tuple[Markup, str, int], ...]
    sizes: tuple[float, float] | None
    lines: tuple[AdapterLine, ...]
    groups: tuple[GroupRecord, ...]
    halving: str
    leaks: str
    shots: int
    chosen: tuple[str, ...]
    open: bool


def selection_view(selection: SelectionRecord | None) -> SelectionView | None:
    """Draw every adapter that was scored, and list them all by their sum of ranks, those without one last."""
    if selection is None:
        return None
    ranked = sorted(selection.adapters, key=lambda one: (one.rank_sum is None, one.rank_sum or 0.0, one.name))
    lines = tuple(_adapter_line(number, adapter) for number, adapter in enumerate(ranked, start=1))
    drawn = [line for line in lines if line.adapter.accuracy is not None and line.adapter.perplexity is not None]
    alike = [line.adapter.similarity for line in drawn if line.adapter.similarity is not None]
    sizes = (min(alike), max(alike)) if alike and min(alike) < max(alike) else None
    marks = [line.mark for line in lines]
    rounds = [
        f"{wording.counted(one.scored, 'adapter')} on {wording.counted(one.shots, 'shot')}, {one.kept:,} kept"
        + (f" (rank agreement τ {wording.fixed(one.tau, 2)})" if one.tau is not None else "")
        for one in selection.halving
    ]
    return SelectionView(
        picture=_selection_picture(drawn, sizes) if drawn else None,
        key=tuple((draw.symbol(mark), name, marks.count(mark)) for mark, name in _KEY.items() if mark in marks),
        sizes=sizes,
        lines=lines,
        groups=selection.subsets,
        halving="; ".join(rounds),
        leaks=listed([f"{one.name} ({wording.counted(one.leak, 'row')})" for one in ranked if one.leak]),
        shots=selection.shots,
        chosen=selection.chosen,
        open=len(lines) <= MOST_OPEN,
    )


def _adapter_line(number: int, adapter: AdapterRecord) -> AdapterLine:
    if adapter.chosen:
        mark = _CHOSEN
    elif adapter.dropped:
        mark = _DROPPED
    else:
        mark = _CANDIDATE if adapter.candidate else _OTHER
    outcome = _REASONS.get(adapter.dropped, adapter.dropped) if adapter.dropped else _KEY[mark]
    return AdapterLine(number, adapter, mark, draw.symbol(mark), outcome)


def _selection_picture(lines: Sequence[AdapterLine], sizes: tuple[float, float] | None) -> Markup:
    """Draw accuracy against perplexity, each mark the larger, the more similar the adapter is to the chosen group."""
    points = []
    for line in lines:
        adapter, size = line.adapter, 1.0
        x, y = adapter.perplexity or 0.0, 100 * (adapter.accuracy or 0.0)
        words = f"{line.number} {adapter.name} {wording.fixed(y, 1)} at {wording.perplexity(x)}, {line.outcome}"
        if adapter.similarity is not None:
            words += f", similarity {wording.fixed(adapter.similarity, 3)}"
            if sizes is not None:
                share = (adapter.similarity - sizes[0]) / (sizes[1] - sizes[0])
                size = _SMALLEST + (_LARGEST - _SMALLEST) * share
        numbered = len(lines) <= MOST_NUMBERED or line.mark in (_CHOSEN, _CANDIDATE)
        points.append(Point(x, y, line.mark, str(line.number) if numbered else "", words, size=size))
    across, up = scale_for(point.x for point in points), even_scale(point.y for point in points)
    frame = Frame(across, up, ("Perplexity of the reasoning", wording.AXES["accuracy"]))
    return scatter(points, frame, "Accuracy on the shots in % against perplexity of the reasoning")


@dataclass(frozen=True)
class OutcomeLine:
    """What became of rows: the mark on the map, where there is one, the name, and how many there are in all."""

    symbol: Markup | None
    name: str
    rows: int
    drawn: int


@dataclass(frozen=True)
class GatheringView:
    """All that the page shows of the gathered rows; `facts` are the settings in one line."""

    picture: Markup | None
    lines: tuple[OutcomeLine, ...]
    pools: tuple[PoolSource, ...]
    facts: str
    summary: str
    rows: int


def gathering_view(gathering: GatheringRecord | None) -> GatheringView | None:
    """Draw the map of the open data, and count its rows by outcome: the shots and the chosen rows first."""
    if gathering is None:
        return None
    points = gathering.map[:MOST_DRAWN]
    drawn = [point.fate for point in points]
    counts = {_SHOT: len(gathering.shots), _GATHERED: 0} | {name: round(n) for name, n in gathering.fates.items()}
    lines = tuple(
        OutcomeLine(
            draw.symbol(MARK_OF_OUTCOME.get(name, draw.SHARED)) if name in drawn else None,
            name,
            count,
            drawn.count(name),
        )
        for name, count in counts.items()
        if count or name in drawn
    )
    return GatheringView(
        picture=_gathering_map(points) if points else None,
        lines=lines,
        pools=gathering.pools,
        facts=", ".join(f"{name.replace('_', ' ')} {wording.fact(v)}" for name, v in gathering.settings.items()),
        summary=_gathering_summary(gathering),
        rows=gathering.rows,
    )


def _gathering_map(points: Sequence[PoolPoint]) -> Markup:
    """Draw every point with a tooltip of its own: its outcome, its similarity, and how its text begins."""
    held: dict[str, list[tuple[tuple[float, float], str]]] = {}
    for point, middle in zip(points, fit([(point.x, point.y) for point in points], _MAP_SIDE), strict=True):
        tooltip = point.fate
        if point.similarity is not None:
            tooltip += f", similarity {wording.fixed(point.similarity, 3)}"
        held.setdefault(point.fate, []).append((middle, f"{tooltip}: {point.label}" if point.label else tooltip))
    groups = [
        Group(
            MARK_OF_OUTCOME.get(outcome, draw.SHARED),
            outcome,
            tuple(place for place, _ in own),
            tuple(tooltip for _, tooltip in own),
        )
        for outcome, own in held.items()
    ]
    return draw_map(groups, "Map of the pool", _MAP_SIDE)


def _gathering_summary(gathering: GatheringRecord) -> str:
    """Say how similar the chosen rows are, and how many shots they answer to."""
    quantiles = gathering.similarity_quantiles
    known = ([value for value in values if value is not None] for values in (quantiles.compared, quantiles.chosen))
    # The median of evenly spaced quantiles is that of what they were taken from.
    compared, chosen = (median(values) if values else None for values in known)
    sentences = []
    if chosen is not None:
        among = "" if compared is None else f", that of all compared rows {wording.fixed(compared, 2)}"
        sentences.append(f"The median similarity of the chosen rows to the shots is {wording.fixed(chosen, 2)}{among}.")
    if gathering.shots:
        served = sum(shot.nearest_of_chosen > 0 for shot in gathering.shots)
        of_all = f"Of {wording.counted(len(gathering.shots), 'shot')}, {served:,}"
        sentences.append(f"{of_all} {'is' if served == 1 else 'are'} the nearest to at least one chosen row.")
    return " ".join(sentences)
