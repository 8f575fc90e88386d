"""Weights along an answer, drawn as lines of text: a bar for every token, a letter and a colour for every expert."""

from collections.abc import Mapping, Sequence
from math import floor
from typing import Any

from rich.console import Console
from rich.text import Text

from coterie.errors import shown

BAR = 40  # cells
PIECE = 16  # columns of a token's text
COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "red", "white", "bright_black")


def print_weights(answer: Mapping[str, Any]) -> None:
    """Print the weights along an answer, as `generate --json` has it, in colour where the terminal has it."""
    console = Console(soft_wrap=True, highlight=False)
    for line in weight_lines(answer):
        console.print(line)


def weight_lines(answer: Mapping[str, Any]) -> list[Text]:
    """Draw the weights of an answer, given as the object that `generate --json` prints.

    Where the weights do not change along the answer there is one line for all of it.
    """
    routing = answer["routing"]
    trace = routing.get("trace")
    experts = trace["experts"] if trace else list(routing["weights"])
    pieces = trace["pieces"] if trace else ["(every token)"]
    weights = trace["weights"] if trace else [list(routing["weights"].values())]
    marks = expert_marks(experts)
    named = (Text.assemble((f" {mark} ", style), f" {shown(name)}") for name, (mark, style) in marks.items())
    lines = [Text("  ").join(named)]
    for piece, row in zip(pieces, weights, strict=True):
        text = repr(piece)[1:-1]
        line = Text(f"{text if len(text) <= PIECE else text[: PIECE - 1] + '…':{PIECE}} ")
        for (mark, style), count in zip(marks.values(), cells(row), strict=True):
            line.append(mark * count, style=style)
        weight, leader = max(zip(row, experts, strict=True), key=lambda pair: pair[0])
        lines.append(line.append(f" {shown(leader)} {weight:.2f}"))
    return lines


def expert_marks(experts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Give every expert a letter of its own, from its name where that is possible, and a style."""
    marks: dict[str, tuple[str, str]] = {}
    for number, name in enumerate(experts):
        taken = {letter for letter, _ in marks.values()}
        letters = [letter for letter in f"{name}abcdefghijklmnopqrstuvwxyz" if letter.isalnum() and letter not in taken]
        marks[name] = ((letters or ["?"])[0], f"black on {COLOURS[number % len(COLOURS)]}")
    return marks


def cells(weights: Sequence[float], count: int = BAR) -> list[int]:
    """Share out `count` cells by weights: whole cells first, then the largest remainders."""
    total = sum(weights) or 1.0
    exact = [count * weight / total for weight in weights]
    whole = [floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda place: whole[place] - exact[place])
    for place in order[: count - sum(whole)]:
        whole[place] += 1
    return whole
