"""The page: what stands where, filled into the template that lies beside this file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from coterie.artifacts import write_text
from coterie.report import examples, wording
from coterie.report.charts import Axis, Interval, axis_for, interval_chart, split_bar
from coterie.report.records import OVERALL, Difference, Evaluation, Row, Score, read_evaluation

if TYPE_CHECKING:
    from jinja2 import Template

SHADES = 10  # the style sheet has shades 0 to 10
MOST_LETTERS = 1500  # of a text in an example; the whole text is in rows.jsonl
MOST_OPEN_SOURCES = 6  # the pictures of more sources than these are folded away
MOST_NAMED = 8  # sources named among the facts; more are counted
MOST_WEIGHTS = 6  # experts named one by one in an example
_WIDE = 10  # a map of more columns has upright column names
_WIDEST = 24  # and one of more than these is printed in small letters
_MEASURES = ("accuracy", "nll")


@dataclass(frozen=True)
class HeatMap:
    """A table of shaded numbers.

    Each line is a name and its cells, a cell (text, shade); `legend` says what the weakest and strongest shade mean,
    and `totals`, where there are any, has a number for each line.
    """

    corner: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
    legend: tuple[str, str]
    totals: tuple[str, ...] = ()

    @property
    def wide(self) -> bool:
        """Whether the column names stand upright."""
        return len(self.columns) > _WIDE

    @property
    def widest(self) -> bool:
        """Whether the map fits a sheet of paper in small letters only."""
        return len(self.columns) > _WIDEST


@dataclass(frozen=True)
class Panels:
    """The pictures of one source: the methods from top to bottom and one (measure, picture) for each measure."""

    name: str
    detail: str
    methods: tuple[str, ...]
    pictures: tuple[tuple[str, Markup], ...]


def write_report(evaluation: Path) -> Path:
    """Write `report.html` into an evaluation's folder, whole or not at all, and return its path.

    The page is self-contained (no script, no request), and the same records give the same bytes.

    Raises:
        CoterieError: when the records are missing or wrong, or the folder cannot be written.
    """
    path = evaluation / "report.html"
    write_text(path, render(read_evaluation(evaluation)))
    return path


def render(evaluation: Evaluation) -> str:
    """Fill the template: the page as one text."""
    return _template().render(**view(evaluation))


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    room = files("coterie.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name in ("fixed", "percent", "points", "nats", "seconds", "counted", "short", "span"):
        environment.filters[name] = getattr(wording, name)
    environment.filters |= {"cut": _cut, "source": _source_name}
    style = Markup(room.joinpath("style.css").read_text(encoding="utf-8"))
    return environment.from_string(room.joinpath("template.html").read_text(encoding="utf-8"), {"style": style})


def view(evaluation: Evaluation) -> dict[str, Any]:
    """Compute all that the template shows."""
    sources = _scored_sources(evaluation)
    return {
        "evaluation": evaluation,
        "headline": wording.headline(evaluation),
        "facts": _facts(evaluation),
        "overall": [score for method in evaluation.methods if (score := evaluation.score(method))],
        "by_source": {source: _scores(evaluation, source) for source in sources},
        "overall_panels": _panels(evaluation, (OVERALL,)),
        "source_panels": _panels(evaluation, sources),
        "open_sources": len(sources) <= MOST_OPEN_SOURCES,
        "clusters": _cluster_map(evaluation),
        "routing": _routing_map(evaluation),
        "costs": _costs(evaluation),
        "examples": _examples(evaluation),
        "tally": _tally(evaluation),
    }


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    graded = max((score.graded for score in evaluation.table if score.source == OVERALL), default=0)
    facts = [
        ("Base model", evaluation.base_model.get("id", "")),
        ("Mixture", evaluation.mixture),
        ("Experts", f"{len(evaluation.experts)}"),
        ("Control", evaluation.control),
        ("Test data", evaluation.data),
        ("Rows", f"{len(evaluation.rows):,}, of which {graded:,} graded"),
        ("Sources", _listed([_source_name(source) for source in evaluation.sources])),
        ("Hardware", _pairs(evaluation.hardware)),
        ("Settings", _pairs(evaluation.settings)),
        ("Revision of the base model", evaluation.base_model.get("revision", "")),
        ("SHA-256 of the base model", evaluation.base_model.get("sha256", "")),
    ]
    return [(name, value) for name, value in facts if value]


def _pairs(facts: Mapping[str, str]) -> str:
    """Write facts as one line; the one called `name` needs no name."""
    told = {name: value for name, value in facts.items() if value not in ("", "null")}
    return ", ".join(value if name == "name" else f"{name.replace('_', ' ')} {value}" for name, value in told.items())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)}"


def _scored_sources(evaluation: Evaluation) -> tuple[str, ...]:
    named = [*evaluation.sources, *(score.source for score in evaluation.table)]
    return tuple(source for source in dict.fromkeys(named) if source != OVERALL and _scores(evaluation, source))


def _scores(evaluation: Evaluation, source: str) -> list[Score]:
    return [score for method in evaluation.methods if (score := evaluation.score(method, source))]


def _panels(evaluation: Evaluation, sources: Sequence[str]) -> list[Panels]:
    """Draw the differences of every method to the control, all sources given on the same axes."""
    compared = {
        source: [s for s in _scores(evaluation, source) if s.method != evaluation.control] for source in sources
    }
    scores = [score for of_source in compared.values() for score in of_source]
    axes = {measure: _axis(scores, measure) for measure in _MEASURES if any(_gap(score, measure) for score in scores)}
    return [
        Panels(
            name="All rows" if source == OVERALL else _source_name(source),
            detail=f"{wording.counted(of_source[0].rows, 'row')}, {of_source[0].graded:,} graded",
            methods=tuple(score.method for score in of_source),
            pictures=tuple(
                (measure, _picture(of_source, measure, axis, evaluation.control)) for measure, axis in axes.items()
            ),
        )
        for source, of_source in compared.items()
        if of_source and axes
    ]


def _gap(score: Score, measure: str) -> Difference | None:
    return score.accuracy_difference if measure == "accuracy" else score.nll_difference


def _scale(measure: str) -> float:
    return 100.0 if measure == "accuracy" else 1.0  # accuracy is drawn in points


def _axis(scores: Sequence[Score], measure: str) -> Axis:
    gaps = [gap for score in scores if (gap := _gap(score, measure))]
    return axis_for(_scale(measure) * end for gap in gaps for end in (gap.value, *(gap.interval or ())))


def _picture(scores: Sequence[Score], measure: str, axis: Axis, control: str) -> Markup:
    where = "all rows" if scores[0].source == OVERALL else _source_name(scores[0].source)
    name = "Accuracy, points" if measure == "accuracy" else "NLL, nats a token"
    sides = ("← worse", "points", "better →") if measure == "accuracy" else ("← better", "nats a token", "worse →")
    return interval_chart(
        [_interval(score, measure) for score in scores], axis, sides, f"{name} above {control}, {where}"
    )


def _interval(score: Score, measure: str) -> Interval | None:
    gap, scale = _gap(score, measure), _scale(measure)
    if gap is None:
        return None
    write = wording.points if measure == "accuracy" else wording.nats
    ends = (scale * gap.interval[0], scale * gap.interval[1]) if gap.interval else None
    return Interval(
        scale * gap.value, ends, gap.clear, f"{score.method} {write(gap.value)} ({wording.span(gap, measure)})"
    )


def _cluster_map(evaluation: Evaluation) -> HeatMap | None:
    """Count the training rows of each cluster by source; the shade is the share of the cluster."""
    grid = evaluation.clusters
    columns = _keys(evaluation.sources, grid)
    if not columns:
        return None
    lines = []
    for cluster, counts in grid.items():
        total = fsum(counts.values())
        cells = [
            (wording.amount(counts.get(source, 0.0)), _shade(counts.get(source, 0.0), total)) for source in columns
        ]
        lines.append((cluster, tuple(cells)))
    totals = tuple(wording.amount(fsum(counts.values())) for counts in grid.values())
    return HeatMap("Cluster", tuple(map(_source_name, columns)), tuple(lines), ("none", "the whole cluster"), totals)


def _routing_map(evaluation: Evaluation) -> HeatMap | None:
    """Show the mean weight of each expert by source; the darkest shade is the largest weight of the table."""
    grid = evaluation.routing
    columns = _keys(evaluation.experts, grid)
    if not columns:
        return None
    largest = max(max(weights.values(), default=0.0) for weights in grid.values())
    lines = [
        (
            _source_name(source),
            tuple(
                (wording.fixed(weights.get(name, 0.0), 2), _shade(weights.get(name, 0.0), largest)) for name in columns
            ),
        )
        for source, weights in grid.items()
    ]
    return HeatMap("Source", columns, tuple(lines), ("0", f"{wording.fixed(largest, 2)}, the largest weight"))


def _keys(known: Sequence[str], grid: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """List the inner names of a grid, the known ones first and in their order."""
    present = dict.fromkeys(name for inner in grid.values() for name in inner)
    return (*(name for name in known if name in present), *(name for name in present if name not in known))


def _shade(value: float, largest: float) -> int:
    return round(SHADES * value / largest) if largest else 0


def _costs(evaluation: Evaluation) -> list[dict[str, Any]]:
    """List what each method took, with a bar on one scale for all."""
    spent = {method: evaluation.seconds[method] for method in evaluation.methods if method in evaluation.seconds}
    longest = max((_total(stages) for stages in spent.values()), default=0.0)
    return [
        {
            "method": method,
            "generate": stages.get("generate"),
            "score": stages.get("score"),
            "total": _total(stages),
            "a_row": _total(stages) / len(evaluation.rows) if evaluation.rows else None,
            "bar": split_bar(
                [(stage, stages.get(stage, 0.0)) for stage in ("generate", "score")],
                longest,
                f"{method}: {wording.seconds(_total(stages))} seconds",
            ),
        }
        for method, stages in spent.items()
    ]


def _total(stages: Mapping[str, float]) -> float:
    return stages.get("generate", 0.0) + stages.get("score", 0.0)


def _examples(evaluation: Evaluation) -> list[dict[str, Any]]:
    order = {method: number for number, method in enumerate(evaluation.methods)}
    shown = []
    for kind, row in examples.choose(evaluation.rows, evaluation.subject, evaluation.control):
        answers = sorted(row.answers, key=lambda answer: order.get(answer.method, len(order)))
        shown.append({"kind": kind, "row": row, "answers": examples.alike(answers), "weights": _weights(row)})
    return shown


def _weights(row: Row) -> list[tuple[str, float]]:
    """List the largest weights, and the sum of the rest under one name when there are many."""
    ranked = sorted(row.weights.items(), key=lambda pair: -pair[1])
    if len(ranked) <= MOST_WEIGHTS:
        return ranked
    rest = ranked[MOST_WEIGHTS - 1 :]
    return [*ranked[: MOST_WEIGHTS - 1], (f"{len(rest)} others together", fsum(weight for _, weight in rest))]


def _tally(evaluation: Evaluation) -> list[tuple[str, int]]:
    """Count the rows of each kind over the whole test."""
    found = [examples.kind_of(row, evaluation.subject, evaluation.control) for row in evaluation.rows]
    return [
        (kind, found.count(kind)) for kind in examples.kinds(evaluation.subject, evaluation.control) if kind in found
    ]


def _cut(text: str) -> str:
    left_out = len(text) - MOST_LETTERS
    return text if left_out <= 0 else f"{text[:MOST_LETTERS]} … ({left_out:,} more characters in rows.jsonl)"


def _source_name(source: str) -> str:
    return source or "no source"
