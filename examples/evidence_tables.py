"""The tables of the evidence: methods over all seeds on the same rows, paired by row, with Holm's correction.

A row's value is its mean over the seeds, so an interval is over rows; the differences of the single seeds stand beside.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from coterie.evaluation.statistics import Interval, holm, mean_difference, ratio_interval, sign_flip_test
from coterie.records.evaluation import RowRecord
from coterie.records.files import read_evaluation

BACKBONE, BASE, ORACLE = "backbone", "base", "oracle"
ROUNDING = 1e-5
"""Nats a token by which the same weights may differ, computed in another way."""
PAPER = {
    **{"per-dataset": "+2.1%", "moe-routing": "+1.0%", "mole": "-3.3%", "lora-ensembles": "+5.1%"},
    **{"instruction-embedding": "+4.6%", "random-cluster": "+9.1%", "uniform-weights": "+8.3%", "elrea": "+9.7%"},
}
"""Relative accuracy over the base adapter on the maths mix, Gemma-2B, rank 8 (arXiv 2502.00089)."""
PAIRS = tuple(
    (method, rival)
    for rival in ("random-cluster", "one-lora-same-budget")
    for method in ("elrea", "loss-routing", "prefill", "auto")
)
"""What a mix has to show: gains over random clusters, and over one adapter trained on as many tokens."""


class Measured(NamedTuple):
    """One measure of several evaluations of the same rows: values by method, (seed, row), and what rows weigh."""

    name: str
    values: Mapping[str, np.ndarray]
    weights: np.ndarray

    def mean(self, method: str) -> float:
        """Return a method's mean over rows and seeds."""
        return float(np.average(self.values[method].mean(axis=0), weights=self.weights))


def read(folders: Sequence[Path]) -> list[Measured]:
    """Read what evaluations of other seeds measured on the same rows: likelihoods, answers, or both."""
    found = [read_evaluation(folder) for folder in folders]
    runs, (first, *_) = [rows for _, rows in found], [record for record, _ in found]
    methods = [name for name in first.methods if all(name in record.methods for record, _ in found)]
    measures = []
    for name, field in (("NLL", "nll"), ("accuracy", "correct")):
        values = {method: np.array([_column(rows, method, field) for rows in runs]) for method in methods}
        values = {method: own for method, own in values.items() if not np.isnan(own).all()}
        if values:
            tokens = [max(own.tokens for own in row.methods.values()) for row in runs[0]]
            weights = np.array(tokens if field == "nll" else [1] * len(tokens), dtype=float)
            known = (weights > 0) & ~np.isnan(np.stack(list(values.values()))).any(axis=(0, 1))
            kept = {method: own[:, known] for method, own in values.items()}
            measures.append(Measured(name, kept, weights[known]))
    return measures


class Difference(NamedTuple):
    """What a method has more than another on the same rows; None where it has the same on each of them.

    p is adjusted for all differences that were taken with it.
    """

    gap: Interval | None
    p: float

    def __str__(self) -> str:
        """Write it with its interval."""
        return f"{self.gap.value:+.4f} [{self.gap.low:+.4f}, {self.gap.high:+.4f}]" if self.gap else "0, on every row"


def differences(measure: Measured, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Difference]:
    """Compare methods in pairs, by the means of rows over the seeds."""
    weights = measure.weights.tolist()
    sides = {pair: [measure.values[name].mean(axis=0).tolist() for name in pair] for pair in pairs}
    p = holm({" ".join(pair): sign_flip_test(*both, weights=weights) for pair, both in sides.items()})
    return {pair: _difference(own, rival, weights, p[" ".join(pair)]) for pair, (own, rival) in sides.items()}


def _difference(own: list[float], rival: list[float], weights: list[float], p: float) -> Difference:
    return Difference(None if own == rival else mean_difference(own, rival, weights=weights), p)


def _column(rows: Sequence[RowRecord], method: str, field: str) -> list[float]:
    found = [getattr(row.methods[method], field) for row in rows]
    return [float("nan") if value is None else float(value) for value in found]


def table(
    title: str,
    folders: Sequence[Path],
    control: str,
    pairs: Sequence[tuple[str, str]] = (),
    paper: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the tables of some evaluations: every method against the control, then the pairs that are asked for.

    What a paper has for a method stands beside the likelihoods.
    """
    parts = [f"## {title}, {len(folders)} {'seeds' if len(folders) > 1 else 'seed'}"]
    for measure in read(folders):
        others = [(method, control) for method in measure.values if method != control]
        parts.append(_compared(measure, control, others, paper if measure.name == "NLL" else {}, alone=True))
        known = [pair for pair in pairs if set(pair) <= set(measure.values)]
        parts += [_compared(measure, control, known, {}, alone=False)] if known else []
    return "\n\n".join(parts) + "\n"


def table_of_tasks(title: str, folders: Mapping[str, Sequence[Path]], control: str, rivals: Sequence[str] = ()) -> str:
    """Return a table of several tasks: every method's likelihoods against the control's, and against rivals', on each.

    p is adjusted for the tasks of a line.
    """
    found = {task: next(own for own in read(own) if own.name == "NLL") for task, own in folders.items()}
    methods = [name for name in next(iter(found.values())).values if all(name in own.values for own in found.values())]
    lines = [["", *(f"{task} | p" for task in found)], ["---"] * (2 * len(found) + 1)]
    for rival in (control, *rivals):
        lines.append([rival, *(f"{own.mean(rival):.4f} | " for own in found.values())])
        for method in (name for name in methods if name not in (rival, control)):
            sides = {
                task: [own.values[name].mean(axis=0).tolist() for name in (method, rival)]
                for task, own in found.items()
            }
            weights = {task: own.weights.tolist() for task, own in found.items()}
            adjusted = holm({task: sign_flip_test(*both, weights=weights[task]) for task, both in sides.items()})
            cells = [
                f"{_difference(own, against, weights[task], adjusted[task])} | {adjusted[task]:.4f}"
                for task, (own, against) in sides.items()
            ]
            lines.append([f"{method} - {rival}", *cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title}\n\n{text}\n"


def _compared(
    measure: Measured, control: str, pairs: Sequence[tuple[str, str]], paper: Mapping[str, str], *, alone: bool
) -> str:
    """Return a table of paired differences; p is adjusted for all of them."""
    rows = str(len(measure.weights))
    shares = alone and measure.name == "NLL" and {BASE, ORACLE} <= set(measure.values)
    head = [measure.name, "rows"] if alone else []
    heads = ["", *head, "difference, 95%", "p", "of each seed", *(["rows changed"] if alone else [])]
    heads += ["of the oracle's gain"] if shares else []
    heads += ["paper, accuracy"] if paper else []
    lines = [[control, f"{measure.mean(control):.4f}", rows]] if alone else []
    for pair, difference in differences(measure, pairs).items():
        seeds = [
            np.average(a - b, weights=measure.weights) for a, b in zip(*map(measure.values.get, pair), strict=True)
        ]
        label = [pair[0], f"{measure.mean(pair[0]):.4f}", rows] if alone else [f"{pair[0]} - {pair[1]}"]
        line = [*label, str(difference), f"{difference.p:.4f}", " ".join(f"{seed:+.4f}" for seed in seeds)]
        line += (
            [f"{(np.abs(measure.values[pair[0]] - measure.values[control]) > ROUNDING).mean():.0%}"] if alone else []
        )
        line += [_share(measure, pair[0])] if shares else []
        lines.append([*line, *([paper.get(pair[0], "")] if paper else [])])
    filled = [line + [""] * (len(heads) - len(line)) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *filled])


def _share(measure: Measured, method: str) -> str:
    """Return the share of the oracle's gain over the base that a method has; that of random clusters' is luck.

    The backbone, which was not trained at all, and the oracle itself have none.
    """
    base, own, oracle = (measure.values[name].mean(axis=0) for name in (BASE, method, ORACLE))
    above, below = measure.weights * (base - own), measure.weights * (base - oracle)
    if method in (BACKBONE, ORACLE) or below.sum() <= 0:
        return ""
    low, high = ratio_interval(above, below)
    return f"{above.sum() / below.sum():.0%} [{low:.0%}, {high:.0%}]"
