"""Token-level routing: who leads which token, how often the leading expert switches, and some such texts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from coterie.records.evaluation import EvaluationRecord, MethodResult, RowRecord, Trace
from coterie.report import draw, wording
from coterie.report.charts import split_bar
from coterie.report.heatmaps import HeatMap, cell
from coterie.report.plots import Band, stacked_areas

MOST_TEXTS = 8
MOST_OF_A_METHOD = 4
MOST_TOKENS = 400  # of a text; the whole text is in rows.jsonl
_MOST_WEIGHTS = 12  # in the tooltip of a token
_MOST_RUNS = 24  # named in a picture's words


@dataclass(frozen=True)
class Key:
    """How an expert is drawn: its label and CSS class; the experts beyond the colours share one."""

    label: str
    kind: str
    name: str


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that one expert leads: (piece of text, the weights in words) for each."""

    key: Key
    pieces: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TracedText:
    """One answer, coloured by its leading experts, with the weights drawn over its tokens."""

    row: RowRecord
    method: str
    answer: MethodResult
    switches: int
    runs: tuple[Run, ...]
    left_out: int
    picture: Markup


@dataclass(frozen=True)
class Switching:
    """How one method's routing changed: means over its texts, and the share of 1 of all tokens that each expert led.

    `most` is the expert that led most tokens, with its share.
    """

    method: str
    texts: int
    tokens: int
    a_text: float
    in_hundred: float | None
    led: dict[Key, float]
    most: tuple[str, float] | None
    bar: Markup


@dataclass(frozen=True)
class Traces:
    """All that the page shows of routing by token."""

    keys: tuple[Key, ...]
    summary: str
    table: tuple[Switching, ...]
    shares: HeatMap
    texts: tuple[TracedText, ...]


def trace_pictures(evaluation: EvaluationRecord, rows: Sequence[RowRecord]) -> Traces | None:
    """Draw the routing by token, where any method has one, the methods in their order."""
    found: dict[str, list[Trace]] = {method: [] for method in evaluation.methods}
    for row in rows:
        for method, result in row.methods.items():
            if result.trace:
                found.setdefault(method, []).append(result.trace)
    by_method = {method: traces for method, traces in found.items() if traces}
    if not by_method:
        return None
    keys = _keys(evaluation, [trace for traces in by_method.values() for trace in traces])
    table = tuple(_switching(method, traces, keys) for method, traces in by_method.items())
    drawn = tuple(dict.fromkeys(keys.values()))
    lines = []
    for line in table:
        shares = [line.led.get(key, 0.0) for key in drawn]
        lines.append((wording.method_name(line.method), tuple(cell(wording.percent(share), share) for share in shares)))
    return Traces(
        keys=drawn,
        summary=_summary(table, evaluation.subject),
        table=table,
        shares=HeatMap("Method", tuple(key.name for key in drawn), tuple(lines), ("no token", "every token")),
        texts=tuple(_traced_text(*chosen, keys) for chosen in choose(rows)),
    )


def choose(rows: Sequence[RowRecord]) -> list[tuple[RowRecord, str, Trace]]:
    """Take the texts with the most switches, few of a method; among equals the first in the records."""
    traced = [(row, method, own.trace) for row in rows for method, own in row.methods.items() if own.trace]
    ranked = sorted((text for text in traced if text[2].pieces), key=lambda text: -text[2].switches)
    shown: Counter[str] = Counter()
    chosen = []
    for row, method, trace in ranked:
        if shown[method] < MOST_OF_A_METHOD and len(chosen) < MOST_TEXTS:
            shown[method] += 1
            chosen.append((row, method, trace))
    return chosen


def _keys(evaluation: EvaluationRecord, traces: Sequence[Trace]) -> dict[str, Key]:
    """Give every expert a number and a colour in the order of the records; the colours go to those that lead most."""
    traced = dict.fromkeys(name for trace in traces for name in trace.experts)
    names = [*filter(traced.__contains__, evaluation.experts), *(n for n in traced if n not in evaluation.experts)]
    led = Counter(leader for trace in traces for leader in trace.leaders)
    largest = set(sorted(names, key=lambda name: -led[name])[: draw.SHARED])
    keys = {
        name: Key(str(number + 1), draw.css_class(number), name)
        for number, name in enumerate(filter(largest.__contains__, names))
    }
    shared = Key("…", draw.css_class(draw.SHARED), wording.counted(len(names) - len(keys), "other"))
    return keys | {name: shared for name in names if name not in keys}


def _switching(method: str, traces: Sequence[Trace], keys: Mapping[str, Key]) -> Switching:
    tokens, switches = sum(len(trace.pieces) for trace in traces), sum(trace.switches for trace in traces)
    leaders = Counter(leader for trace in traces for leader in trace.leaders)
    shares = {name: count / tokens for name, count in leaders.most_common()}
    led = {key: share for key, share in _summed(shares, keys).items() if share}
    words = wording.percents((key.name, share) for key, share in led.items()) or "none"
    title = f"Tokens of {wording.method_name(method)} by leading expert: {words}"
    return Switching(
        method=method,
        texts=len(traces),
        tokens=tokens,
        a_text=switches / len(traces),
        in_hundred=100 * switches / tokens if tokens else None,
        led=led,
        most=next(iter(shares.items()), None),
        bar=split_bar([(key.kind, share, key.label) for key, share in led.items()], title),
    )


def _summed(values: Mapping[str, float], keys: Mapping[str, Key]) -> dict[Key, float]:
    """Sum the experts' values by how the experts are drawn, in the order of the keys."""
    sums = dict.fromkeys(keys.values(), 0.0)
    for name, value in values.items():
        sums[keys[name]] += value
    return sums


def _summary(table: Sequence[Switching], subject: str | None) -> str:
    """Say in one sentence how often the mixture's method, or else the first, changes its leading expert."""
    first = next((line for line in table if line.method == subject), table[0])
    often = f"{wording.fixed(first.a_text, 1)} times a text, {wording.fixed(first.in_hundred, 1)} times in 100 tokens"
    found = f"changes its leading expert {often}" if first.a_text else "never changes its leading expert within a text"
    sentence = f"{wording.method_name(first.method)} {found}"
    if first.most:
        name, share = first.most
        sentence += f", and {name} leads {wording.percent(share)} of its tokens"
    others = [line.in_hundred for line in table if line is not first and line.in_hundred is not None]
    if others:
        ends = dict.fromkeys(wording.fixed(end, 1) for end in (min(others), max(others)))
        sentence += f"; {wording.counted(len(others), 'other method')}: {' to '.join(ends)} in 100 tokens"
    return f"{sentence}."


def _traced_text(row: RowRecord, method: str, trace: Trace, keys: Mapping[str, Key]) -> TracedText:
    """Colour the first tokens of a text by their leading experts, and draw the weights over them."""
    tooltips = [
        f"token {number}: {_weights_in_words(trace.experts, weights)}"
        for number, weights in enumerate(trace.weights[:MOST_TOKENS], start=1)
    ]
    runs, spans, end = [], [], 0
    for leader, group in groupby(trace.leaders[:MOST_TOKENS]):
        start, end = end, end + len(list(group))
        runs.append(Run(keys[leader], tuple(zip(trace.pieces[start:end], tooltips[start:end], strict=True))))
        spans.append(f"{leader} leads {end}" if end == start + 1 else f"{leader} leads {start + 1} to {end}")
    rest = len(spans) - _MOST_RUNS
    words = "; ".join(spans[:_MOST_RUNS]) + (f"; and {wording.counted(rest, 'more run')}" if rest > 0 else "")
    columns = [_summed(dict(zip(trace.experts, row, strict=True)), keys) for row in trace.weights[:MOST_TOKENS]]
    drawn = {keys[name] for name in trace.experts}
    bands = [
        Band(key.kind, key.label, key.name, tuple(column[key] for column in columns))
        for key in dict.fromkeys(keys.values())
        if key in drawn
    ]
    return TracedText(
        row=row,
        method=method,
        answer=row.methods[method],
        switches=trace.switches,
        runs=tuple(runs),
        left_out=max(0, len(trace.pieces) - MOST_TOKENS),
        picture=stacked_areas(bands, ("weight", "token"), f"Weights over {len(columns):,} tokens: {words}"),
    )


def _weights_in_words(experts: Sequence[str], weights: Sequence[float]) -> str:
    """List the weights in the order of the experts; of very many the largest."""
    largest = sorted(range(len(experts)), key=lambda place: -weights[place])[:_MOST_WEIGHTS]
    words = ", ".join(f"{experts[place]} {wording.fixed(weights[place], 2)}" for place in sorted(largest))
    left_out = len(experts) - len(largest)
    return f"{words}, {wording.counted(left_out, 'smaller one')}" if left_out else words
