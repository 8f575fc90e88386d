"""The table that sums an evaluation up: every method on all rows and on each source, compared with one of them."""

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from coterie.errors import CoterieError, check_known
from coterie.evaluation.statistics import (
    Interval,
    accuracy_difference,
    holm,
    mcnemar,
    mean_difference,
    ratio_interval,
    rows_to_see,
    sign_flip_test,
)
from coterie.experts.names import BASE
from coterie.records.evaluation import LEVEL, OVERALL, RowRecord, TableRow
from coterie.records.wording import WIDTH, columns, far_percent, grouped, nats, p_value, percent, points, signed_nats

ORACLE = "oracle"


class _Measure(NamedTuple):
    """A value per measured row, keyed by the row's number, and what each value weighs."""

    values: dict[int, float]
    weights: dict[int, float]


class _Pairs(NamedTuple):
    """A method and the control on the rows that both have: the values of each, and what the rows weigh."""

    own: list[float]
    control: list[float]
    weights: list[float]


class _Draws(NamedTuple):
    """How many resamples the interval of a share of the oracle's gain takes, and the seed of all draws."""

    resamples: int
    seed: int


def summarise(
    rows: Sequence[RowRecord],
    methods: Sequence[str],
    control: str,
    sources: Sequence[str],
    *,
    choices: int = 1,
    resamples: int = 2000,
    seed: int = 0,
) -> list[TableRow]:
    """Sum evaluated rows up: every method over all rows, then, where there are several sources, over each source.

    "all" is the micro-average: rows weigh the same in accuracy and F1, tokens weigh the same in NLL. Differences are to
    the control on the same rows, with 95% intervals and adjusted p-values; all are None for the control itself and
    where nothing was measured, the interval of NLL also where the rows do not vary.

    The share of the oracle's gain, (base - method) / (base - oracle) in mean NLL over the rows that all three have, is
    there if methods called `base` and `oracle` are; it is None for those two and where the oracle gains nothing. Its
    interval is None too where the oracle's gain may be nothing.

    Args:
        rows: What `rows.jsonl` holds.
        methods: The methods to sum up, in the order wanted.
        control: The method that the others are compared with.
        sources: The sources to sum up, in the order wanted.
        choices: From how many methods the control was chosen by what these rows say. That flatters it, so p-values are
            multiplied by their number (Bonferroni's inequality, over one list of comparisons for every choice).
        resamples: Bootstrap resamples of the interval of each share of the oracle's gain.
        seed: Seed of the resamples and of the sign flips.

    Raises:
        CoterieError: The control is not among the methods, a method misses in a row, or two methods scored different
            tokens of one row.
    """
    check_known("method to compare with among those evaluated", control, methods)
    for number, row in enumerate(rows):
        for method in {*methods} - {*row.methods}:
            raise CoterieError(f"row {number} has no result of the method {method!r}; evaluate it again")
    parts = [(OVERALL, list(rows))]
    if len(sources) > 1:
        parts += [(source, [row for row in rows if row.source == source]) for source in sources]
    draws = _Draws(resamples, seed)
    return [line for source, part in parts for line in _part(source, part, methods, control, choices, draws)]


def strongest(rows: Sequence[RowRecord], rivals: Sequence[str]) -> str:
    """Return the rival that does best on these rows, in accuracy, and in NLL among equals; the first of several."""
    results = {name: [row.methods[name] for row in rows] for name in rivals}
    right = {name: _mean(_measure((own.correct, 1) for own in found)) for name, found in results.items()}
    nll = {name: _mean(_measure((own.nll, own.tokens) for own in found)) for name, found in results.items()}
    by_nll = {name: math.inf if value is None else value for name, value in nll.items()}
    return min(rivals, key=lambda name: (-(right[name] or 0.0), by_nll[name]))


def _part(
    source: str, rows: Sequence[RowRecord], methods: Sequence[str], control: str, choices: int, draws: _Draws
) -> list[TableRow]:
    results = {method: [row.methods[method] for row in rows] for method in methods}
    accuracy = {name: _measure((own.correct, 1) for own in found) for name, found in results.items()}
    f1 = {name: _measure((own.f1, 1) for own in found) for name, found in results.items()}
    nll = {name: _measure((own.nll, own.tokens) for own in found) for name, found in results.items()}
    right, likely = _pairs(accuracy, control), _pairs(nll, control)
    verdicts = {n: ([v == 1 for v in pair.own], [v == 1 for v in pair.control]) for n, pair in right.items()}
    right_gaps = {name: accuracy_difference(*pair) for name, pair in verdicts.items()}
    likely_gaps = {name: mean_difference(pair.own, pair.control, weights=pair.weights) for name, pair in likely.items()}
    right_p = _adjusted({name: mcnemar(*pair) for name, pair in verdicts.items()}, choices)
    likely_p = _adjusted(
        {
            name: sign_flip_test(pair.own, pair.control, weights=pair.weights, seed=draws.seed)
            for name, pair in likely.items()
        },
        choices,
    )
    shares = _oracle_shares(nll, draws)
    return [
        TableRow(
            method=method,
            source=source,
            control=control,
            rows=len(rows),
            graded=len(accuracy[method].values),
            accuracy=_mean(accuracy[method]),
            accuracy_difference=right_gaps[method].value if method in right_gaps else None,
            accuracy_interval=_ends(right_gaps.get(method)),
            accuracy_p=right_p.get(method),
            rows_to_see_5_points=rows_to_see(*verdicts[method]) if method in verdicts else None,
            cut=sum(found.cut for found in results[method]),
            f1=_mean(f1[method]),
            nll=_mean(nll[method]),
            nll_difference=likely_gaps[method].value if method in likely_gaps else None,
            nll_interval=_ends(likely_gaps.get(method)),
            nll_p=likely_p.get(method),
            oracle_share=shares[method].value if method in shares else None,
            oracle_share_interval=_ends(shares.get(method)),
        )
        for method in methods
    ]


def _adjusted(p_values: Mapping[str, float], choices: int) -> dict[str, float]:
    return {name: min(1.0, choices * p) for name, p in holm(p_values).items()}


def _measure(results: Iterable[tuple[float | None, int]]) -> _Measure:
    """Keep (value, weight) by row; what was not measured, or weighs nothing as an empty response does, has none."""
    known = [(number, value, weight) for number, (value, weight) in enumerate(results) if value is not None and weight]
    return _Measure({n: float(value) for n, value, _ in known}, {n: float(weight) for n, _, weight in known})


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


def _oracle_shares(nll: Mapping[str, _Measure], draws: _Draws) -> dict[str, Interval]:
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
            found[method] = Interval(float(gain.sum() / whole.sum()), *ratio_interval(gain, whole, **draws._asdict()))
    return found


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return interval.ends if interval else None


# ----------------------------------------------------------------------------------------------------- plain text

_ACCURACY = ("", "accuracy", "difference, 95% interval", "p", "F1", "cut")
_NLL = ("", "NLL", "difference, 95% interval", "p", "of the oracle's gain")
_STAR = f"* significant: p < {LEVEL}. Each interval is of its one difference, not corrected for their number."
_P = "p: McNemar's exact test (accuracy), paired sign-flip test (NLL); Holm-adjusted within each list."
_CUT = "cut: answers that the limit of --max-new-tokens broke off."
_GAIN = "The oracle's gain is how far its NLL lies below that of base; a method's share has a 95% interval."


class _Test(NamedTuple):
    """One comparison over all rows."""

    measure: str
    way: str
    method: str
    p: float


def format_table(table: Sequence[TableRow], choices: int = 1) -> str:
    """Write the table of an evaluation as plain text of at most 100 columns, all rows first, then each source.

    Each measure has a list of its own, left out where it was not measured. Accuracy and F1 are in percent, differences
    of accuracy in points, NLL in nats a token. A star marks a significant adjusted p-value; the last sentences say
    which differences over all rows these are, from how many methods the control was chosen by these rows, and from how
    many rows on a difference of 5 points would show.
    """
    by_source: dict[str, list[TableRow]] = {}
    for row in table:
        by_source.setdefault(row.source, []).append(row)
    parts = [_part_text(source, part) for source, part in by_source.items()]
    compared = any(row.accuracy_p is not None or row.nll_p is not None for row in table)
    with_oracle = any(row.oracle_share is not None for row in table)
    legend = [*((_STAR, _P) if compared else ()), *((_GAIN,) if with_oracle else ())]
    legend += [_CUT] if any(row.cut for row in table) else []
    conclusion = textwrap.fill(_conclusion(table, choices), WIDTH, break_on_hyphens=False)
    return "\n\n".join([*parts, "\n".join([*legend, conclusion])])


def _part_text(source: str, part: Sequence[TableRow]) -> str:
    """Write the lists of one source, each measure in one of its own."""
    graded = max(row.graded for row in part)
    title = "all rows" if source == OVERALL else source or "no source"
    accuracy = [
        (
            row.method,
            percent(row.accuracy),
            _with_ends(row.accuracy_difference, row.accuracy_interval, points, row.accuracy_p),
            p_value(row.accuracy_p),
            "" if row.f1 is None else percent(row.f1),
            str(row.cut or ""),
        )
        for row in part
    ]
    nll = [
        (
            row.method,
            nats(row.nll),
            _with_ends(row.nll_difference, row.nll_interval, signed_nats, row.nll_p),
            p_value(row.nll_p),
            _with_ends(row.oracle_share, row.oracle_share_interval, far_percent),
        )
        for row in part
    ]
    lists = [columns([_ACCURACY, *accuracy], "<><>>>", WIDTH)] if graded else []
    if any(row.nll is not None for row in part):
        lists.append(columns([_NLL, *nll], "<><><", WIDTH))
    return f"{title}: {part[0].rows} rows, {graded} graded\n" + "\n\n".join(lists)


def _with_ends(
    value: float | None, interval: tuple[float, float] | None, write: Callable[[float], str], p: float | None = None
) -> str:
    """Write a value with the ends of its interval, and a star where its adjusted p-value is significant."""
    if value is None:
        return ""
    star = "" if p is None else " *" if p < LEVEL else "  "
    ends = f" [{', '.join(map(write, interval))}]" if interval else ""
    return f"{write(value)}{ends}{star}"


def _conclusion(table: Sequence[TableRow], choices: int) -> str:
    """Say which differences over all rows are significant, and which are not."""
    tests, control, rows = _tests(table), table[0].control, table[0].rows
    if not tests:
        return "No two methods were measured, so there is no difference to test."
    clear = grouped((f"{test.way} {test.measure}", test.method) for test in tests if test.p < LEVEL)
    unclear = grouped((test.measure, test.method) for test in tests if test.p >= LEVEL)
    counts = Counter(test.measure for test in tests)
    number = " and ".join(f"{count} of {measure}" for measure, count in counts.items())
    found = f"significant: {clear}" if clear else "no difference is significant"
    rest = f" Not significant: {unclear}." if clear else ""
    needed = max((row.rows_to_see_5_points or 0 for row in table if row.source == OVERALL), default=0)
    few = f" A difference of 5 points would show from about {needed:,} graded rows on." if needed > rows else ""
    level = f"by Holm-adjusted p < {LEVEL} (comparisons: {number})"
    if choices > 1:
        control += f", the strongest of {choices} simple rivals here (every p is multiplied by {choices} for that),"
    return f"Compared with {control} over all rows, {level}, {found}.{rest if unclear else ''}{few}"


def _tests(table: Sequence[TableRow]) -> list[_Test]:
    """List the comparisons over all rows, those of accuracy first."""
    found = []
    for measure, name in (("accuracy", "accuracy"), ("nll", "NLL")):
        gaps = [(row.method, row.difference(measure)) for row in table if row.source == OVERALL]
        for method, gap in gaps:
            if gap is not None and gap.p is not None:
                found.append(_Test(name, "higher" if gap.value > 0 else "lower", method, gap.p))
    return found
