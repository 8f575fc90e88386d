"""The page: what stands where, filled into the template that lies beside this file."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from coterie.artifacts import write_text
from coterie.errors import CoterieError
from coterie.records.evaluation import MEASURES, OVERALL, EvaluationRecord, RowRecord
from coterie.records.files import read_evaluation
from coterie.records.wording import listed
from coterie.report import wording
from coterie.report.clusters import clusters_view
from coterie.report.examples import examples_view
from coterie.report.gates import gates_view
from coterie.report.heatmaps import routing_map
from coterie.report.kshot import gathering_view, selection_view
from coterie.report.overview import cost_pictures, cost_table, difference_panels, variant_pictures
from coterie.report.recruits import recruiting_view
from coterie.report.traces import trace_pictures

if TYPE_CHECKING:
    from jinja2 import Template

REPORT_FILE = "report.html"
MOST_LETTERS = 1500  # of a text in an example; the whole text is in rows.jsonl
MOST_OPEN_SOURCES = 6  # the pictures of more sources than these are folded away
MOST_NAMED = 8  # sources named among the facts; more are counted

_FILTERS = (  # of the template, besides `cut`
    wording.above,
    wording.amount,
    wording.counted,
    wording.fixed,
    wording.method_name,
    wording.p_value,
    wording.percent,
    wording.perplexity,
    wording.short,
    wording.source_name,
    wording.span,
)


def write_report(evaluation: str | Path, *, overwrite: bool = False) -> Path:
    """Write `report.html` into an evaluation's folder, whole or not at all, and return its path.

    The page is self-contained (no script, no request), and the same records give the same bytes.

    Raises:
        CoterieError: when the records are missing or wrong, the folder cannot be written, or another report.html is
            there and may not be overwritten.
    """
    folder = Path(evaluation)
    path = folder / REPORT_FILE
    page = _template().render(**view(*read_evaluation(folder)))
    is_there = path.is_file() and not path.is_symlink() and path.read_bytes() == page.encode()
    if not is_there and not overwrite and os.path.lexists(path):
        raise CoterieError(f"{path} exists and is another page; move it away, or add --overwrite to replace it")
    if not is_there:
        write_text(path, page)
    return path


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
    environment.filters |= {write.__name__: write for write in (*_FILTERS, cut)}
    style = Markup(files("coterie.report").joinpath("style.css").read_text(encoding="utf-8"))
    return environment.get_template("template.html", globals={"style": style})


def view(evaluation: EvaluationRecord, rows: Sequence[RowRecord]) -> dict[str, Any]:
    """Compute all that the template shows."""
    traced = {method for row in rows for method, result in row.methods.items() if result.trace}
    return {
        "evaluation": evaluation,
        "headline": wording.headline(evaluation),
        "subject": wording.method_name(evaluation.subject or ""),
        "control": wording.method_name(evaluation.control),
        "facts": _facts(evaluation),
        **_results(evaluation),
        **clusters_view(evaluation),
        "selection": selection_view(evaluation.selection),
        "gathering": gathering_view(evaluation.gathering),
        "routing": routing_map(evaluation.routing, evaluation.experts, "Source"),
        "unfamiliar_routing": routing_map(evaluation.unfamiliar_routing, evaluation.experts, "Method"),
        "category_routing": routing_map(evaluation.routing_by_category, evaluation.experts, "Source / category"),
        "traces": trace_pictures(evaluation, rows),
        "subject_traced": evaluation.subject in traced,
        "gates": gates_view(evaluation.gates),
        **recruiting_view(evaluation, rows),
        "costs": cost_table(evaluation),
        "cost_columns": {
            "train": any("train" in stages for stages in evaluation.seconds.values()),
            "generate": any("generate" in stages for stages in evaluation.seconds.values()),
            "memory": bool(evaluation.memory),
            "tokens": bool(evaluation.answer_tokens),
        },
        "cost_pictures": cost_pictures(evaluation),
        **examples_view(evaluation, rows),
    }


def _facts(evaluation: EvaluationRecord) -> list[tuple[str, str]]:
    """List what was evaluated on what, as (name, value); what is not known is left out."""
    graded = max((score.graded for score in evaluation.table if score.source == OVERALL), default=0)
    sources = [wording.source_name(source) for source in evaluation.sources]
    base = {name: wording.fact(value) for name, value in evaluation.base_model.items()}
    facts = [
        ("Base model", base.get("id", "")),
        ("Mixture", evaluation.mixture),
        ("Experts", f"{len(evaluation.experts)}"),
        ("Control", _control(evaluation)),
        ("Test data", evaluation.data),
        ("Rows", f"{evaluation.rows:,}, of which {graded:,} graded"),
        ("Sources", ", ".join(sources) if len(sources) <= MOST_NAMED else f"{len(sources)}"),
        ("Hardware", _pairs(evaluation.hardware)),
        ("Settings", _pairs(evaluation.settings)),
        ("Revision of the base model", base.get("revision", "")),
        ("SHA-256 of the base model", base.get("sha256", "")),
    ]
    return [(name, value) for name, value in facts if value not in ("", "null")]


def _control(evaluation: EvaluationRecord) -> str:
    among = [wording.method_name(name) for name in evaluation.control_among if name != evaluation.control]
    name = wording.method_name(evaluation.control)
    return f"{name}, which did better on these rows than {listed(among)}" if among else name


def _pairs(facts: Mapping[str, Any]) -> str:
    """Write facts as one line; the one called `name` needs no name."""
    known = {name: wording.fact(value) for name, value in facts.items() if value not in ("", None, [])}
    return ", ".join(value if name == "name" else f"{name.replace('_', ' ')} {value}" for name, value in known.items())


def _results(evaluation: EvaluationRecord) -> dict[str, Any]:
    """Compute the tables of results, with the columns that any row fills, and the pictures beside them."""
    table = evaluation.table
    named = dict.fromkeys([*evaluation.sources, *(score.source for score in table)])
    sources = tuple(source for source in named if source != OVERALL and evaluation.scores(source))
    gaps = [gap for score in table for measure in MEASURES if (gap := score.difference(measure))]
    measured = [measure for measure in MEASURES if any(getattr(score, measure) is not None for score in table)]
    return {
        "overall": evaluation.scores(),
        "columns": {
            **{measure: measure in (measured or MEASURES) for measure in MEASURES},
            "p": any(gap.p is not None for gap in gaps),
            "cut": any(score.cut for score in table),
            "f1": any(score.f1 is not None for score in table),
            "oracle": any(score.oracle_share is not None for score in table),
        },
        "significant": wording.significant(evaluation),
        "by_source": {source: evaluation.scores(source) for source in sources},
        "overall_panels": difference_panels(evaluation, (OVERALL,)),
        "source_panels": difference_panels(evaluation, sources),
        "open_sources": len(sources) <= MOST_OPEN_SOURCES,
        "variants": variant_pictures(evaluation),
    }


def cut(text: str) -> str:
    """Cut a long text off, and say where the rest is."""
    left_out = len(text) - MOST_LETTERS
    return text if left_out <= 0 else f"{text[:MOST_LETTERS]} … ({left_out:,} more characters in rows.jsonl)"
