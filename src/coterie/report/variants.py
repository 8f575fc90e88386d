"""Curves over a method's variants: how accuracy and NLL change with one number, all else being equal."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from coterie.report import marks, wording
from coterie.report.plots import Frame, Point, curve
from coterie.report.records import MEASURES, Evaluation, Score
from coterie.report.scales import even_scale, scale_for

_VARIANT = re.compile(r"([^:]+):([^:=,]+)=([^:=,]+)")  # method:parameter=value
_ALL_EXPERTS = "top_k"  # the parameter whose plain method takes every expert
_RENEWED = "every"  # the parameter whose plain method is 1, and which may be infinite
_BEYOND = 2  # an infinite value is drawn at so many times the largest finite one
_WORDS = {_RENEWED: "tokens between two routings"}


@dataclass(frozen=True)
class VariantPictures:
    """One method's curves over one parameter: (measure, picture) for each measure."""

    method: str
    parameter: str
    pictures: tuple[tuple[str, Markup], ...]


@dataclass(frozen=True)
class _Stop:
    """One variant on the way along a parameter."""

    value: float
    label: str
    method: str
    plain: bool = False


def variant_pictures(evaluation: Evaluation) -> list[VariantPictures]:
    """Draw every parameter of which a method has two variants or more, the plain method being one of them."""
    groups: dict[tuple[str, str], list[_Stop]] = {}
    for method in evaluation.methods:
        if found := _VARIANT.fullmatch(method):
            base, parameter, text = found.groups()
            if (value := _number(parameter, text)) is not None:
                groups.setdefault((base, parameter), []).append(_Stop(value, _label(value), method))
    drawn = [_draw(evaluation, base, parameter, stops) for (base, parameter), stops in groups.items()]
    return [variants for variants in drawn if variants.pictures]


def _draw(evaluation: Evaluation, base: str, parameter: str, stops: list[_Stop]) -> VariantPictures:
    stops = [*stops, *_plain(evaluation, base, parameter, stops)]
    way = sorted({stop.value: stop for stop in stops}.values(), key=lambda stop: stop.value)
    end = _BEYOND * max((stop.value for stop in way if stop.value < math.inf), default=1.0)
    way = [replace(stop, value=end) if stop.value == math.inf else stop for stop in way]
    words = _WORDS.get(parameter, parameter)
    pictures = (_picture(evaluation, words, way, measure) for measure in MEASURES)
    return VariantPictures(base, words, tuple(picture for picture in pictures if picture))


def is_variant(method: str, methods: Sequence[str]) -> bool:
    """Tell whether a method is a variant of another among the methods."""
    found = _VARIANT.fullmatch(method)
    return found is not None and found[1] in methods


def _label(value: float) -> str:
    return "∞" if value == math.inf else f"{value:,.10g}"


def _number(parameter: str, text: str) -> float | None:
    if (parameter, text) == (_RENEWED, "inf"):
        return math.inf
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _plain(evaluation: Evaluation, base: str, parameter: str, stops: list[_Stop]) -> list[_Stop]:
    """Place the plain method: at the recorded value of the parameter, or beyond the largest number of experts."""
    if base not in evaluation.methods:
        return []
    if parameter in evaluation.features:
        value = evaluation.features[parameter]
        return [_Stop(value, _label(value), base, plain=True)]
    if parameter == _RENEWED:
        return [_Stop(1.0, "1", base, plain=True)]
    if parameter == _ALL_EXPERTS:
        largest = max(stop.value for stop in stops)
        return [_Stop(max(largest + 1, float(len(evaluation.experts))), "all", base, plain=True)]
    return []


def _picture(evaluation: Evaluation, parameter: str, way: list[_Stop], measure: str) -> tuple[str, Markup] | None:
    scores = [(stop, score) for stop in way if (score := evaluation.score(stop.method))]
    points = [point for stop, score in scores if (point := _point(stop, score, measure))]
    if len(points) < 2:
        return None
    level = _level(evaluation, measure)
    heights = [value for point in points for value in (point.y, *(point.ends or ()))]
    across = replace(scale_for(point.x for point in points), low=points[0].x, high=points[-1].x)
    words = wording.AXES[measure]
    frame = Frame(
        across, even_scale(heights if level is None else [*heights, level]), (parameter, words), turned=measure == "nll"
    )
    control = (
        ""
        if level is None
        else f", {wording.method_name(evaluation.control)} at {wording.fixed(level, wording.DECIMALS[measure])}"
    )
    return measure, curve(points, frame, f"{words} over {parameter}{control}", level)


def _point(stop: _Stop, score: Score, measure: str) -> Point | None:
    """Place one variant; its difference's interval is laid on the control's value, so that one sees it cross or not."""
    value, gap, unit = score.value(measure), score.difference(measure), wording.UNITS[measure]
    if value is None:
        return None
    ends = None
    if gap and gap.interval:
        low, high = (unit * (value - gap.value + end) for end in gap.interval)
        ends = low, high
    told = f"{wording.method_name(stop.method)} {wording.fixed(unit * value, wording.DECIMALS[measure])}"
    words = f"{told} (difference {wording.span(gap, measure)})" if ends else told
    return Point(stop.value, unit * value, marks.DIAMOND if stop.plain else marks.DISC, stop.label, words, ends)


def _level(evaluation: Evaluation, measure: str) -> float | None:
    score = evaluation.score(evaluation.control)
    value = score.value(measure) if score else None
    return None if value is None else wording.UNITS[measure] * value
