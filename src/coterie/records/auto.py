"""What `coterie fit auto` chose, and why: `auto.json`, and its words, which stand in `auto.md` and in the report."""

from pydantic import StrictBool, StrictStr

from coterie.records.choice import ChoiceRecord
from coterie.records.schema import Amounts, Count
from coterie.records.wording import percent


class AutoRecord(ChoiceRecord):
    """The choice; the first candidate is the base adapter.

    What is expected was scored exactly on held-out rows. `refused` are the shares of rows that are left to the base
    adapter: `inside` of rows like the data, `outside` of unlike ones. `outweighed` says that an estimate was not borne
    out when it was scored.
    """

    cost_head = "cost"
    difference_head = "to the base"

    combiner: StrictStr
    rows: Count
    trained_tokens: Count
    combiners: Amounts = {}
    refused: Amounts = {}
    outweighed: StrictBool = False

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was chosen, why, what it costs and what it is expected to gain."""
        if self.chosen == "base":
            why = self.why_first("held-out rows")
            if self.outweighed:
                why = "What was better by estimated losses was not significantly better when it was scored exactly."
            return "No mixture helps here: use the base adapter.", why, "It costs what one adapter costs."
        mixed = "" if self.chosen == "best-single" else f", with the experts mixed in the {self.combiner}"
        found = [
            f"Chosen: {self.own.words}{mixed}.",
            self.why(),
            self.gain("held-out rows", "base adapter", "rows"),
            f"A request costs about {self.own.cost:.2f} times what one adapter costs.",
        ]
        if self.refused:
            inside, outside = (percent(self.refused[side]) for side in ("inside", "outside"))
            shares = f"{inside} of the rows here, {outside} of the unlike ones"
            also = "and where that tells too little, those like rows on which nothing was gained"
            found.append(f"Prompts unlike the data go to the base adapter, {also}: {shares}.")
            if self.refused["outside"] < 0.5:
                found.append(
                    "Most unlike ones look like the data, so requests of other kinds may be answered worse than by the "
                    "base adapter: give some, or more, of the kinds that come by --unlike FILE."
                )
        return tuple(found)

    def page(self) -> str:
        """Return `auto.md`."""
        means = "".join(f"* Mixed in the {name}: NLL {value:.4f}.\n" for name, value in self.combiners.items())
        judged = (
            f"Tried on {self.rows} rows, each judged by copies that were not trained on it; {self.trained_tokens:,} "
            "tokens were trained on in all."
        )
        return self.page_of(f"{means}\n", judged)
