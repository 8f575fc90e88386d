"""The table that sums an evaluation up: every method on all rows and on each source, compared with one of them."""

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from coterie.errors import CoterieError, unknown_name
from coterie.evaluation.statistics import (
    Interval,
    excludes_zero,
    holm,
    mcnemar,
    paired_bootstrap,
    ratio_interval,
    sign_flip_test,
)
from coterie.evaluation.text import WIDTH, aligned, far_percent, grouped, nats, p_value, percent, points, signed_nats

ALL = "all"
BASE = "base"
ORACLE = "oracle"
FEW_ROWS = 30  # below it a percentile interval is too narrow more often than it says
LEVEL = 0.05


class TableRow(TypedDict):
    """One method on one source, or on all rows: accuracy and F1 as shares of 1, NLL in nats a token.

    Differences are to the control. `accuracy_p` is McNemar's exact p-value and `nll_p` that of the paired sign-flip
    test, each adjusted by Holm over the methods compared on this source. `oracle_share` is the share of the oracle's
    gain in NLL over the base that the method captures.
    """

    method: str
    source: str
    control: str
    rows: int
    graded: int
    accuracy: float | None
    accuracy_difference: float | None
    accuracy_interval: list[float] | None
    accuracy_p: float | None
    f1: float | None
    nll: float | None
    nll_difference: float | None
    nll_interval: list[float] | None
    nll_p: float | None
    oracle_share: float | None
    oracle_share_interval: list[float] | None


class _Measure(NamedTuple):
    """A value per measured row, keyed by the row's number, and what each value weighs."""

    values: dict[int, float]
    weights: dict[int, float]


class _Pairs(NamedTuple):
    """A method and the control on the rows that both have: the values of each, and what the rows weigh."""

    own: list[float]
    control: list[float]
    weights: list[float]


class _Share(NamedTuple):
    """A share and the ends of its confidence interval."""

    value: float
    low: float
    high: float


class _Draws(NamedTuple):
    """How many bootstrap resamples an interval takes, and the seed of all draws."""

    resamples: int
    seed: int


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

    "all" is the micro-average: rows weigh the same in accuracy and F1, tokens weigh the same in NLL. Differences are to
    the control on the same rows, with 95% intervals and adjusted p-values; all are None for the control itself and
    where nothing was measured, the interval also where one row alone was.

    The share of the oracle's gain, (base - method) / (base - oracle) in mean NLL over the rows that all three have, is
    there if methods called `base` and `oracle` are; it is None for those two and where the oracle gains nothing. Its
    interval is None too where the oracle's gain may be nothing.

    Args:
        rows: What `rows.jsonl` holds, one object a row.
        methods: The methods to sum up, in the order wanted.
        control: The method that the others are compared with.
        sources: The sources to sum up, in the order wanted.
        resamples: Bootstrap resamples of each interval.
        seed: Seed of the resamples and of the sign flips.

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
    draws = _Draws(resamples, seed)
    return [line for source, part in parts for line in _part(source, part, methods, control, draws)]


def _part(
    source: str, rows: Sequence[Mapping[str, Any]], methods: Sequence[str], control: str, draws: _Draws
) -> list[TableRow]:
    results = {method: [row["methods"][method] for row in rows] for method in methods}
    accuracy = {method: _accuracy(own) for method, own in results.items()}
    nll = {method: _nll(own) for method, own in results.items()}
    right, likely = _pairs(accuracy, control), _pairs(nll, control)
    right_gaps, likely_gaps = _gaps(right, draws), _gaps(likely, draws)
    right_p, likely_p = _adjusted(right, _mcnemar), _adjusted(likely, lambda pairs: _sign_flip(pairs, draws.seed))
    shares = _oracle_shares(nll, draws)
    return [
        {
            "method": method,
            "source": source,
            "control": control,
            "rows": len(rows),
            "graded": len(accuracy[method].values),
            "accuracy": _mean(accuracy[method]),
            "accuracy_difference": right_gaps[method].difference if method in right_gaps else None,
            "accuracy_interval": _ends(right_gaps.get(method)),
            "accuracy_p": right_p.get(method),
            "f1": _mean(_f1(results[method])),
            "nll": _mean(nll[method]),
            "nll_difference": likely_gaps[method].difference if method in likely_gaps else None,
            "nll_interval": _ends(likely_gaps.get(method)),
            "nll_p": likely_p.get(method),
            "oracle_share": shares[method].value if method in shares else None,
            "oracle_share_interval": _ends(shares.get(method)),
        }
        for method in methods
    ]


def _accuracy(results: Sequence[Mapping[str, Any]]) -> _Measure:
    graded = {
        number: float(result["correct"]) for number, result in enumerate(results) if result["correct"] is not None
    }
    return _Measure(graded, dict.fromkeys(graded, 1.0))


def _f1(results: Sequence[Mapping[str, Any]]) -> _Measure:
    graded = {number: float(result["f1"]) for number, result in enumerate(results) if result.get("f1") is not None}
    return _Measure(graded, dict.fromkeys(graded, 1.0))


def _nll(results: Sequence[Mapping[str, Any]]) -> _Measure:
    """Return mean NLL by row, weighing its tokens; an empty response, and a method that only answers, have none."""
    scored = {number: result for number, result in enumerate(results) if result["tokens"] and result["nll"] is not None}
    return _Measure(
        {number: float(result["nll"]) for number, result in scored.items()},
        {number: float(result["tokens"]) for number, result in scored.items()},
    )


def _mean(measure: _Measure) -> float | None:
    total = sum(measure.weights.values())
    return sum(measure.values[row] * weight for row, weight in measure.weights.items()) / total if total else None


def _shared(*measures: _Measure) -> list[int]:
    """Return the rows that all measures have.

    Raises:
        CoterieError: Two of them scored different tokens of one row.
    """
    first, *others = measures
    shared = [row for row in first.values if all(row in other.values for other in others)]
    for row in shared:
        for other in others:
            if first.weights[row] != other.weights[row]:
                raise CoterieError(
                    f"two methods scored {first.weights[row]:.0f} and {other.weights[row]:.0f} tokens of one response; "
                    "NLL per token is only comparable between methods of one tokenizer"
                )
    return shared


def _pairs(measures: Mapping[str, _Measure], control: str) -> dict[str, _Pairs]:
    """Pair every other method with the control; methods that share no measured row with it are left out."""
    found = {}
    for method, own in measures.items():
        shared = _shared(own, measures[control]) if method != control else []
        if shared:
            columns = (own.values, measures[control].values, own.weights)
            found[method] = _Pairs(*([column[row] for row in shared] for column in columns))
    return found


def _gaps(pairs: Mapping[str, _Pairs], draws: _Draws) -> dict[str, Interval]:
    return {
        method: paired_bootstrap(own, control, weights=weights, **draws._asdict())
        for method, (own, control, weights) in pairs.items()
    }


def _adjusted(pairs: Mapping[str, _Pairs], test: Callable[[_Pairs], float]) -> dict[str, float]:
    return holm({method: test(pair) for method, pair in pairs.items()})


def _mcnemar(pairs: _Pairs) -> float:
    return mcnemar([value == 1 for value in pairs.own], [value == 1 for value in pairs.control])


def _sign_flip(pairs: _Pairs, seed: int) -> float:
    return sign_flip_test(pairs.own, pairs.control, weights=pairs.weights, seed=seed)


def _oracle_shares(nll: Mapping[str, _Measure], draws: _Draws) -> dict[str, _Share]:
    """Return the share of the oracle's gain over the base that every other method captures, where there is a gain."""
    if not {BASE, ORACLE} <= {*nll}:
        return {}
    base, oracle = nll[BASE], nll[ORACLE]
    found = {}
    for method, own in nll.items():
        shared = _shared(own, base, oracle) if method not in (BASE, ORACLE) else []
        gain, whole = (
            np.array([base.weights[row] * (base.values[row] - other.values[row]) for row in shared])
            for other in (own, oracle)
        )
        if whole.sum() > 0:
            found[method] = _Share(float(gain.sum() / whole.sum()), *ratio_interval(gain, whole, **draws._asdict()))
    return found


def _ends(interval: Interval | _Share | None) -> list[float] | None:
    return [interval.low, interval.high] if interval and np.isfinite(interval.low) else None


# ----------------------------------------------------------------------------------------------------- plain text

_ACCURACY = ("", "accuracy", "difference, 95% interval", "p", "F1")
_NLL = ("", "NLL", "difference, 95% interval", "p", "of the oracle's gain")
_STAR = "* the 95% interval of this one difference excludes zero; it is not corrected for their number."
_P = "p: McNemar's exact test (accuracy), paired sign-flip test (NLL); Holm-adjusted within each list."
_GAIN = "The oracle's gain is how far its NLL lies below that of base; a method's share has a 95% interval."


class _Test(NamedTuple):
    """One comparison over all rows."""

    measure: str
    way: str
    method: str
    p: float


def format_table(table: Sequence[TableRow]) -> str:
    """Write the table of an evaluation as plain text of at most 100 columns, all rows first, then each source.

    Each measure has a list of its own, left out where it was not measured. Accuracy and F1 are in percent, differences
    of accuracy in points, NLL in nats a token. A star marks an interval that excludes zero; the last sentence says
    which differences over all rows are significant by their adjusted p-values and which are not.
    """
    by_source: dict[str, list[TableRow]] = {}
    for row in table:
        by_source.setdefault(row["source"], []).append(row)
    parts = [_part_text(source, part) for source, part in by_source.items()]
    conclusion = textwrap.fill(_conclusion(table), WIDTH, break_on_hyphens=False)
    return "\n\n".join([*parts, "\n".join([*_legend(table), conclusion])])


def _part_text(source: str, part: Sequence[TableRow]) -> str:
    rows, graded = part[0]["rows"], max(row["graded"] for row in part)
    title = "all rows" if source == ALL else source or "no source"
    lists = []
    if graded:
        lists.append(aligned([_ACCURACY, *map(_accuracy_cells, part)], "<><>>"))
    if any(row["nll"] is not None for row in part):
        lists.append(aligned([_NLL, *map(_nll_cells, part)], "<><><"))
    return f"{title}: {rows} rows, {graded} graded\n" + "\n\n".join(lists)


def _accuracy_cells(row: TableRow) -> Sequence[str]:
    gap = _difference(row["accuracy_difference"], row["accuracy_interval"], points)
    f1 = "" if row["f1"] is None else percent(row["f1"])
    return row["method"], percent(row["accuracy"]), gap, p_value(row["accuracy_p"]), f1


def _nll_cells(row: TableRow) -> Sequence[str]:
    gap = _difference(row["nll_difference"], row["nll_interval"], signed_nats)
    share = _with_ends(row["oracle_share"], row["oracle_share_interval"], far_percent)
    return row["method"], nats(row["nll"]), gap, p_value(row["nll_p"]), share


def _difference(value: float | None, interval: list[float] | None, write: Callable[[float], str]) -> str:
    text = _with_ends(value, interval, write)
    return f"{text} {'*' if excludes_zero(interval) else ' '}" if interval else text


def _with_ends(value: float | None, interval: list[float] | None, write: Callable[[float], str]) -> str:
    if value is None:
        return ""
    return f"{write(value)} [{', '.join(map(write, interval))}]" if interval else write(value)


def _legend(table: Sequence[TableRow]) -> list[str]:
    compared = any(row["accuracy_p"] is not None or row["nll_p"] is not None for row in table)
    with_oracle = any(row["oracle_share"] is not None for row in table)
    return [*((_STAR, _P) if compared else ()), *((_GAIN,) if with_oracle else ())]


def _conclusion(table: Sequence[TableRow]) -> str:
    """Say which differences over all rows are significant, and which are not."""
    tests, control, rows = _tests(table), table[0]["control"], table[0]["rows"]
    if not tests:
        return "No two methods were measured, so there is no difference to test."
    clear = grouped((f"{test.way} {test.measure}", test.method) for test in tests if test.p < LEVEL)
    unclear = grouped((test.measure, test.method) for test in tests if test.p >= LEVEL)
    counts = Counter(test.measure for test in tests)
    number = " and ".join(f"{count} of {measure}" for measure, count in counts.items())
    found = f"significant: {clear}" if clear else "no difference is significant"
    rest = f" Not significant: {unclear}." if clear else ""
    few = f" {rows} rows are too few to trust the intervals." if rows < FEW_ROWS else ""
    level = f"by Holm-adjusted p < {LEVEL} (comparisons: {number})"
    return f"Compared with {control} over all rows, {level}, {found}.{rest if unclear else ''}{few}"


def _tests(table: Sequence[TableRow]) -> list[_Test]:
    found = []
    for row in table:
        for measure, difference, p in (
            ("accuracy", row["accuracy_difference"], row["accuracy_p"]),
            ("NLL", row["nll_difference"], row["nll_p"]),
        ):
            if row["source"] == ALL and difference is not None and p is not None:
                found.append(_Test(measure, "higher" if difference > 0 else "lower", row["method"], p))
    return sorted(found, key=lambda test: test.measure != "accuracy")
