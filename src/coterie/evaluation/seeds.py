"""How far results vary between mixtures that were fitted with other seeds and evaluated on the same rows.

The intervals of one evaluation are over rows: they say nothing about what another seed would have trained.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from coterie.errors import CoterieError
from coterie.evaluation.statistics import excludes_zero, mean_interval
from coterie.records.evaluation import OVERALL, EvaluationRecord
from coterie.records.files import read_summary
from coterie.records.schema import parse
from coterie.records.wording import WIDTH, columns, grouped, nats, percent, points, signed_nats

FEWEST_SEEDS = 3  # two values have a t-interval too, 13 standard errors wide: it tells nothing

Field = Literal["accuracy", "accuracy_difference", "nll", "nll_difference"]


class Spread(TypedDict):
    """One measure over the evaluations that have it.

    `sd` is the sample standard deviation, None for one evaluation. `interval` is the 95% t-interval of the mean, None
    for fewer than three.
    """

    n: int
    mean: float
    sd: float | None
    min: float
    max: float
    interval: list[float] | None


class SpreadRow(TypedDict):
    """One method on all rows over all evaluations, in the units of the table; None where nothing was measured."""

    method: str
    control: str
    accuracy: Spread | None
    accuracy_difference: Spread | None
    nll: Spread | None
    nll_difference: Spread | None


def read_spread(folders: str | Path | Sequence[str | Path]) -> list[SpreadRow]:
    """Read evaluation folders and compare what they measured.

    Args:
        folders: Folders that `coterie eval` wrote, one for each seed.

    Raises:
        CoterieError: A folder holds no evaluation or is given twice, or `spread` cannot compare them.
    """
    folders = [folders] if isinstance(folders, str | Path) else folders
    paths = [Path(folder).resolve() for folder in folders]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise CoterieError(f"{folders[number]} is given twice; give the evaluation of another seed in its place")
    return spread([read_summary(path) for path in paths])


def spread(evaluations: Sequence[EvaluationRecord | Mapping[str, Any]]) -> list[SpreadRow]:
    """Compare evaluations of the same rows by mixtures fitted with other seeds.

    Methods that every evaluation has are compared, in the order of the first; others are left out. Whether rows are the
    same is judged by the name of the data and the number of rows; whether the seeds differ is taken on trust.

    Args:
        evaluations: What `evaluation.json` holds, `Evaluation.summary` or its record; two or more.

    Raises:
        CoterieError: There are fewer than two, one is no evaluation, or two differ in data, number of rows or
            control, or they share no method.
    """
    advice = "give what `coterie eval` wrote"
    records = [parse(EvaluationRecord, own, f"evaluation {n}", advice) for n, own in enumerate(evaluations, start=1)]
    if len(records) < 2:
        raise CoterieError(f"a spread needs the evaluations of at least two seeds; got {len(records)}")
    first = records[0]
    for number, other in enumerate(records[1:], start=2):
        for name in ("data", "rows", "control"):
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                raise CoterieError(
                    f"evaluations 1 and {number} have {ours!r} and {theirs!r} as {name}; "
                    "give evaluations of the same rows with one control, such as coterie eval --control base"
                )
    tables = [{row.method: row for row in own.table if row.source == OVERALL} for own in records]
    shared = [method for method in tables[0] if all(method in table for table in tables)]
    if not shared:
        raise CoterieError("no method stands in the tables of all these evaluations; evaluate the same methods")
    return [
        {
            "method": method,
            "control": first.control,
            "accuracy": _spread([table[method].accuracy for table in tables]),
            "accuracy_difference": _spread([table[method].accuracy_difference for table in tables]),
            "nll": _spread([table[method].nll for table in tables]),
            "nll_difference": _spread([table[method].nll_difference for table in tables]),
        }
        for method in shared
    ]


def _spread(measured: Sequence[float | None]) -> Spread | None:
    values = [value for value in measured if value is not None]
    if not values:
        return None
    return {
        "n": len(values),
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "interval": list(mean_interval(values)) if len(values) >= FEWEST_SEEDS else None,
    }


# ----------------------------------------------------------------------------------------------------- plain text


class _Measure(NamedTuple):
    """How a measure is titled and written, and how its standard deviation is."""

    field: Field
    title: str
    write: Callable[[float], str]
    write_sd: Callable[[float], str]


class _Gap(NamedTuple):
    """The spread of one method's difference to the control."""

    measure: str
    method: str
    spread: Spread


def _points_apart(sd: float) -> str:
    return f"{100 * sd:.1f}"


_MEASURES = (
    _Measure("accuracy", "accuracy", percent, _points_apart),
    _Measure("accuracy_difference", "accuracy above {control}, points", points, _points_apart),
    _Measure("nll", "NLL", nats, nats),
    _Measure("nll_difference", "NLL above {control}", signed_nats, nats),
)
_HEADS = ("", "n", "mean", "sd", "min", "max", "95% interval of the mean")


def format_spread(rows: Sequence[SpreadRow]) -> str:
    """Write spreads as plain text of at most 100 columns, a list for each measure and each difference.

    Accuracy is in percent, its differences in points; NLL in nats a token. The sentences below say for which
    differences the t-interval of the mean over seeds excludes zero.
    """
    lists = []
    for measure in _MEASURES:
        lines = []
        for row in rows:
            if found := row[measure.field]:
                sd = "" if found["sd"] is None else measure.write_sd(found["sd"])
                with_interval = found["interval"] and measure.field.endswith("difference")
                interval = f"[{', '.join(map(measure.write, found['interval'] or ()))}]" if with_interval else ""
                mean, low, high = map(measure.write, (found["mean"], found["min"], found["max"]))
                lines.append((row["method"], str(found["n"]), mean, sd, low, high, interval))
        if lines:
            title = measure.title.format(control=rows[0]["control"])
            lists.append(f"{title}\n{columns([_HEADS, *lines], '<>>>>><', WIDTH)}")
    sentences = textwrap.fill(_conclusion(rows), WIDTH, break_on_hyphens=False)
    return "\n\n".join([*lists, sentences])


def _conclusion(rows: Sequence[SpreadRow]) -> str:
    """Say for which differences the interval of the mean excludes zero."""
    measured = [("accuracy", row["method"], row["accuracy_difference"]) for row in rows]
    measured += [("NLL", row["method"], row["nll_difference"]) for row in rows]
    gaps = [_Gap(measure, method, found) for measure, method, found in measured if found]
    tested = [gap for gap in gaps if gap.spread["interval"]]
    if not gaps:
        return "No method but the control was measured, so there is no difference to test."
    if not tested:
        return "Two seeds show no spread worth testing; three are the fewest that do."
    fixed = [gap for gap in tested if gap.spread["min"] == gap.spread["max"]]
    varied = [gap for gap in tested if gap not in fixed]
    clear = [gap for gap in varied if excludes_zero(gap.spread["interval"])]
    unclear = [gap for gap in varied if gap not in clear]
    directed = [(f"{'higher' if gap.spread['mean'] > 0 else 'lower'} {gap.measure}", gap.method) for gap in clear]
    parts = {
        "It includes zero for": grouped((gap.measure, gap.method) for gap in unclear),
        "The same with every seed:": grouped((gap.measure, gap.method) for gap in fixed),
    }
    seeds, control = max(gap.spread["n"] for gap in tested), rows[0]["control"]
    found = f"excludes zero for {grouped(directed)}" if clear else "excludes zero for none"
    return " ".join(
        [
            f"Over {seeds} seeds, the 95% t-interval of the mean difference to {control} {found}.",
            *(f"{start} {names}." for start, names in parts.items() if names),
            f"Intervals are over seeds on these same rows, and are not corrected for their number ({len(varied)}).",
        ]
    )
