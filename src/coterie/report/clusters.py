"""The clusters of the training rows: what each is composed of, and where its rows lie on the map."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

from markupsafe import Markup

from coterie.report import marks, wording
from coterie.report.charts import share_bar
from coterie.report.maps import Group, draw_map, fit
from coterie.report.records import Evaluation, Place

MOST_DRAWN = 2000  # points on the map; more are thinned out evenly
_MOST_PARTS = 6  # categories of a cluster named one by one
_MOST_SEEDS = 4  # maps drawn
_REST = "rest"  # the CSS class of what is not named


@dataclass(frozen=True)
class Part:
    """A part of a cluster: its label in the bar, the CSS class of its source, its name and its share of 1."""

    label: str
    kind: str
    name: str
    share: float


@dataclass(frozen=True)
class Cluster:
    """One cluster's rows by category, as a bar and in words."""

    name: str
    rows: str
    bar: Markup
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class MapPanel:
    """One map, with its key: (symbol, name, count) for every group."""

    name: str
    detail: str
    picture: Markup
    key: tuple[tuple[Markup, str, int], ...]


@dataclass(frozen=True)
class MapPanels:
    """The same points once for every seed's clusters and once for the sources."""

    drawn: int
    all: int
    panels: tuple[MapPanel, ...]


def composition(evaluation: Evaluation) -> list[Cluster]:
    """Draw every cluster as a bar whose parts are categories, numbered by size and coloured by source."""
    numbers = _source_numbers(evaluation)
    return [_cluster(name, counts, numbers) for name, counts in evaluation.composition.items() if any(counts.values())]


def _cluster(name: str, counts: dict[str, float], numbers: dict[str, int]) -> Cluster:
    total = fsum(counts.values())
    ranked = sorted(((share, category) for category, share in counts.items() if share), key=lambda p: (-p[0], p[1]))
    named = ranked if len(ranked) <= _MOST_PARTS else ranked[: _MOST_PARTS - 1]
    parts = [
        Part(str(place), marks.kind(numbers[_source_of(category)]), category, count / total)
        for place, (count, category) in enumerate(named, start=1)
    ]
    if rest := ranked[len(named) :]:
        parts.append(Part("…", _REST, f"{len(rest)} more", fsum(count for count, _ in rest) / total))
    words = ", ".join(f"{part.name} {wording.percent(part.share)}" for part in parts)
    bar = share_bar([(part.kind, part.share, part.label) for part in parts], f"{name}: {words}")
    return Cluster(name, wording.amount(total), bar, tuple(parts))


def map_panels(evaluation: Evaluation) -> MapPanels | None:
    """Draw the map once for every seed, at most four, and once by source."""
    found = evaluation.map
    if found is None or not found.places:
        return None
    places = _thinned(found.places)
    middles = fit([(place.x, place.y) for place in places])
    panels = []
    for number, (seed, agreement) in enumerate(zip(found.seeds, found.agreement, strict=True)):
        labels = [place.clusters[number] for place in places]
        detail = "" if agreement is None else f"adjusted Rand index with the sources {wording.fixed(agreement, 2)}"
        groups = _groups(labels, middles, _cluster_numbers(labels))
        panels.append(_panel(f"{found.kind} of the rows by cluster", f"Seed {seed}", detail, groups))
    sources = _groups([wording.source_name(p.source) for p in places], middles, _source_numbers(evaluation))
    by_source = _panel(f"{found.kind} of the rows", "By source", "", sources)
    return MapPanels(len(places), len(found.places), (*panels[:_MOST_SEEDS], by_source))


def _thinned(places: Sequence[Place]) -> list[Place]:
    """Take at most MOST_DRAWN of the places, evenly from the first to the last."""
    count = min(len(places), MOST_DRAWN)
    return [places[number * len(places) // count] for number in range(count)]


def _cluster_numbers(labels: Sequence[str]) -> dict[str, int]:
    """Number the largest clusters in the order in which the points meet them.

    Two seeds that split the points alike thus give them the same marks, whatever they call their clusters.
    """
    largest = {label for label, _ in Counter(labels).most_common(len(marks.OUTLINES))}
    return {label: number for number, label in enumerate(filter(largest.__contains__, dict.fromkeys(labels)))}


def _groups(names: Sequence[str], middles: Sequence[tuple[float, float]], numbers: Mapping[str, int]) -> list[Group]:
    """Group points by name; names without a mark of their own share one."""
    shared = [name for name in dict.fromkeys(names) if numbers.get(name, marks.SHARED) >= marks.SHARED]
    together = f"{len(shared)} others" if len(shared) > 1 else "".join(shared)
    held: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for name, middle in zip(names, middles, strict=True):
        group = (marks.SHARED, together) if name in shared else (numbers[name], name)
        held.setdefault(group, []).append(middle)
    return [Group(number, name, tuple(places)) for (number, name), places in sorted(held.items())]


def _panel(title: str, name: str, detail: str, groups: Sequence[Group]) -> MapPanel:
    key = tuple((marks.symbol(group.mark), group.name, len(group.places)) for group in groups)
    heading = ", ".join(filter(None, (title, name.lower(), detail)))
    return MapPanel(name, detail, draw_map(groups, heading), key)


def _source_of(category: str) -> str:
    return wording.source_name(category.split(" / ", 1)[0])


def _source_numbers(evaluation: Evaluation) -> dict[str, int]:
    """Number all sources, so that one has the same colour and mark in every picture."""
    names = (
        *evaluation.sources,
        *(source for counts in evaluation.clusters.values() for source in counts),
        *(category.split(" / ", 1)[0] for counts in evaluation.composition.values() for category in counts),
        *(place.source for place in (evaluation.map.places if evaluation.map else ())),
    )
    return {name: number for number, name in enumerate(dict.fromkeys(map(wording.source_name, names)))}
