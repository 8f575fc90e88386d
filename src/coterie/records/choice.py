"""A choice by evidence: what was chosen of which candidates, and the words that all such choices share."""

from abc import abstractmethod
from typing import ClassVar

from pydantic import StrictStr

from coterie.records.schema import Interval, Number, Position, Record, Weight
from coterie.records.wording import columns, p_value, signed_nats, told_p

AUTO_FILE, PAGE_FILE = "auto.json", "auto.md"
NAMES = {
    "base": "the base adapter alone",
    "best-single": "the single best expert for everything",
    "uniform": "all experts with equal weights",
    "avengers": "routing by the experts' scores on the cluster of similar prompts",
    "lorauter": "routing by the experts' scores on similar data sets",
    "ariadne": "the one expert that was trained on the most similar prompts",
    "elrea": "ELREA's routing by the prompt's gradient",
    "membership": "ELREA's routing, by what is usual for each expert",
    "performance": "routing to those that are the best on similar rows",
    "loss": "routing by the loss that the prompt's gradient predicts for each expert",
    "prefill": "routing by the loss that the prompt's hidden states predict for each expert",
    "backbone": "the base model without any adapter",
    "least-loss": "the adapter with the least loss on the examples, as it is",
    "best-by-shots": "the adapter that ranks first by the examples, as it is",
    "uniform-weights": "the chosen adapters with equal weights, as they are",
    "kshot-only": "the chosen adapters under gates, trained on the examples alone",
    "kshot-gathered": "the chosen adapters under gates, trained on the examples and the open data",
}


class CandidateRecord(Record):
    """One candidate: what it costs (1 is one adapter), its loss, its difference to the first candidate.

    `p` is that the best is not better than it.
    """

    name: StrictStr
    cost: Weight
    nll: Position
    difference: Position
    interval: Interval | None = None
    p: Number = None

    @property
    def words(self) -> str:
        """What it is, in words."""
        name, _, top = self.name.partition(":top_k=")
        return NAMES.get(name, name) + (f", the {top} largest weight{'s' * (top != '1')} only" if top else "")


class ChoiceRecord(Record):
    """The choice: the first candidate, unless something is significantly better.

    `expected` is the difference in loss per token to the first candidate, on what had no part in what it judged.
    """

    cost_head: ClassVar[str]
    difference_head: ClassVar[str]

    chosen: StrictStr
    candidates: tuple[CandidateRecord, ...]
    expected: Position = 0.0
    interval: Interval | None = None
    p: Number = None

    @property
    def own(self) -> CandidateRecord:
        """The chosen candidate."""
        return next(one for one in self.candidates if one.name == self.chosen)

    @property
    def best(self) -> CandidateRecord:
        """The candidate with the smallest loss."""
        return min(self.candidates, key=lambda one: one.nll)

    @property
    @abstractmethod
    def sentences(self) -> tuple[str, ...]:
        """What was chosen, why, and what it is expected to gain."""

    def why(self) -> str:
        """Say why something else than the first candidate was chosen."""
        if self.own is self.best:
            return "It is the best of all that were tried."
        return f"It is the cheapest that is about as good as the best, {self.best.words} ({told_p(self.own.p)})."

    def why_first(self, judged: str) -> str:
        """Say why the first candidate was chosen; `judged` is what losses were measured on."""
        if self.best is self.candidates[0]:
            return f"Nothing had a smaller loss on {judged}."
        found = f"{signed_nats(self.best.difference)} nats a token, {told_p(self.own.p)}"
        return f"The best of the others, {self.best.words}, is not significantly better ({found})."

    def gain(self, judged: str, first: str, same: str) -> str:
        """Say what is expected: `judged` is what losses were measured on, and `same` what the choice was made on."""
        ends = f" (95% interval {_span(self.interval)}, {told_p(self.p)})" if self.interval else ""
        return (
            f"On {judged} the loss changes by {signed_nats(self.expected)} nats a token against the {first}{ends}; the "
            f"choice was made on the same {same}, so expect a little less."
        )

    def page_of(self, measured: str, judged: str) -> str:
        """Return `auto.md`, with what was measured beside, and how it was judged."""
        lines = [("tried", self.cost_head, "NLL", self.difference_head, "95% interval", "p of the best")]
        for one in self.candidates:
            numbers = (f"{one.cost:.2f}", f"{one.nll:.4f}", signed_nats(one.difference))
            lines.append((one.words, *numbers, _span(one.interval) if one.interval else "", p_value(one.p)))
        told = "\n".join(self.sentences)
        return (
            f"# What was chosen, and why\n\n{told}\n\n{measured}{judged} A p below 0.05 says that the best is better "
            "by more than chance explains. About as good is what has nine tenths of the best's gain, and no such p.\n\n"
            f"```text\n{columns(lines, '<>>>>>')}\n```\n"
        )


def _span(interval: tuple[float, float]) -> str:
    return " to ".join(map(signed_nats, interval))
