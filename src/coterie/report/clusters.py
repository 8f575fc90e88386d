"""The clusters of the training rows: what each is composed of, and where its rows lie on the map."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import fsum
from typing import Any

from markupsafe import Markup

from coterie.records.evaluation import EvaluationRecord
from coterie.report import draw, wording
from coterie.report.charts import split_bar
from coterie.report.heatmaps import category_map, cluster_map
from coterie.report.plots import Group, draw_map, fit

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


def clusters_view(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Compute what the page shows of clusters; `clustered` tells whether there is anything."""
    shown = {
        "clusters": cluster_map(evaluation),
        "composition": composition(evaluation),
        "category_counts": category_map(evaluation),
        "map_panels": map_panels(evaluation),
    }
    return shown | {"clustered": any(shown.values())}


def composition(evaluation: EvaluationRecord) -> list[Cluster]:
    """Draw every cluster as a bar whose parts are categories, numbered by size and coloured by source."""
    numbers = _source_numbers(evaluation)
    clusters = []
    for name, counts in evaluation.composition.items():
        if not any(counts.values()):
            continue
        total = fsum(counts.values())
        ranked = sorted(((count, category) for category, count in counts.items() if count), key=lambda p: (-p[0], p[1]))
        named = ranked if len(ranked) <= _MOST_PARTS else ranked[: _MOST_PARTS - 1]
        parts = [
            Part(str(place), draw.css_class(numbers[_source_of(category)]), category, count / total)
            for place, (count, category) in enumerate(named, start=1)
        ]
        if rest := ranked[len(named) :]:
            parts.append(Part("…", _REST, f"{len(rest)} more", fsum(count for count, _ in rest) / total))
        words = wording.percents((part.name, part.share) for part in parts)
        bar = split_bar([(part.kind, part.share, part.label) for part in parts], f"{name}: {words}")
        clusters.append(Cluster(name, wording.amount(total), bar, tuple(parts)))
    return clusters


def map_panels(evaluation: EvaluationRecord) -> MapPanels | None:
    """Draw the map once for every seed, at most four, and once by source; of many rows an even part is drawn."""
    found = evaluation.map
    if found is None or not found.points:
        return None
    count = min(len(found.points), MOST_DRAWN)
    places = [found.points[number * len(found.points) // count] for number in range(count)]
    middles = fit([(place.x, place.y) for place in places])
    shown = []
    for number, (seed, agreement) in enumerate(zip_longest(found.seeds, found.agreement[: len(found.seeds)])):
        if number == _MOST_SEEDS:
            break
        labels = [str(place.clusters[number]) for place in places]
        detail = "" if agreement is None else f"adjusted Rand index with the sources {wording.fixed(agreement, 2)}"
        # The largest clusters are numbered in the order in which the points meet them: two seeds that split the points
        # alike thus give them the same marks, whatever they call their clusters.
        largest = {label for label, _ in Counter(labels).most_common(draw.SHARED)}
        numbers = {label: mark for mark, label in enumerate(filter(largest.__contains__, dict.fromkeys(labels)))}
        shown.append((" by cluster", f"Seed {seed}", detail, _groups(labels, middles, numbers)))
    sources = [wording.source_name(place.source) for place in places]
    shown.append(("", "By source", "", _groups(sources, middles, _source_numbers(evaluation))))
    panels = []
    for by, name, detail, groups in shown:
        title = ", ".join(filter(None, (f"{found.kind} of the rows{by}", name.lower(), detail)))
        key = tuple((draw.symbol(group.mark), group.name, len(group.places)) for group in groups)
        panels.append(MapPanel(name, detail, draw_map(groups, title), key))
    return MapPanels(count, len(found.points), tuple(panels))


def _groups(names: Sequence[str], middles: Sequence[tuple[float, float]], numbers: Mapping[str, int]) -> list[Group]:
    """Group points by name; names without a mark of their own share one."""
    shared = [name for name in dict.fromkeys(names) if numbers.get(name, draw.SHARED) >= draw.SHARED]
    together = f"{len(shared)} others" if len(shared) > 1 else "".join(shared)
    held: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for name, middle in zip(names, middles, strict=True):
        group = (draw.SHARED, together) if name in shared else (numbers[name], name)
        held.setdefault(group, []).append(middle)
    return [Group(number, name, tuple(places)) for (number, name), places in sorted(held.items())]


def _source_numbers(evaluation: EvaluationRecord) -> dict[str, int]:
    """Number all sources, so that one has the same colour and mark in every picture."""
    names = (
        *map(wording.source_name, evaluation.sources),
        *(wording.source_name(source) for counts in evaluation.clusters.values() for source in counts),
        *(_source_of(category) for counts in evaluation.composition.values() for category in counts),
        *(wording.source_name(place.source) for place in (evaluation.map.points if evaluation.map else ())),
    )
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _source_of(category: str) -> str:
    """Name the source of a "source / category"."""
    return wording.source_name(category.split(" / ", 1)[0])
