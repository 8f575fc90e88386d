"""What `coterie fit kshot-auto` chose, and why: `auto.json`, and its words, in `auto.md` and in the report."""

from pydantic import StrictStr

from coterie.records.auto import CandidateRecord, span, tried
from coterie.records.schema import Count, Interval, Names, Number, Position, Record
from coterie.records.wording import p_value, signed_nats


class TaskChoiceRecord(Record):
    """The choice among ways to use a bank's adapters for a task of a few shots; the first candidate is one adapter.

    `adapters` are those that the mixture is made of. `expected` is the difference in loss per token to the first
    candidate, on shots that had no part in what they judged.
    """

    chosen: StrictStr
    adapters: Names
    shots: Count
    folds: Count
    candidates: tuple[CandidateRecord, ...]
    expected: Position = 0.0
    interval: Interval | None = None
    p: Number = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was chosen, of what, why, and what it is expected to gain."""
        own = next(one for one in self.candidates if one.name == self.chosen)
        best = min(self.candidates, key=lambda one: one.nll)
        made_of = f"It is made of {', '.join(self.adapters)}."
        if self.chosen == "backbone":
            made_of = "No adapter of the bank helps here."
        if own is self.candidates[0]:
            why = "Nothing had a smaller loss on examples that were left out."
            if best is not own:
                found = f"{signed_nats(best.difference)} nats a token, p = {p_value(own.p)}"
                why = f"The best of the others, {best.words}, is not significantly better ({found})."
            return f"Chosen: {own.words}.", made_of, why
        why = "It is the best of all that were tried."
        if best is not own:
            why = f"It is the cheapest that is about as good as the best, {best.words} (p = {p_value(own.p)})."
        ends = f" (95% interval {span(self.interval)}, p = {p_value(self.p)})" if self.interval else ""
        gain = (
            f"On examples that were left out the loss changes by {signed_nats(self.expected)} nats a token against the "
            f"one adapter with the least loss{ends}; the choice was made on the same examples, so expect a little less."
        )
        return f"Chosen: {own.words}.", made_of, why, gain

    def page(self) -> str:
        """Return `auto.md`."""
        told = "\n".join(self.sentences)
        return (
            f"# What was chosen, and why\n\n{told}\n\n"
            f"Tried on {self.shots} examples in {self.folds} parts, each judged by what was chosen, gathered and "
            "trained without it. A p below 0.05 says that the best is better by more than chance explains. About as "
            "good is what has nine tenths of the best's gain, and no such p.\n\n"
            f"```text\n{tried(self.candidates, 'adapters at a token', 'to the one')}\n```\n"
        )
