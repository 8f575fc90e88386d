"""How the methods compare: their differences to the control, their variants, and their costs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from markupsafe import Markup

from coterie.records.evaluation import MEASURES, OVERALL, EvaluationRecord, TableRow
from coterie.report import draw, wording
from coterie.report.charts import Interval, interval_chart, split_bar
from coterie.report.plots import Frame, Point, curve, scatter
from coterie.report.scales import Scale, even_scale, scale_for

FAR = 8  # a difference this many times as large as the median one would press all others together
_ANSWERING = ("generate", "score")  # the stages of `seconds` that answer the test's rows
_VARIANT = re.compile(r"([^:]+):([^:=,]+)=([^:=,]+)")  # method:parameter=value
_ALL_EXPERTS = "top_k"  # the parameter whose plain method takes every expert
_EVERY = "every"  # the parameter (tokens) whose plain method is 1, and which may be infinite
_GIGABYTE = 1e9
_BEYOND = 2  # an infinite value is drawn at so many times the largest finite one


@dataclass(frozen=True)
class Panels:
    """The differences of one source: the methods from top to bottom and one (measure, picture) for each measure."""

    name: str
    detail: str
    methods: tuple[str, ...]
    pictures: tuple[tuple[str, Markup], ...]


def difference_panels(evaluation: EvaluationRecord, sources: Sequence[str]) -> list[Panels]:
    """Draw the differences of every method to the control, all sources given on the same axes."""
    compared = {source: [s for s in evaluation.scores(source) if s.method != evaluation.control] for source in sources}
    scores = [score for of_source in compared.values() for score in of_source]
    axes = {}
    for measure in MEASURES:
        gaps = [gap for score in scores if (gap := score.difference(measure))]
        if gaps:
            reaches = [[wording.UNITS[measure] * end for end in (gap.value, *(gap.interval or ()))] for gap in gaps]
            sizes = [max(map(abs, ends)) for ends in reaches]
            most = FAR * median(sizes)  # what lies beyond is written at the end of the axis
            kept = [ends for ends, size in zip(reaches, sizes, strict=True) if size <= most or not most]
            axes[measure] = even_scale((end for ends in kept for end in ends), around_zero=True)
    return [
        Panels(
            name="All rows" if source == OVERALL else wording.source_name(source),
            detail=f"{wording.counted(of_source[0].rows, 'row')}, {of_source[0].graded:,} graded",
            methods=tuple(score.method for score in of_source),
            pictures=tuple(
                (measure, _difference_picture(of_source, measure, axis, evaluation.control))
                for measure, axis in axes.items()
            ),
        )
        for source, of_source in compared.items()
        if of_source and axes
    ]


def _difference_picture(scores: Sequence[TableRow], measure: str, axis: Scale, control: str) -> Markup:
    where = "all rows" if scores[0].source == OVERALL else wording.source_name(scores[0].source)
    name = "Accuracy, points" if measure == "accuracy" else "NLL, nats a token"
    sides = ("← worse", "points", "better →") if measure == "accuracy" else ("← better", "nats a token", "worse →")
    unit = wording.UNITS[measure]
    intervals: list[Interval | None] = []
    for score in scores:
        if (gap := score.difference(measure)) is None:
            intervals.append(None)
            continue
        ends = (unit * gap.interval[0], unit * gap.interval[1]) if gap.interval else None
        difference = f"{wording.above(gap.value, measure)} ({wording.span(gap, measure)})"
        words = f"{wording.method_name(score.method)} {difference}"
        intervals.append(Interval(unit * gap.value, ends, gap.sure, words))
    return interval_chart(intervals, axis, sides, f"{name} above {wording.method_name(control)}, {where}")


@dataclass(frozen=True)
class VariantPictures:
    """One method's curves over one parameter: (measure, picture) for each measure."""

    method: str
    parameter: str
    pictures: tuple[tuple[str, Markup], ...]


@dataclass(frozen=True)
class _Variant:
    """One variant on the way along a parameter; `plain` where it is the method as it is."""

    value: float
    method: str
    label: str
    plain: bool = False


def variant_pictures(evaluation: EvaluationRecord) -> list[VariantPictures]:
    """Draw every parameter of which a method has two variants or more, the plain method being one of them."""
    groups: dict[tuple[str, str], dict[float, _Variant]] = {}
    for method in evaluation.methods:
        if found := _VARIANT.fullmatch(method):
            base, parameter, text = found.groups()
            try:
                value = float(text)
            except ValueError:
                continue
            if math.isfinite(value) or (parameter, text) == (_EVERY, "inf"):
                groups.setdefault((base, parameter), {})[value] = _Variant(value, method, _label(value))
    shown = []
    for (base, parameter), variants in groups.items():
        plain = _plain_method(evaluation, base, parameter, max(variants))
        way = sorted((variants | ({plain.value: plain} if plain else {})).values(), key=lambda stop: stop.value)
        end = _BEYOND * max((stop.value for stop in way if stop.value < math.inf), default=1.0)
        way = [replace(stop, value=end) if stop.value == math.inf else stop for stop in way]
        words = "tokens between two routings" if parameter == _EVERY else parameter
        pictures = [(measure, _variant_picture(evaluation, words, way, measure)) for measure in MEASURES]
        shown.append(VariantPictures(base, words, tuple((measure, drawn) for measure, drawn in pictures if drawn)))
    return [variants for variants in shown if variants.pictures]


def _label(value: float) -> str:
    return "∞" if value == math.inf else f"{value:,.10g}"


def _plain_method(evaluation: EvaluationRecord, base: str, parameter: str, largest: float) -> _Variant | None:
    """Place the plain method: at the recorded value of the parameter, or beyond the largest number of experts."""
    if base not in evaluation.methods:
        return None
    if isinstance(value := evaluation.features.get(parameter), int | float):
        return _Variant(float(value), base, _label(float(value)), plain=True)
    if parameter == _EVERY:
        return _Variant(1.0, base, "1", plain=True)
    if parameter == _ALL_EXPERTS:
        return _Variant(max(largest + 1, float(len(evaluation.experts))), base, "all", plain=True)
    return None


def _variant_picture(evaluation: EvaluationRecord, parameter: str, way: list[_Variant], measure: str) -> Markup | None:
    unit, decimals = wording.UNITS[measure], wording.DECIMALS[measure]
    points = []
    for stop in way:
        score = evaluation.score(stop.method)
        if score is None or (value := score.value(measure)) is None:
            continue
        words = f"{wording.method_name(stop.method)} {wording.fixed(unit * value, decimals)}"
        ends, gap = None, score.difference(measure)
        if gap and gap.interval:  # the interval is laid on the control's value, so that one sees it cross or not
            low, high = (unit * (value - gap.value + end) for end in gap.interval)
            ends, words = (low, high), f"{words} (difference {wording.span(gap, measure)})"
        mark = draw.DIAMOND if stop.plain else draw.DISC
        points.append(Point(stop.value, unit * value, mark, stop.label, words, ends))
    if len(points) < 2:
        return None
    control = evaluation.score(evaluation.control)
    level = control.value(measure) if control else None
    heights = [value for point in points for value in (point.y, *(point.ends or ()))]
    title = f"{wording.AXES[measure]} over {parameter}"
    if level is not None:
        level *= unit
        heights.append(level)
        title += f", {wording.method_name(evaluation.control)} at {wording.fixed(level, decimals)}"
    across = replace(scale_for(point.x for point in points), low=points[0].x, high=points[-1].x)
    frame = Frame(across, even_scale(heights), (parameter, wording.AXES[measure]), turned=measure == "nll")
    return curve(points, frame, title, level)


def cost_table(evaluation: EvaluationRecord) -> list[dict[str, Any]]:
    """List what each method took, with a bar of what answering took on one scale for all.

    Where nothing was generated, scoring the references stands for answering. What was done for several methods at once
    is none of theirs: it has a line of its own behind them.
    """
    measured = {*evaluation.seconds, *evaluation.memory}
    spent = {method: evaluation.seconds.get(method, {}) for method in evaluation.methods if method in measured}
    stage = next((stage for stage in _ANSWERING if any(stage in stages for stages in spent.values())), "score")
    longest = max((stages.get(stage, 0.0) for stages in spent.values()), default=0.0)
    table = []
    for method, stages in spent.items():
        took = stages.get(stage)
        words = f"{wording.method_name(method)}: {wording.amount(took, 1)} seconds"
        table.append(
            {
                "method": method,
                "train": stages.get("train"),
                "generate": stages.get("generate"),
                "a_row": took / evaluation.rows if took is not None and evaluation.rows else None,
                "tokens": evaluation.answer_tokens.get(method),
                "memory": evaluation.memory[method] / _GIGABYTE if method in evaluation.memory else None,
                "score": stages.get("score"),
                "shared": any(method in one.methods and one.stage == "score" for one in evaluation.shared_seconds),
                "bar": split_bar([(stage, took or 0.0, "")], words, longest),
            }
        )
    return table


@dataclass(frozen=True)
class CostPictures:
    """Quality against cost: one (title, picture) for each cost, and the methods by their number in both."""

    pictures: tuple[tuple[str, Markup], ...]
    names: tuple[tuple[int, str, Markup], ...]


def cost_pictures(evaluation: EvaluationRecord) -> CostPictures | None:
    """Draw quality against seconds a row and against memory, as far as the records tell them for two methods.

    Variants are left out: they have pictures of their own.
    """
    measure = "accuracy" if any(score.accuracy is not None for score in evaluation.scores()) else "nll"
    known = {score.method: value for score in evaluation.scores() if (value := score.value(measure)) is not None}
    for method in list(known):
        if (found := _VARIANT.fullmatch(method)) and found[1] in evaluation.methods:
            del known[method]
    numbers = {method: number for number, method in enumerate(known, start=1)}
    special = {evaluation.control: draw.SQUARE, evaluation.subject: draw.DIAMOND}
    marks = {method: special.get(method, draw.CIRCLE) for method in known}
    spent = {m: stages.get("generate") or stages.get("score") for m, stages in evaluation.seconds.items()}
    rows = evaluation.rows
    costs: dict[str, Mapping[str, float]] = {
        "Seconds to answer a row": {method: seconds / rows for method, seconds in spent.items() if seconds and rows},
        "Memory in GB": {method: held / _GIGABYTE for method, held in evaluation.memory.items()},
    }
    pictures = []
    for title, cost in costs.items():
        points = []
        for method in known:
            if method not in cost:
                continue
            x, y = cost[method], wording.UNITS[measure] * known[method]
            words = f"{numbers[method]} {wording.method_name(method)} {y:.3g} at {x:.3g}"
            points.append(Point(x, y, marks[method], str(numbers[method]), words))
        if len(points) > 1:
            across, up = scale_for(point.x for point in points), even_scale(point.y for point in points)
            frame = Frame(across, up, (title, wording.AXES[measure]), turned=measure == "nll")
            against = f"{wording.AXES[measure]} against {title[0].lower()}{title[1:]}"
            pictures.append((title, scatter(points, frame, against)))
    names = [(number, method, draw.symbol(marks[method])) for method, number in numbers.items()]
    return CostPictures(tuple(pictures), tuple(names)) if pictures else None
