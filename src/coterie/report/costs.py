"""What the methods cost: seconds and memory in a table, and against quality in pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from coterie.report import marks, wording
from coterie.report.charts import split_bar
from coterie.report.plots import Frame, Point, scatter
from coterie.report.records import Evaluation
from coterie.report.scales import even_scale, scale_for
from coterie.report.variants import is_variant

_ANSWERING = ("generate", "score")  # the stages of `seconds` that answer the test's rows


def cost_table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """List what each method took, with a bar on one scale for all."""
    measured = {*evaluation.seconds, *evaluation.memory}
    spent = {method: evaluation.seconds.get(method, {}) for method in evaluation.methods if method in measured}
    totals = {method: _total(stages) for method, stages in spent.items()}
    longest = max((total for total in totals.values() if total), default=0.0)
    return [
        {
            "method": method,
            "train": stages.get("train"),
            "generate": stages.get("generate"),
            "score": stages.get("score"),
            "total": total,
            "a_row": total / len(evaluation.rows) if total is not None and evaluation.rows else None,
            "memory": evaluation.memory.get(method),
            "bar": split_bar(
                [(stage, stages.get(stage, 0.0)) for stage in _ANSWERING],
                longest,
                f"{wording.method_name(method)}: {wording.seconds(total)} seconds",
            ),
        }
        for (method, stages), total in zip(spent.items(), totals.values(), strict=True)
    ]


def _total(stages: Mapping[str, float]) -> float | None:
    """Sum the seconds of answering; training is no part of them."""
    spent = [stages[stage] for stage in _ANSWERING if stage in stages]
    return sum(spent) if spent else None


@dataclass(frozen=True)
class CostPictures:
    """Quality against cost: one (title, picture) for each cost, and the methods by their number in both."""

    pictures: tuple[tuple[str, Markup], ...]
    names: tuple[tuple[int, str, Markup], ...]


def cost_pictures(evaluation: Evaluation) -> CostPictures | None:
    """Draw quality against seconds a row and against memory, as far as the records tell them for two methods.

    Variants are left out: they have pictures of their own.
    """
    measure = "accuracy" if any(score.accuracy is not None for score in evaluation.scores()) else "nll"
    scores = [score for score in evaluation.scores() if not is_variant(score.method, evaluation.methods)]
    known = {score.method: value for score in scores if (value := score.value(measure)) is not None}
    points = {
        title: [
            _point(evaluation, (cost[method], wording.UNITS[measure] * value), method, number)
            for number, (method, value) in enumerate(known.items(), start=1)
            if method in cost
        ]
        for title, cost in (
            ("Seconds to answer a row", _seconds_a_row(evaluation)),
            ("Memory in GB", _gigabytes(evaluation)),
        )
    }
    pictures = tuple((title, _picture(drawn, title, measure)) for title, drawn in points.items() if len(drawn) > 1)
    names = [(number, method, marks.symbol(_mark(evaluation, method))) for number, method in enumerate(known, start=1)]
    return CostPictures(pictures, tuple(names)) if pictures else None


def _picture(points: Sequence[Point], title: str, measure: str) -> Markup:
    across, up = scale_for(point.x for point in points), even_scale(point.y for point in points)
    frame = Frame(across, up, (title, wording.AXES[measure]), turned=measure == "nll")
    return scatter(points, frame, f"{wording.AXES[measure]} against {title[0].lower()}{title[1:]}")


def _seconds_a_row(evaluation: Evaluation) -> dict[str, float]:
    rows = len(evaluation.rows)
    spent = {m: stages.get("generate") or stages.get("score") for m, stages in evaluation.seconds.items()}
    return {method: seconds / rows for method, seconds in spent.items() if seconds and rows}


def _gigabytes(evaluation: Evaluation) -> dict[str, float]:
    return {method: held / 1e9 for method, held in evaluation.memory.items()}


def _point(evaluation: Evaluation, place: tuple[float, float], method: str, number: int) -> Point:
    words = f"{number} {wording.method_name(method)} {place[1]:.3g} at {place[0]:.3g}"
    return Point(*place, _mark(evaluation, method), str(number), words)


def _mark(evaluation: Evaluation, method: str) -> int:
    special = {evaluation.control: marks.SQUARE, evaluation.subject: marks.DIAMOND}
    return special.get(method, marks.CIRCLE)
