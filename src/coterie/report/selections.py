"""How experts were chosen from a bank: every adapter by its accuracy and its perplexity on the shots."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from coterie.report import marks, wording
from coterie.report.plots import Frame, Point, scatter
from coterie.report.records import Adapter, AdapterGroup, AdapterSelection, Halving
from coterie.report.scales import even_scale, scale_for

MOST_NUMBERED = 24  # points in the picture; of more only the candidates carry their number
MOST_OPEN = 12  # lines of the table; a longer one is folded away
_SMALLEST, _LARGEST = 0.7, 1.5  # of a mark, beside its usual size
_CHOSEN, _CANDIDATE, _OTHER, _DROPPED = marks.DIAMOND, marks.DISC, marks.CIRCLE, marks.CROSS
_BEST = (_CHOSEN, _CANDIDATE)
_KEY = {_CHOSEN: "chosen", _CANDIDATE: "candidate", _OTHER: "not a candidate", _DROPPED: "left out"}
_WHY = {"leak": "left out: leak", "halving": "left out by halving"}


@dataclass(frozen=True)
class AdapterLine:
    """A line of the table: the adapter's number, its mark and its fate in words."""

    number: int
    adapter: Adapter
    symbol: Markup
    fate: str


@dataclass(frozen=True)
class SelectionView:
    """All that the page shows of the selection; `sizes` are the similarities of the smallest and the largest mark."""

    picture: Markup | None
    key: tuple[tuple[Markup, str, int], ...]
    sizes: tuple[float, float] | None
    lines: tuple[AdapterLine, ...]
    groups: tuple[AdapterGroup, ...]
    halving: str
    leaks: str
    shots: int
    chosen: tuple[str, ...]

    @property
    def open(self) -> bool:
        """Whether the table is short enough to stand open."""
        return len(self.lines) <= MOST_OPEN


def selection_view(selection: AdapterSelection | None) -> SelectionView | None:
    """Draw every adapter that was scored, and list them all, best first."""
    if selection is None:
        return None
    ranked = sorted(selection.adapters, key=_place)
    lines = tuple(_line(number, adapter) for number, adapter in enumerate(ranked, start=1))
    drawn = [line for line in lines if _is_drawn(line.adapter)]
    alike = [line.adapter.similarity for line in drawn if line.adapter.similarity is not None]
    sizes = (min(alike), max(alike)) if alike and min(alike) < max(alike) else None
    kinds = [_mark(adapter) for adapter in ranked]
    return SelectionView(
        picture=_picture(drawn, sizes) if drawn else None,
        key=tuple((marks.symbol(mark), name, kinds.count(mark)) for mark, name in _KEY.items() if mark in kinds),
        sizes=sizes,
        lines=lines,
        groups=selection.groups,
        halving=_halving(selection.halving),
        leaks=_leaks(ranked),
        shots=selection.shots,
        chosen=selection.chosen,
    )


def _place(adapter: Adapter) -> tuple[bool, float, str]:
    """Sort by the sum of ranks; those without one come last."""
    return adapter.rank_sum is None, adapter.rank_sum or 0.0, adapter.name


def _is_drawn(adapter: Adapter) -> bool:
    return adapter.accuracy is not None and adapter.perplexity is not None


def _mark(adapter: Adapter) -> int:
    """Choose the mark by what became of an adapter."""
    if adapter.chosen:
        return _CHOSEN
    if adapter.dropped:
        return _DROPPED
    return _CANDIDATE if adapter.candidate else _OTHER


def _line(number: int, adapter: Adapter) -> AdapterLine:
    mark = _mark(adapter)
    fate = _WHY.get(adapter.dropped, adapter.dropped) if adapter.dropped else _KEY[mark]
    return AdapterLine(number, adapter, marks.symbol(mark), fate)


def _leaks(adapters: Sequence[Adapter]) -> str:
    """Name the adapters that were trained on what they are judged by."""
    return wording.listed([f"{one.name} ({wording.counted(one.leak, 'row')})" for one in adapters if one.leak])


def _picture(lines: Sequence[AdapterLine], sizes: tuple[float, float] | None) -> Markup:
    numbered = [line.number for line in lines if len(lines) <= MOST_NUMBERED or _mark(line.adapter) in _BEST]
    points = [_point(line, sizes, str(line.number) if line.number in numbered else "") for line in lines]
    across, up = scale_for(point.x for point in points), even_scale(point.y for point in points)
    frame = Frame(across, up, ("Perplexity of the reasoning", wording.AXES["accuracy"]))
    return scatter(points, frame, "Accuracy on the shots in % against perplexity of the reasoning")


def _point(line: AdapterLine, sizes: tuple[float, float] | None, label: str) -> Point:
    adapter = line.adapter
    place = (adapter.perplexity or 0.0, 100 * (adapter.accuracy or 0.0))
    told = f"{line.number} {adapter.name} {wording.fixed(place[1], 1)} at {wording.perplexity(place[0])}, {line.fate}"
    alike = adapter.similarity
    words = told if alike is None else f"{told}, similarity {wording.fixed(alike, 3)}"
    return Point(*place, _mark(adapter), label, words, size=_size(alike, sizes))


def _size(similarity: float | None, sizes: tuple[float, float] | None) -> float:
    """Scale a mark by the similarity to the chosen group; one without has the usual size."""
    if similarity is None or sizes is None:
        return 1.0
    return _SMALLEST + (_LARGEST - _SMALLEST) * (similarity - sizes[0]) / (sizes[1] - sizes[0])


def _halving(rounds: Sequence[Halving]) -> str:
    """Tell the rounds of successive halving in one line."""
    return "; ".join(
        f"{wording.counted(one.scored, 'adapter')} on {wording.counted(one.shots, 'shot')}, {one.kept:,} kept"
        + (f" (rank agreement τ {wording.fixed(one.tau, 2)})" if one.tau is not None else "")
        for one in rounds
    )
