"""The page: what stands where, filled into the template that lies beside this file."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from coterie.artifacts import write_text
from coterie.report import examples, wording
from coterie.report.clusters import composition, map_panels
from coterie.report.costs import cost_pictures, cost_table
from coterie.report.differences import difference_panels
from coterie.report.gates import gates_view
from coterie.report.gatherings import gathering_view
from coterie.report.heatmaps import category_map, cluster_map, profile_map, routing_map
from coterie.report.reading import read_evaluation
from coterie.report.records import OVERALL, Evaluation, Row
from coterie.report.recruits import recruiting_view
from coterie.report.selections import selection_view
from coterie.report.traces import trace_pictures
from coterie.report.variants import variant_pictures

if TYPE_CHECKING:
    from jinja2 import Template

MOST_LETTERS = 1500  # of a text in an example; the whole text is in rows.jsonl
MOST_OPEN_SOURCES = 6  # the pictures of more sources than these are folded away
MOST_NAMED = 8  # sources named among the facts; more are counted
MOST_WEIGHTS = 6  # experts named one by one in an example

_WAYS_TO_WRITE = (
    wording.counted,
    wording.fixed,
    wording.gigabytes,
    wording.method_name,
    wording.nats,
    wording.p_value,
    wording.percent,
    wording.perplexity,
    wording.points,
    wording.seconds,
    wording.short,
    wording.source_name,
    wording.span,
    wording.share,
    wording.share_span,
)


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
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=PackageLoader("coterie.report", ""),
    )
    for write in _WAYS_TO_WRITE:
        environment.filters[write.__name__] = write
    environment.filters |= {"cut": _cut}
    style = Markup(files("coterie.report").joinpath("style.css").read_text(encoding="utf-8"))
    return environment.get_template("template.html", globals={"style": style})


def view(evaluation: Evaluation) -> dict[str, Any]:
    """Compute all that the template shows."""
    return {
        "evaluation": evaluation,
        "headline": wording.headline(evaluation),
        "subject": wording.method_name(evaluation.subject or ""),
        "control": wording.method_name(evaluation.control),
        "facts": _facts(evaluation),
        "examples": _examples(evaluation),
        "tally": _tally(evaluation),
        **_results(evaluation),
        **_clusters(evaluation),
        "routing": routing_map(evaluation.routing, evaluation.experts, "Source"),
        "category_routing": routing_map(evaluation.routing_by_category, evaluation.experts, "Source / category"),
        "traces": trace_pictures(evaluation),
        "subject_traced": _has_traces(evaluation, evaluation.subject),
        "costs": cost_table(evaluation),
        "cost_columns": {
            "train": any("train" in stages for stages in evaluation.seconds.values()),
            "memory": bool(evaluation.memory),
        },
        "cost_pictures": cost_pictures(evaluation),
        "profile_map": profile_map(evaluation.profile),
        **recruiting_view(evaluation),
        "selection": selection_view(evaluation.selection),
        "gathering": gathering_view(evaluation.gathering),
        "gates": gates_view(evaluation.gates),
    }


def _clusters(evaluation: Evaluation) -> dict[str, Any]:
    shown = {
        "clusters": cluster_map(evaluation),
        "composition": composition(evaluation),
        "category_counts": category_map(evaluation),
        "map_panels": map_panels(evaluation),
    }
    return {**shown, "clustered": any(shown.values())}


def _has_traces(evaluation: Evaluation, method: str | None) -> bool:
    return any(answer.trace for row in evaluation.rows for answer in row.answers if answer.method == method)


def _results(evaluation: Evaluation) -> dict[str, Any]:
    sources = _scored_sources(evaluation)
    return {
        "overall": evaluation.scores(),
        "columns": _optional_columns(evaluation),
        "significant": wording.significant(evaluation),
        "by_source": {source: evaluation.scores(source) for source in sources},
        "overall_panels": difference_panels(evaluation, (OVERALL,)),
        "source_panels": difference_panels(evaluation, sources),
        "open_sources": len(sources) <= MOST_OPEN_SOURCES,
        "variants": variant_pictures(evaluation),
    }


def _optional_columns(evaluation: Evaluation) -> dict[str, bool]:
    """Tell which columns of the results any row fills."""
    gaps = [gap for score in evaluation.table for gap in (score.accuracy_difference, score.nll_difference) if gap]
    return {
        "p": any(gap.p is not None for gap in gaps),
        "f1": any(score.f1 is not None for score in evaluation.table),
        "oracle": any(score.oracle_share is not None for score in evaluation.table),
    }


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    graded = max((score.graded for score in evaluation.table if score.source == OVERALL), default=0)
    facts = [
        ("Base model", evaluation.base_model.get("id", "")),
        ("Mixture", evaluation.mixture),
        ("Experts", f"{len(evaluation.experts)}"),
        ("Control", wording.method_name(evaluation.control)),
        ("Test data", evaluation.data),
        ("Rows", f"{len(evaluation.rows):,}, of which {graded:,} graded"),
        ("Sources", _listed([wording.source_name(source) for source in evaluation.sources])),
        ("Hardware", _pairs(evaluation.hardware)),
        ("Settings", _pairs(evaluation.settings)),
        ("Revision of the base model", evaluation.base_model.get("revision", "")),
        ("SHA-256 of the base model", evaluation.base_model.get("sha256", "")),
    ]
    return [(name, value) for name, value in facts if value not in ("", "null")]


def _pairs(facts: Mapping[str, str]) -> str:
    """Write facts as one line; the one called `name` needs no name."""
    told = {name: value for name, value in facts.items() if value not in ("", "null")}
    return ", ".join(value if name == "name" else f"{name.replace('_', ' ')} {value}" for name, value in told.items())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)}"


def _scored_sources(evaluation: Evaluation) -> tuple[str, ...]:
    named = [*evaluation.sources, *(score.source for score in evaluation.table)]
    return tuple(source for source in dict.fromkeys(named) if source != OVERALL and evaluation.scores(source))


def _examples(evaluation: Evaluation) -> list[dict[str, Any]]:
    order = {method: number for number, method in enumerate(evaluation.methods)}
    shown = []
    for kind, row in examples.choose(evaluation.rows, evaluation.subject, evaluation.control):
        answers = sorted(row.answers, key=lambda answer: order.get(answer.method, len(order)))
        shown.append({"kind": kind, "row": row, "answers": examples.alike(answers), "weights": _weights(row)})
    return shown


def _weights(row: Row) -> list[tuple[str, float | None, float | None, bool]]:
    """List (expert, weight, NLL, whether it is the best) by weight; many small ones are summed, but never the best."""
    ranked = sorted(dict.fromkeys((*row.weights, *row.expert_nll)), key=lambda name: -row.weights.get(name, 0.0))
    best = min(row.expert_nll, key=lambda name: row.expert_nll[name], default=None)
    few = len(ranked) <= MOST_WEIGHTS
    named = [name for place, name in enumerate(ranked) if few or place < MOST_WEIGHTS - 1 or name == best]
    lines = [(name, row.weights.get(name), row.expert_nll.get(name), name == best) for name in named]
    rest = [row.weights.get(name, 0.0) for name in ranked if name not in named]
    return [*lines, (f"{len(rest)} others together", fsum(rest), None, False)] if rest else lines


def _tally(evaluation: Evaluation) -> list[tuple[str, int]]:
    """Count the rows of each kind over the whole test."""
    found = [examples.kind_of(row, evaluation.subject, evaluation.control) for row in evaluation.rows]
    return [
        (kind, found.count(kind)) for kind in examples.kinds(evaluation.subject, evaluation.control) if kind in found
    ]


def _cut(text: str) -> str:
    left_out = len(text) - MOST_LETTERS
    return text if left_out <= 0 else f"{text[:MOST_LETTERS]} … ({left_out:,} more characters in rows.jsonl)"
