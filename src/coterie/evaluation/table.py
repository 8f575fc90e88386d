"""The table that sums an evaluation up, as records and as plain text."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from coterie.errors import CoterieError, unknown_name
from coterie.evaluation.statistics import Interval, excludes_zero, paired_bootstrap

ALL = "all"
FEW_ROWS = 30  # below it a percentile interval is too narrow more often than it says


class TableRow(TypedDict):
    """One method on one source, or on all rows: accuracy as a share of 1, NLL in nats a token."""

    method: str
    source: str
    rows: int
    graded: int
    accuracy: float | None
    accuracy_difference: float | None
    accuracy_interval: list[float] | None
    nll: float | None
    nll_difference: float | None
    nll_interval: list[float] | None


class _Measure(NamedTuple):
    """A value per measured row, keyed by the row's number, and what each value weighs."""

    values: dict[int, float]
    weights: dict[int, float]


def summarise(
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    control: str,
    sources: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> list[TableRow]:
    """Sum evaluated rows up: every method over all rows, then, where there are several sources, over each source.

    "all" is the micro-average: rows weigh the same in accuracy, tokens weigh the same in NLL. Differences are to the
    control on the same rows, with 95% intervals; both are None for the control itself and where nothing was measured,
    the interval also where one row alone was.

    Args:
        rows: What `rows.jsonl` holds, one object a row.
        methods: The methods to sum up, in the order wanted.
        control: The method that the others are compared with.
        sources: The sources to sum up, in the order wanted.
        resamples: Bootstrap resamples of each interval.
        seed: Seed of the resamples.

    Raises:
        CoterieError: The control is not among the methods, a method misses in a row, or two methods scored different
            tokens of one row.
    """
    if control not in methods:
        raise unknown_name("method to compare with among those evaluated", control, methods)
    for number, row in enumerate(rows):
        for method in {*methods} - {*row["methods"]}:
            raise CoterieError(f"row {number} has no result of the method {method!r}; evaluate it again")
    parts: list[tuple[str, Sequence[Mapping[str, Any]]]] = [(ALL, rows)]
    if len(sources) > 1:
        parts += [(source, [row for row in rows if row["source"] == source]) for source in sources]
    return [_table_row(method, source, part, control, resamples, seed) for source, part in parts for method in methods]


def _table_row(
    method: str, source: str, rows: Sequence[Mapping[str, Any]], control: str, resamples: int, seed: int
) -> TableRow:
    own, other = ([row["methods"][name] for row in rows] for name in (method, control))
    accuracy, nll = _accuracy(own), _nll(own)
    compared = method != control
    accuracy_gap = _gap(accuracy, _accuracy(other), resamples, seed) if compared else None
    nll_gap = _gap(nll, _nll(other), resamples, seed) if compared else None
    return {
        "method": method,
        "source": source,
        "rows": len(rows),
        "graded": len(accuracy.values),
        "accuracy": _mean(accuracy),
        "accuracy_difference": accuracy_gap.difference if accuracy_gap else None,
        "accuracy_interval": _ends(accuracy_gap),
        "nll": _mean(nll),
        "nll_difference": nll_gap.difference if nll_gap else None,
        "nll_interval": _ends(nll_gap),
    }


def _accuracy(results: Sequence[Mapping[str, Any]]) -> _Measure:
    graded = {
        number: float(result["correct"]) for number, result in enumerate(results) if result["correct"] is not None
    }
    return _Measure(graded, dict.fromkeys(graded, 1.0))


def _nll(results: Sequence[Mapping[str, Any]]) -> _Measure:
    """Return mean NLL by row, weighing its tokens; a response without tokens has none."""
    scored = {number: result for number, result in enumerate(results) if result["tokens"]}
    return _Measure(
        {number: float(result["nll"]) for number, result in scored.items()},
        {number: float(result["tokens"]) for number, result in scored.items()},
    )


def _mean(measure: _Measure) -> float | None:
    total = sum(measure.weights.values())
    return sum(measure.values[row] * weight for row, weight in measure.weights.items()) / total if total else None


def _gap(own: _Measure, control: _Measure, resamples: int, seed: int) -> Interval | None:
    """Compare on the rows that both have, None if there are none."""
    shared = [row for row in own.values if row in control.values]
    for row in shared:
        if own.weights[row] != control.weights[row]:
            raise CoterieError(
                f"two methods scored {own.weights[row]:.0f} and {control.weights[row]:.0f} tokens of one response; "
                "NLL per token is only comparable between methods of one tokenizer"
            )
    if not shared:
        return None
    return paired_bootstrap(
        [own.values[row] for row in shared],
        [control.values[row] for row in shared],
        weights=[own.weights[row] for row in shared],
        resamples=resamples,
        seed=seed,
    )


def _ends(gap: Interval | None) -> list[float] | None:
    return [gap.low, gap.high] if gap and np.isfinite(gap.low) else None


# ----------------------------------------------------------------------------------------------------- plain text

_WIDTH = 100
_COLUMNS = f"{'':22}  {'accuracy':>8}  {'difference, 95% interval':<25}  {'NLL':>6}  {'difference, 95% interval':<28}"


def format_table(table: Sequence[TableRow]) -> str:
    """Write the table of an evaluation as plain text of at most 100 columns, all rows first, then each source.

    Accuracy is in percent, its differences in points; NLL in nats a token. A star marks an interval that excludes zero,
    and the last sentence says which differences over all rows are significant and which are not.
    """
    by_source: dict[str, list[TableRow]] = {}
    for row in table:
        by_source.setdefault(row["source"], []).append(row)
    parts = ["\n".join([_heading(source, part), *map(_line, part)]) for source, part in by_source.items()]
    return "\n\n".join([*parts, textwrap.fill(_conclusion(table), _WIDTH)])


def _heading(source: str, part: Sequence[TableRow]) -> str:
    rows, graded = part[0]["rows"], max(row["graded"] for row in part)
    title = "all rows" if source == ALL else source or "no source"
    return f"{title}: {rows} rows, {graded} graded\n{_COLUMNS}".rstrip()


def _line(row: TableRow) -> str:
    method = row["method"] if len(row["method"]) <= 22 else row["method"][:21] + "…"
    accuracy = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}%"
    nll = "-" if row["nll"] is None else f"{row['nll']:.4f}"
    points = _difference(row["accuracy_difference"], row["accuracy_interval"], scale=100, digits=1)
    nats = _difference(row["nll_difference"], row["nll_interval"], scale=1, digits=4)
    return f"{method:<22}  {accuracy:>8}  {points:<25}  {nll:>6}  {nats:<28}".rstrip()


def _difference(difference: float | None, interval: list[float] | None, *, scale: int, digits: int) -> str:
    if difference is None:
        return ""
    write = f"{{:+.{digits}f}}"
    text = write.format(scale * difference)
    if interval is None:
        return text
    low, high = (write.format(scale * end) for end in interval)
    return f"{text} [{low}, {high}]{' *' if excludes_zero(interval) else ''}"


def _conclusion(table: Sequence[TableRow]) -> str:
    """Say in one sentence which differences over all rows are significant, and which are not."""
    overall = [row for row in table if row["source"] == ALL]
    clear: list[str] = []
    unclear: list[str] = []
    for row in overall:
        accuracy, nll = row["accuracy_difference"], row["nll_difference"]
        for name, difference, interval in (
            ("accuracy", accuracy, row["accuracy_interval"]),
            ("NLL", nll, row["nll_interval"]),
        ):
            if difference is not None:
                way = "higher " if difference > 0 else "lower "
                found = excludes_zero(interval)
                (clear if found else unclear).append(f"the {way if found else ''}{name} of {row['method']}")
    if not clear + unclear:
        return "No two methods were measured, so there is no difference to test."
    control = next(row["method"] for row in overall if row["accuracy_difference"] is row["nll_difference"] is None)
    few = (
        f", but {overall[0]['rows']} rows are too few to trust these intervals" if overall[0]["rows"] < FEW_ROWS else ""
    )
    found = f"significant (*): {_listed(clear)}" if clear else "no difference is significant"
    rest = f"; not significant: {_listed(unclear)}" if clear and unclear else ""
    return f"Compared with {control} over all rows, {found}{rest}{few}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
