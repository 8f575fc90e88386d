"""What `coterie fit kshot-auto` chose, and why: `auto.json`, and its words, in `auto.md` and in the report."""

from coterie.records.choice import ChoiceRecord
from coterie.records.schema import Count, Names


class TaskChoiceRecord(ChoiceRecord):
    """The choice among ways to use a bank's adapters for a task of a few shots; the first candidate is one adapter.

    `adapters` are those that the mixture is made of.
    """

    cost_head = "adapters at a token"
    difference_head = "to the one"

    adapters: Names
    shots: Count
    folds: Count

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was chosen, of what, why, and what it is expected to gain."""
        made_of = f"It is made of {', '.join(self.adapters)}."
        if self.chosen == "backbone":
            made_of = "No adapter of the bank helps here."
        judged = "examples that were left out"
        if self.own is self.candidates[0]:
            return f"Chosen: {self.own.words}.", made_of, self.why_first(judged)
        gain = self.gain(judged, "one adapter with the least loss", "examples")
        return f"Chosen: {self.own.words}.", made_of, self.why(), gain

    def page(self) -> str:
        """Return `auto.md`."""
        judged = (
            f"Tried on {self.shots} examples in {self.folds} parts, each judged by what was chosen, gathered and "
            "trained without it."
        )
        return self.page_of("", judged)
