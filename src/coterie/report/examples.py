"""Which rows are shown as examples: the same ones every time, of every kind, spread over the sources."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from coterie.report.records import Answer, Row
from coterie.report.wording import method_name

MOST = 12


def kinds(subject: str | None, control: str) -> tuple[str, ...]:
    """List the kinds of rows in the order they are shown, the telling ones first."""
    told_apart = _told_apart(subject, control) if subject else ()
    return (*told_apart, "methods differ", "all right", "all wrong", "not graded")


def kind_of(row: Row, subject: str | None, control: str) -> str:
    """Say what a row shows: who was right where the methods differ, else whether all were right or wrong."""
    verdicts = {answer.method: answer.correct for answer in row.answers if answer.correct is not None}
    if not verdicts:
        return "not graded"
    if len(set(verdicts.values())) == 1:
        return "all right" if all(verdicts.values()) else "all wrong"
    ours, theirs = verdicts.get(subject or ""), verdicts.get(control)
    if ours is None or theirs is None or ours == theirs:
        return "methods differ"
    return _told_apart(subject or "", control)[not ours]


def _told_apart(subject: str, control: str) -> tuple[str, str]:
    ours, theirs = method_name(subject), method_name(control)
    return f"{ours} right, {theirs} wrong", f"{ours} wrong, {theirs} right"


def choose(rows: Sequence[Row], subject: str | None, control: str, most: int = MOST) -> list[tuple[str, Row]]:
    """Take rows of each kind in turn, each time from the source shown least so far, and return them sorted by kind.

    Within a source, rows on which the texts differ come first, then the order of the records: no chance is involved.
    """
    order = kinds(subject, control)
    waiting: dict[str, list[Row]] = {kind: [] for kind in order}
    for row in rows:
        waiting[kind_of(row, subject, control)].append(row)
    shown: Counter[str] = Counter()
    chosen: list[tuple[str, Row]] = []
    while len(chosen) < most and any(waiting.values()):
        kind = min((kind for kind in order if waiting[kind]), key=[kind for kind, _ in chosen].count)
        row = min(waiting[kind], key=lambda row: (shown[row.source], _all_alike(row)))
        waiting[kind].remove(row)
        shown[row.source] += 1
        chosen.append((kind, row))
    return sorted(chosen, key=lambda pair: order.index(pair[0]))


def alike(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Group the methods that wrote the same text and were graded the same, so that a text stands on the page once."""

    def shared(answer: Answer) -> tuple[object, ...]:
        return answer.text, answer.correct, answer.extracted, answer.cut

    first_seen = {key: number for number, key in reversed(list(enumerate(map(shared, answers))))}
    ordered = sorted(answers, key=lambda answer: first_seen[shared(answer)])
    return [list(group) for _, group in groupby(ordered, key=shared)]


def _all_alike(row: Row) -> bool:
    return len({answer.text for answer in row.answers}) <= 1
