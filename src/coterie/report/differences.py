"""The pictures of the differences to the control, overall and source by source."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from coterie.report import wording
from coterie.report.charts import Axis, Interval, axis_for, interval_chart
from coterie.report.records import MEASURES, OVERALL, Evaluation, Score

FAR = 8  # a difference this many times as large as the median one would press all others together


@dataclass(frozen=True)
class Panels:
    """The pictures of one source: the methods from top to bottom and one (measure, picture) for each measure."""

    name: str
    detail: str
    methods: tuple[str, ...]
    pictures: tuple[tuple[str, Markup], ...]


def difference_panels(evaluation: Evaluation, sources: Sequence[str]) -> list[Panels]:
    """Draw the differences of every method to the control, all sources given on the same axes."""
    compared = {source: [s for s in evaluation.scores(source) if s.method != evaluation.control] for source in sources}
    scores = [score for of_source in compared.values() for score in of_source]
    axes = {
        measure: _axis(scores, measure) for measure in MEASURES if any(score.difference(measure) for score in scores)
    }
    return [
        Panels(
            name="All rows" if source == OVERALL else wording.source_name(source),
            detail=f"{wording.counted(of_source[0].rows, 'row')}, {of_source[0].graded:,} graded",
            methods=tuple(score.method for score in of_source),
            pictures=tuple(
                (measure, _picture(of_source, measure, axis, evaluation.control)) for measure, axis in axes.items()
            ),
        )
        for source, of_source in compared.items()
        if of_source and axes
    ]


def _axis(scores: Sequence[Score], measure: str) -> Axis:
    """Choose an axis for most differences; those that are many times as large as most are written at its end."""
    gaps = [gap for score in scores if (gap := score.difference(measure))]
    reaches = [[wording.UNITS[measure] * end for end in (gap.value, *(gap.interval or ()))] for gap in gaps]
    sizes = [max(map(abs, ends)) for ends in reaches]
    most = FAR * median(sizes)
    return axis_for(end for ends, size in zip(reaches, sizes, strict=True) if size <= most or not most for end in ends)


def _picture(scores: Sequence[Score], measure: str, axis: Axis, control: str) -> Markup:
    where = "all rows" if scores[0].source == OVERALL else wording.source_name(scores[0].source)
    name = "Accuracy, points" if measure == "accuracy" else "NLL, nats a token"
    sides = ("← worse", "points", "better →") if measure == "accuracy" else ("← better", "nats a token", "worse →")
    return interval_chart(
        [_interval(score, measure) for score in scores],
        axis,
        sides,
        f"{name} above {wording.method_name(control)}, {where}",
    )


def _interval(score: Score, measure: str) -> Interval | None:
    gap, scale = score.difference(measure), wording.UNITS[measure]
    if gap is None:
        return None
    write = wording.points if measure == "accuracy" else wording.nats
    ends = (scale * gap.interval[0], scale * gap.interval[1]) if gap.interval else None
    words = f"{wording.method_name(score.method)} {write(gap.value)} ({wording.span(gap, measure)})"
    return Interval(scale * gap.value, ends, gap.clear, words)
