"""The load of token-wise gates: who carries how much, layer by layer and over the steps of training."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import log

from markupsafe import Markup

from coterie.report import marks, wording
from coterie.report.charts import share_bar
from coterie.report.grids import Cell, bar_grid
from coterie.report.heatmaps import SHADES, HeatMap
from coterie.report.plots import Frame, Line, lines
from coterie.report.records import GateLoad, GateLoads
from coterie.report.scales import Scale, even_scale

OVERLOAD = 0.9  # a mean load above this share leaves the other experts next to nothing
_MOST_STEPS = 400  # points of a line
_SHARES = Scale(0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
_NUMBER = re.compile(r"^(.*?(?:^|\.)\d+)\.(.+)$", re.DOTALL)  # up to the block's number, and what is within the block
_SUFFIX = "_proj"  # of the names of linear layers, which the picture leaves out


@dataclass(frozen=True)
class GatesView:
    """All that the page shows of gates: an expert's key is (label, CSS class, name, its mean share)."""

    warning: str
    finding: str
    key: tuple[tuple[str, str, str, float], ...]
    bar: Markup
    layers: Markup | None
    table: HeatMap | None
    steps: Markup | None
    course: str


def gates_view(gates: GateLoads | None) -> GatesView | None:
    """Draw the load of every layer's gate, and how it came about."""
    if gates is None:
        return None
    key = tuple(
        (str(number + 1), marks.kind(number), name, share)
        for number, (name, share) in enumerate(zip(gates.experts, gates.overall.load, strict=True))
    )
    gates = replace(gates, layers=tuple(sorted(gates.layers, key=lambda layer: _natural(_parts(layer.name)[0]))))
    steps = sorted(gates.steps, key=lambda step: step.step)
    return GatesView(
        warning=_warning(gates),
        finding=_finding(gates),
        key=key,
        bar=share_bar(
            [(kind, share, label) for label, kind, _, share in key], f"Mean load: {_told(gates, gates.overall)}"
        ),
        layers=_layers(gates) if gates.layers else None,
        table=_table(gates) if gates.layers else None,
        steps=_steps(gates, steps) if len({step.step for step in steps}) > 1 else None,
        course=_course(steps),
    )


def _told(gates: GateLoads, load: GateLoad) -> str:
    return ", ".join(f"{name} {wording.percent(share)}" for name, share in zip(gates.experts, load.load, strict=True))


def _warning(gates: GateLoads) -> str:
    """Warn of gates that send nearly everything to one expert."""
    load = gates.overall
    if load.largest <= OVERLOAD or len(gates.experts) == 1:
        return ""
    name = gates.experts[load.load.index(load.largest)]
    return f"{name} carries {wording.percent(load.largest)} of the load: next to it, the other experts hardly count."


def _finding(gates: GateLoads) -> str:
    over = sum(layer.largest > OVERLOAD for layer in gates.layers)
    sentences = []
    if gates.overall.entropy is not None:
        whose = "all" if gates.active == len(gates.experts) else f"the {gates.active} that take part"
        most = f"{wording.fixed(log(gates.active), 2)} where {whose} share every token evenly"
        entropy = wording.fixed(gates.overall.entropy, 2)
        sentences.append(f"The mean entropy of the gates is {entropy} nats; it would be {most}.")
    if over:
        layers = f"{over:,} of {wording.counted(len(gates.layers), 'layer')}"
        sentences.append(f"In {layers} one expert carries more than {wording.share(OVERLOAD)}.")
    return " ".join(sentences)


def _layers(gates: GateLoads) -> Markup:
    """Draw one small bar for every layer: blocks from top to bottom, the kinds of layers side by side."""
    cells = []
    for layer in gates.layers:
        block, kind = _parts(layer.name)
        shares = [(marks.kind(number), share) for number, share in enumerate(layer.load)]
        words = f"{layer.name}: {_told(gates, layer)}{_entropy(layer)}"
        cells.append(Cell(block, kind, tuple(shares), words, layer.largest > OVERLOAD))
    return bar_grid(_short_names(cells), f"Load of {wording.counted(len(cells), 'gate')}, block by block")


def _entropy(load: GateLoad) -> str:
    return "" if load.entropy is None else f", entropy {wording.fixed(load.entropy, 2)}"


def _parts(path: str) -> tuple[str, str]:
    """Split a module's path into its block, up to the first number, and its kind, the place within the block."""
    found = _NUMBER.match(path)
    return (found[1], found[2]) if found else ("", path)


def _natural(name: str) -> list[str | tuple[int, str]]:
    """Sort block 2 before block 10: texts and numbers take turns, and a number goes by its length first."""
    return [(len(part), part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _short_names(cells: Sequence[Cell]) -> list[Cell]:
    """Name blocks by their numbers and kinds by their last part, as long as no two become alike."""
    rows = _shortened({cell.row for cell in cells}, lambda name: name.rpartition(".")[2])
    columns = _shortened({cell.column for cell in cells}, lambda name: name.rpartition(".")[2].removesuffix(_SUFFIX))
    return [replace(cell, row=rows[cell.row], column=columns[cell.column]) for cell in cells]


def _shortened(names: Iterable[str], shorter: Callable[[str], str]) -> dict[str, str]:
    """Shorten names, unless that would make two of them alike."""
    short = {name: shorter(name) for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


def _table(gates: GateLoads) -> HeatMap:
    lines = tuple(
        (layer.name, tuple((wording.percent(share), round(SHADES * share)) for share in layer.load))
        for layer in gates.layers
    )
    entropies = tuple(wording.fixed(layer.entropy, 2) for layer in gates.layers)
    return HeatMap("Layer", gates.experts, lines, ("no load", "the whole load"), entropies, "Entropy")


def _steps(gates: GateLoads, steps: Sequence[GateLoad]) -> Markup:
    """Draw every expert's share over the steps, of many an even selection that ends with the last."""
    count = min(len(steps), _MOST_STEPS)
    shown = [steps[(len(steps) - 1) * number // (count - 1)] for number in range(count)]
    low, high = float(shown[0].step), float(shown[-1].step)
    even = even_scale((low, high))
    across = replace(even, low=low, high=high, marks=tuple(mark for mark in even.marks if low <= mark <= high))
    drawn = [
        Line(
            marks.kind(number),
            str(number + 1),
            f"{name} from {wording.percent(shown[0].load[number])} to {wording.percent(shown[-1].load[number])}",
            tuple((float(step.step), step.load[number]) for step in shown),
        )
        for number, name in enumerate(gates.experts)
    ]
    return lines(
        drawn, Frame(across, _SHARES, ("Training step", "Share of the load")), "Load over the steps of training"
    )


def _course(steps: Sequence[GateLoad]) -> str:
    """Say how the entropy changed from the first step to the last."""
    known = [step for step in steps if step.entropy is not None]
    if len(known) < 2:
        return ""
    ends = (f"{wording.fixed(step.entropy, 2)} at step {step.step:,}" for step in (known[0], known[-1]))
    return f"The mean entropy went from {' to '.join(ends)}."
