"""What `coterie fit auto` chose, and why: `auto.json`, and its words, which stand in `auto.md` and in the report."""

from collections.abc import Sequence

from pydantic import StrictBool, StrictStr

from coterie.records.schema import Amounts, Count, Interval, Number, Position, Record, Weight
from coterie.records.wording import columns, p_value, percent, signed_nats

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
    """One candidate: what it costs (1 is one adapter), its loss, its difference to the base adapter.

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


class AutoRecord(Record):
    """The choice.

    `expected` is the difference in loss per token to the base adapter, scored exactly on held-out rows. `refused` are
    the shares of rows that are left to the base adapter: `inside` of rows like the data, `outside` of unlike ones.
    `outweighed` says that an estimate was not borne out when it was scored.
    """

    chosen: StrictStr
    combiner: StrictStr
    rows: Count
    trained_tokens: Count
    candidates: tuple[CandidateRecord, ...]
    expected: Position = 0.0
    interval: Interval | None = None
    p: Number = None
    combiners: Amounts = {}
    refused: Amounts = {}
    outweighed: StrictBool = False

    @property
    def own(self) -> CandidateRecord:
        """The chosen candidate."""
        return next(one for one in self.candidates if one.name == self.chosen)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was chosen, why, what it costs and what it is expected to gain."""
        best = min(self.candidates, key=lambda one: one.nll)
        if self.chosen == "base":
            cost = "It costs what one adapter costs."
            return "No mixture helps here: use the base adapter.", self._why_none(best), cost
        why = "It is the best of all that were tried."
        if best.name != self.chosen:
            p = p_value(self.own.p)
            why = f"It is the cheapest that is about as good as the best, {best.words} (p = {p})."
        ends = f" (95% interval {span(self.interval)}, p = {p_value(self.p)})" if self.interval else ""
        mixed = "" if self.chosen == "best-single" else f", with the experts mixed in the {self.combiner}"
        found = [
            f"Chosen: {self.own.words}{mixed}.",
            why,
            f"On held-out rows the loss changes by {signed_nats(self.expected)} nats a token against the base "
            f"adapter{ends}; the choice was made on the same rows, so expect a little less.",
            f"A request costs about {self.own.cost:.2f} times what one adapter costs.",
        ]
        if self.refused:
            inside, outside = (percent(self.refused[side]) for side in ("inside", "outside"))
            shares = f"{inside} of the rows here, {outside} of the unlike ones"
            found.append(f"Prompts unlike the data go to the base adapter: {shares}.")
        return tuple(found)

    def _why_none(self, best: CandidateRecord) -> str:
        if self.outweighed:
            return "What was better by estimated losses was not significantly better when it was scored exactly."
        if best.name == "base":
            return "Nothing had a smaller loss on held-out rows."
        found = f"{signed_nats(best.difference)} nats a token, p = {p_value(self.own.p)}"
        return f"The best of the others, {best.words}, is not significantly better ({found})."

    def page(self) -> str:
        """Return `auto.md`."""
        means = "".join(f"* Mixed in the {name}: NLL {value:.4f}.\n" for name, value in self.combiners.items())
        told = "\n".join(self.sentences)
        return (
            f"# What was chosen, and why\n\n{told}\n\n{means}\n"
            f"Tried on {self.rows} rows, each judged by copies that were not trained on it; {self.trained_tokens:,} "
            "tokens were trained on in all. A p below 0.05 says that the best is better by more than chance explains. "
            "About as good is what has nine tenths of the best's gain, and no such p."
            "\n\n"
            f"```text\n{tried(self.candidates, 'cost', 'to the base')}\n```\n"
        )


def tried(candidates: Sequence[CandidateRecord], cost: str, difference: str) -> str:
    """Return candidates as a table, under these heads of the columns of costs and of differences."""
    lines = [("tried", cost, "NLL", difference, "95% interval", "p of the best")]
    for one in candidates:
        numbers = (f"{one.cost:.2f}", f"{one.nll:.4f}", signed_nats(one.difference))
        lines.append((one.words, *numbers, span(one.interval) if one.interval else "", p_value(one.p)))
    return columns(lines, "<>>>>>")


def span(interval: tuple[float, float]) -> str:
    """Return the two ends of an interval of nats."""
    return " to ".join(map(signed_nats, interval))
