"""Which rows are shown as examples: the same ones every time, of every kind, spread over the sources."""

from collections import Counter
from collections.abc import Sequence
from math import fsum
from typing import Any

from coterie.records.evaluation import EvaluationRecord, MethodResult, RowRecord
from coterie.report.wording import method_name

MOST = 12
MOST_WEIGHTS = 6  # experts named one by one in an example


def examples_view(evaluation: EvaluationRecord, rows: Sequence[RowRecord]) -> dict[str, Any]:
    """Choose the examples, and count the rows of each kind over the whole test."""
    subject, control = evaluation.subject, evaluation.control
    order = {method: number for number, method in enumerate(evaluation.methods)}
    shown = []
    for kind, row in choose(rows, subject, control):
        # Methods that wrote the same text and were graded the same share a group: a text stands on the page once.
        groups: dict[tuple[object, ...], list[tuple[str, MethodResult]]] = {}
        for method, own in sorted(row.methods.items(), key=lambda answer: order.get(answer[0], len(order))):
            groups.setdefault((own.text, own.correct, own.extracted, own.cut), []).append((method, own))
        shown.append({"kind": kind, "row": row, "answers": [*groups.values()], "weights": weight_lines(row)})
    counts = Counter(kind_of(row, subject, control) for row in rows)
    return {"examples": shown, "tally": [(kind, counts[kind]) for kind in kinds(subject, control) if counts[kind]]}


def kinds(subject: str | None, control: str) -> tuple[str, ...]:
    """List the kinds of rows in the order they are shown, the telling ones first."""
    others = ("methods differ", "all right", "all wrong", "not graded")
    if not subject:
        return others
    ours, theirs = method_name(subject), method_name(control)
    return (f"{ours} right, {theirs} wrong", f"{ours} wrong, {theirs} right", *others)


def kind_of(row: RowRecord, subject: str | None, control: str) -> str:
    """Say what a row shows: who was right where the methods differ, else whether all were right or wrong."""
    verdicts = {method: result.correct for method, result in row.methods.items() if result.correct is not None}
    if not verdicts:
        return "not graded"
    if len(set(verdicts.values())) == 1:
        return "all right" if all(verdicts.values()) else "all wrong"
    ours, theirs = verdicts.get(subject or ""), verdicts.get(control)
    if ours is None or theirs is None or ours == theirs:
        return "methods differ"
    return kinds(subject, control)[0 if ours else 1]


def choose(
    rows: Sequence[RowRecord], subject: str | None, control: str, most: int = MOST
) -> list[tuple[str, RowRecord]]:
    """Take rows of each kind in turn, each time from the source shown least so far, and return them sorted by kind.

    Within a source, rows on which the texts differ come first, then the order of the records: no chance is involved.
    """
    order = kinds(subject, control)
    waiting: dict[str, list[RowRecord]] = {kind: [] for kind in order}
    for row in rows:
        waiting[kind_of(row, subject, control)].append(row)
    shown: Counter[str] = Counter()
    chosen: list[tuple[str, RowRecord]] = []
    while len(chosen) < most and any(waiting.values()):
        kind = min((kind for kind in order if waiting[kind]), key=[kind for kind, _ in chosen].count)
        row = min(
            waiting[kind], key=lambda row: (shown[row.source], len({own.text for own in row.methods.values()}) <= 1)
        )
        waiting[kind].remove(row)
        shown[row.source] += 1
        chosen.append((kind, row))
    return sorted(chosen, key=lambda pair: order.index(pair[0]))


def weight_lines(row: RowRecord) -> list[tuple[str, float | None, float | None, bool]]:
    """List (expert, weight, NLL, whether it is the best) by weight; many small ones are summed, but never the best."""
    ranked = sorted(dict.fromkeys((*row.weights, *row.expert_nll)), key=lambda name: -row.weights.get(name, 0.0))
    best = min(row.expert_nll, key=lambda name: row.expert_nll[name], default=None)
    few = len(ranked) <= MOST_WEIGHTS
    named = [name for place, name in enumerate(ranked) if few or place < MOST_WEIGHTS - 1 or name == best]
    lines = [(name, row.weights.get(name), row.expert_nll.get(name), name == best) for name in named]
    rest = [row.weights.get(name, 0.0) for name in ranked if name not in named]
    return [*lines, (f"{len(rest)} others together", fsum(rest), None, False)] if rest else lines
