"""The load of token-wise gates: who carries how much, layer by layer and over the steps of training."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import log
from operator import itemgetter

from markupsafe import Markup

from coterie.records.task import GateLoads, LayerLoad, StepLoad
from coterie.report import draw, wording
from coterie.report.charts import Cell, bar_grid, split_bar
from coterie.report.heatmaps import HeatMap, cell
from coterie.report.plots import Frame, Line, lines
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
    summary: str
    key: tuple[tuple[str, str, str, float], ...]
    bar: Markup
    layers: Markup | None
    table: HeatMap | None
    steps: Markup | None
    training: str


def gates_view(gates: GateLoads | None) -> GatesView | None:
    """Draw the load of every layer's gate, and how it came about."""
    if gates is None:
        return None
    key = tuple(
        (str(number + 1), draw.css_class(number), name, share)
        for number, (name, share) in enumerate(zip(gates.experts, gates.shares, strict=True))
    )
    words = f"Mean load: {wording.percents(zip(gates.experts, gates.shares, strict=True))}"
    layers = sorted(gates.layers, key=lambda layer: _natural(_block_and_kind(layer.path)[0]))
    cells = tuple((one.path, tuple(cell(wording.percent(share), share) for share in one.shares)) for one in layers)
    entropies = tuple(wording.fixed(layer.entropy, 2) for layer in layers)
    table = HeatMap("Layer", tuple(gates.experts), cells, ("no load", "the whole load"), entropies, "Entropy")
    steps = sorted(gates.steps, key=lambda step: step.step)
    known = [step for step in steps if step.entropy is not None]
    warning, (largest, leader) = "", max(zip(gates.shares, gates.experts, strict=True), key=itemgetter(0))
    if largest > OVERLOAD and len(gates.experts) > 1:
        carried = f"{leader} carries {wording.percent(largest)} of the load"
        warning = f"{carried}: next to it, the other experts hardly count."
    ends = [f"{wording.fixed(step.entropy, 2)} at step {step.step:,}" for step in (*known[:1], *known[-1:])]
    return GatesView(
        warning=warning,
        summary=_summary(gates),
        key=key,
        bar=split_bar([(kind, share, label) for label, kind, _, share in key], words),
        layers=_layer_grid(gates, layers) if layers else None,
        table=table if layers else None,
        steps=_steps_picture(gates, steps) if len({step.step for step in steps}) > 1 else None,
        training=f"The mean entropy went from {' to '.join(ends)}." if len(known) > 1 else "",
    )


def _summary(gates: GateLoads) -> str:
    """Say how even the load is, and in how many layers one expert carries nearly all of it."""
    over = sum(max(layer.shares) > OVERLOAD for layer in gates.layers)
    sentences = []
    if gates.entropy is not None:
        whose = "all" if gates.active == len(gates.experts) else f"the {gates.active} that take part"
        most = f"{wording.fixed(log(gates.active), 2)} where {whose} share every token evenly"
        entropy = wording.fixed(gates.entropy, 2)
        sentences.append(f"The mean entropy of the gates is {entropy} nats; it would be {most}.")
    if over:
        layers = f"{over:,} of {wording.counted(len(gates.layers), 'layer')}"
        sentences.append(f"In {layers} one expert carries more than {wording.percent(OVERLOAD, 0)}.")
    return " ".join(sentences)


def _layer_grid(gates: GateLoads, layers: Sequence[LayerLoad]) -> Markup:
    """Draw one small bar for every layer: blocks from top to bottom, the kinds of layers side by side.

    Blocks are named by their numbers and kinds by their last part, as long as no two become alike.
    """
    cells = []
    for layer in layers:
        block, kind = _block_and_kind(layer.path)
        shares = [(draw.css_class(number), share) for number, share in enumerate(layer.shares)]
        entropy = "" if layer.entropy is None else f", entropy {wording.fixed(layer.entropy, 2)}"
        words = f"{layer.path}: {wording.percents(zip(gates.experts, layer.shares, strict=True))}{entropy}"
        cells.append(Cell(block, kind, tuple(shares), words, max(layer.shares) > OVERLOAD))
    rows = _shortened({cell.row for cell in cells}, lambda name: name.rpartition(".")[2])
    columns = _shortened({cell.column for cell in cells}, lambda name: name.rpartition(".")[2].removesuffix(_SUFFIX))
    cells = [replace(cell, row=rows[cell.row], column=columns[cell.column]) for cell in cells]
    return bar_grid(cells, f"Load of {wording.counted(len(cells), 'gate')}, block by block")


def _block_and_kind(path: str) -> tuple[str, str]:
    """Split a module's path into its block, up to the first number, and its kind, the place within the block."""
    found = _NUMBER.match(path)
    return (found[1], found[2]) if found else ("", path)


def _natural(name: str) -> list[str | tuple[int, str]]:
    """Sort block 2 before block 10: texts and numbers take turns, and a number goes by its length first."""
    return [(len(part), part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _shortened(names: Iterable[str], shorter: Callable[[str], str]) -> dict[str, str]:
    """Shorten names, unless that would make two of them alike."""
    short = {name: shorter(name) for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


def _steps_picture(gates: GateLoads, steps: Sequence[StepLoad]) -> Markup:
    """Draw every expert's share over the steps, of many an even selection that ends with the last."""
    count = min(len(steps), _MOST_STEPS)
    shown = [steps[(len(steps) - 1) * number // (count - 1)] for number in range(count)]
    low, high = float(shown[0].step), float(shown[-1].step)
    even = even_scale((low, high))
    across = replace(even, low=low, high=high, marks=tuple(mark for mark in even.marks if low <= mark <= high))
    drawn = []
    for number, name in enumerate(gates.experts):
        ends = [wording.percent(step.shares[number]) for step in (shown[0], shown[-1])]
        places = tuple((float(step.step), step.shares[number]) for step in shown)
        drawn.append(Line(draw.css_class(number), str(number + 1), f"{name} from {' to '.join(ends)}", places))
    frame = Frame(across, _SHARES, ("Training step", "Share of the load"))
    return lines(drawn, frame, "Load over the steps of training")
