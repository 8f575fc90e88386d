"""Tables of shaded numbers: training rows by cluster, routing weights by source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

from coterie.records.evaluation import EvaluationRecord
from coterie.records.recruits import Profile
from coterie.report import wording

SHADES = 10  # the style sheet has shades 0 to 10
_WIDE = 10  # a map of more columns has upright column names
_WIDEST = 24  # and one of more than these is printed in small letters


@dataclass(frozen=True)
class HeatMap:
    """A table of shaded numbers.

    Each line is a name and its cells, a cell (text, shade); `legend` says what the weakest and strongest shade mean,
    and `totals`, where there are any, has a number for each line, a count of rows if `total` names nothing else.
    """

    corner: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
    legend: tuple[str, str]
    totals: tuple[str, ...] = ()
    total: str = "Rows"

    @property
    def width(self) -> str:
        """The CSS classes of a wide map, whose column names stand upright, and of one that needs small letters."""
        columns = len(self.columns)
        return "wide widest" if columns > _WIDEST else "wide" if columns > _WIDE else ""


def cell(text: str, value: float, whole: float = 1.0) -> tuple[str, int]:
    """Make a cell whose shade is the value's share of a whole."""
    return text, round(SHADES * value / whole) if whole else 0


def cluster_map(evaluation: EvaluationRecord) -> HeatMap | None:
    """Count the training rows of each cluster by source; the shade is the share of the cluster."""
    grid = evaluation.clusters
    columns = _inner_names(evaluation.sources, grid)
    if not columns:
        return None
    totals = {cluster: fsum(counts.values()) for cluster, counts in grid.items()}
    lines = []
    for cluster, counts in grid.items():
        numbers = [counts.get(source, 0.0) for source in columns]
        lines.append((cluster, tuple(cell(wording.amount(number), number, totals[cluster]) for number in numbers)))
    names = tuple(map(wording.source_name, columns))
    all_rows = tuple(map(wording.amount, totals.values()))
    return HeatMap("Cluster", names, tuple(lines), ("none", "the whole cluster"), all_rows)


def category_map(evaluation: EvaluationRecord) -> HeatMap | None:
    """Count the training rows of each category by cluster; the shade is the share of the cluster."""
    grid = evaluation.composition
    categories = _inner_names((), grid)
    if not categories:
        return None
    totals = [fsum(counts.values()) for counts in grid.values()]
    lines = []
    for category in sorted(categories):
        numbers = [counts.get(category, 0.0) for counts in grid.values()]
        cells = (cell(wording.amount(number), number, total) for number, total in zip(numbers, totals, strict=True))
        lines.append((category, tuple(cells)))
    return HeatMap("Source / category", tuple(grid), tuple(lines), ("none", "the whole cluster"))


def routing_map(grid: Mapping[str, Mapping[str, float]], experts: Sequence[str], corner: str) -> HeatMap | None:
    """Show the mean weight of each expert by source or category; the darkest shade is the table's largest weight."""
    columns = _inner_names(experts, grid)
    if not columns:
        return None
    largest = max(max(weights.values(), default=0.0) for weights in grid.values())
    lines = []
    for source, weights in grid.items():
        own = [weights.get(name, 0.0) for name in columns]
        cells = tuple(cell(wording.fixed(weight, 2), weight, largest) for weight in own)
        lines.append((wording.source_name(source), cells))
    return HeatMap(corner, columns, tuple(lines), ("0", f"{wording.fixed(largest, 2)}, the largest weight"))


def profile_map(profile: Profile | None) -> HeatMap | None:
    """Show how often each expert was right, by the skill that was needed; the most frequent skills only."""
    if profile is None or not profile.skills:
        return None
    tried = [max(row[place] for row in profile.trials) for place in range(len(profile.skills))]
    chosen = sorted(range(len(tried)), key=lambda place: -tried[place])[:_WIDEST]
    lines = []
    for name, right, trials in zip(profile.experts, profile.right, profile.trials, strict=True):
        counts = [(f"{wording.amount(right[n])}/{wording.amount(trials[n])}", right[n], trials[n]) for n in chosen]
        lines.append((name, tuple(cell(*count) for count in counts)))
    return HeatMap("Expert", tuple(profile.skills[n] for n in chosen), tuple(lines), ("never right", "always right"))


def _inner_names(known: Sequence[str], grid: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """List the inner names of a grid, the known ones first and in their order."""
    present = dict.fromkeys(name for inner in grid.values() for name in inner)
    return (*(name for name in known if name in present), *(name for name in present if name not in known))
